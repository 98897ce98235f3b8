"""The store: images and their features on disk, changed in steps that happen wholly or not at all.

    manifest.json            which model, and which segments are live (`manifest`)
    segments/*.parquet       records and features of some images each (`segments`)
    shortcuts/               what makes searching quick, derived from them (`stored`)
    write.lock               held by the one process that writes

A change writes new segments first and replaces the manifest last. Killed before that instant it
never happened, killed after it, it is done; what it leaves lying about is named by no manifest,
read by nobody, and swept away by the next writer.

N images, Q vectors an image, E numbers a vector.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from .errors import StoreError, StoreLockedError, StoreVersionError, VectorIndexError
from .files import HASH_BYTES, TEMPORARY, cannot_write, hash_file, sync_folder, writing_to
from .manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    Segment,
    Settings,
    State,
    damaged,
    read_state,
    write_state,
)
from .segments import (
    SUFFIX,
    ImageRecord,
    damaged_rows,
    is_outdated,
    make_table,
    map_features,
    read_features,
    read_record_table,
    read_records,
    read_rows,
    records_in,
    rescue_rows,
    write_segment,
)

__all__ = [
    "HASH_BYTES",
    "SCHEMA_VERSION",
    "Damage",
    "ImageRecord",
    "Manifest",
    "Settings",
    "Store",
    "hash_file",
]

SEGMENT_ROWS = (
    8192  # the most images a segment: 128 MB of 32 x 256 features, what a merge holds in memory
)
RECORD_TABLES = 16  # segments whose records stay in memory between queries: about 1 MB each
SHORTCUTS = "shortcuts"  # the folder of what `stored` keeps: derived from the segments
RECALL = "recall.json"  # in it: what was measured of these images, and says nothing of others
_SEGMENTS = "segments"
_LOCK = "write.lock"
_OURS = re.compile(rf"[0-9a-f]{{32}}{re.escape(SUFFIX)}")  # sweeping touches no other name


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What `Store.verify` found wrong with a segment."""

    file: Path
    reason: str
    images: int  # how many are affected
    rows: tuple[int, ...] | None  # which of the segment's; None: the whole file is lost
    paths: tuple[str, ...]  # theirs; () where the file is lost, and nobody knows them


class Store:
    """An index on disk, as it was when it was opened or last written to through this object.

    Reading needs no lock. Writing goes

        with store.writing():
            store.append(records, features)
            store.remove(vanished)
            store.compact()

    and each of the three is a change of its own: done when it returns, undone if it is killed.
    """

    def __init__(self, directory: Path, state: State) -> None:
        """Not for callers: use `Store.create` or `Store.open`."""
        self._directory = directory
        self._folder = directory / _SEGMENTS
        self._state = state
        # by path, in the order of the rows; None: not read yet
        self._rows: dict[str, tuple[int, ImageRecord]] | None = None
        self._writing = False
        read_table = functools.partial(read_record_table, self._folder)
        self._record_table = functools.lru_cache(maxsize=RECORD_TABLES)(read_table)

    @classmethod
    def create(
        cls,
        directory: str | os.PathLike[str],
        manifest: Manifest,
        *,
        settings: Settings | None = None,
        replace: bool = False,
    ) -> Store:
        """Makes an empty index in a folder, which is created if need be.

        Args:
            directory: the folder.
            manifest: what will make the features.
            settings: how it wants to be searched.
            replace: throw away the index that is there, readable or not.

        Raises:
            StoreError: the folder holds an index already, or cannot be written to.
            StoreLockedError: another process is writing there.
            StoreVersionError: the manifest is not of this program's schema version.
        """
        path = Path(directory).absolute()
        if manifest.schema_version != SCHEMA_VERSION:
            raise StoreVersionError(f"This program writes schema version {SCHEMA_VERSION} only.")
        replaceable = replace and (path / _SEGMENTS).is_dir()  # else the manifest is not ours
        with writing_to(path):
            (path / _SEGMENTS).mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if (path / MANIFEST).exists() and not replaceable:
                raise StoreError(f"There is a {MANIFEST} in {path} already.")
            store = cls(path, State(manifest=manifest, settings=settings or Settings()))
            (path / SHORTCUTS / RECALL).unlink(missing_ok=True)
            write_state(path, store._state)
            store._sweep()
        return store

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Store:
        """Opens the index in a folder; nothing but the manifest is read yet.

        Raises:
            StoreMissingError: the folder holds none.
            StoreCorruptError: its manifest is damaged.
            StoreVersionError: it is of another schema version.
        """
        path = Path(directory).absolute()
        return cls(path, read_state(path))

    @property
    def directory(self) -> Path:
        """The folder, absolute."""
        return self._directory

    @property
    def manifest(self) -> Manifest:
        """What made the features."""
        return self._state.manifest

    @property
    def settings(self) -> Settings:
        """How the index wants to be searched."""
        return self._state.settings

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The live segments, in the order of the rows."""
        return self._state.segments

    @property
    def next_id(self) -> int:
        """The id of the next image: how many there have ever been."""
        return self._state.next_id

    @property
    def revision(self) -> object:
        """Something that is equal as long as nothing was changed."""
        return self._state

    def __len__(self) -> int:
        """N."""
        return sum(map(len, self._state.segments))

    @property
    def records(self) -> list[ImageRecord]:
        """The images, in the order of the rows; read without the features.

        Raises:
            StoreCorruptError: a segment is damaged.
        """
        return [record for _, record in self._read_rows().values()]

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """The images' ids (N,), ascending: an image keeps its id, and no other ever gets it.

        Raises:
            StoreCorruptError: a segment is damaged.
        """
        return np.array([number for number, _ in self._read_rows().values()], np.int64)

    def features(self) -> npt.NDArray[np.float16]:
        """The features (N, Q, E), in the order of the rows, read anew at each call.

        Raises:
            StoreCorruptError: a segment is damaged.
        """
        manifest = self.manifest
        features = np.empty((len(self), manifest.num_vectors, manifest.dim), np.float16)
        start = 0
        for segment in self._state.segments:
            end = start + len(segment)
            with self._reading(segment):
                read_features(self._folder, segment, features[start:end])
            start = end
        return features

    def map_features(self, segment: Segment) -> npt.NDArray[np.float16]:
        """The features of all rows of a segment (rows, Q, E), dead ones too; read as they are used.

        What is not read cannot be checked: `verify` looks for damage.

        Raises:
            StoreCorruptError: the segment is damaged, as far as that is looked at.
        """
        with self._reading(segment):
            shape = (self.manifest.num_vectors, self.manifest.dim)
            return map_features(self._folder, segment, shape)

    def records_at(self, rows: npt.NDArray[np.int64]) -> list[ImageRecord]:
        """The records of some images, by their row numbers (n,); reads no other segments than theirs.

        Raises:
            StoreCorruptError: one of those is damaged.
        """
        found: dict[int, ImageRecord] = {}
        start = 0
        for segment in self._state.segments:
            inside = rows[(start <= rows) & (rows < start + len(segment))]
            if len(inside):
                places = inside - start
                if segment.removed:
                    places = np.array(segment.live)[places]
                with self._reading(segment):
                    records = records_in(self._record_table(segment), places.tolist())
                found |= zip(inside.tolist(), records, strict=True)
            start += len(segment)
        return [found[row] for row in rows.tolist()]

    def features_of(self, paths: Sequence[str]) -> npt.NDArray[np.float16]:
        """The features of some images (N, Q, E), in the order of the paths; read anew at each call.

        Raises:
            StoreError: the index does not hold a path.
            StoreCorruptError: a segment that is read is damaged.
        """
        rows = self._read_rows()
        for path in paths:
            if path not in rows:
                raise StoreError(f"{path} is not in the index.")
        wanted: dict[str, list[int]] = {}
        for place, path in enumerate(paths):
            wanted.setdefault(path, []).append(place)
        found = np.empty((len(paths), self.manifest.num_vectors, self.manifest.dim), np.float16)
        row_paths = iter(rows)
        for segment in self._state.segments:
            held = [wanted.get(next(row_paths), []) for _ in range(len(segment))]
            if not any(held):
                continue
            features = np.empty((len(segment), *found.shape[1:]), np.float16)
            with self._reading(segment):
                read_features(self._folder, segment, features)
            for row, places in enumerate(held):
                found[places] = features[row]
        return found

    def size_on_disk(self) -> int:
        """The bytes of the index's files, leftovers of a killed run included."""
        files = [self._directory / MANIFEST, *self._folder.glob(f"*{SUFFIX}")]
        files += (self._directory / SHORTCUTS).glob("*")
        return sum(file.stat().st_size for file in files if file.exists())

    @contextlib.contextmanager
    def writing(self) -> Iterator[Store]:
        """Holds the index for writing.

        Takes in what others wrote since it was opened, and sweeps away what killed runs left.

        Raises:
            StoreLockedError: somebody is writing, this object included; there is no waiting.
            StoreError: the folder cannot be written to.
        """
        with _locked(self._directory):
            self._writing = True
            try:
                self._refresh()
                self._sweep()
                yield self
            finally:
                self._writing = False

    def append(self, records: Sequence[ImageRecord], features: npt.NDArray[Any]) -> None:
        """Adds images after the last row.

        Args:
            records: N of them, of paths that the index does not hold.
            features: (N, Q, E), any float type, kept as float16.

        Raises:
            StoreError: outside of `writing`, a path that is there already, or the disk is full.
            VectorIndexError: features of another shape, no floats, or not finite in float16.
        """
        self._begin()
        rows = self._read_rows()
        _check_new(records, rows)
        kept = self._check_features(len(records), features)
        if not len(records):
            return
        first = self._state.next_id
        segments = []
        for start in range(0, len(records), SEGMENT_ROWS):
            part = slice(start, start + SEGMENT_ROWS)
            table = make_table(self.manifest, first + start, records[part], kept[part])
            with writing_to(self._directory):
                segments.append(write_segment(self._folder, [table]))
        self._commit((*self._state.segments, *segments), first + len(records))
        numbered = enumerate(records, first)
        self._rows = rows | {record.path: (number, record) for number, record in numbered}

    def remove(self, paths: Iterable[str | os.PathLike[str]]) -> int:
        """Drops images by path; a path that the index does not hold is passed over.

        Their rows stay in the segments until `compact`.

        Returns:
            How many images were dropped.

        Raises:
            StoreError: outside of `writing`, or the disk is full.
        """
        self._begin()
        rows = self._read_rows()
        gone = {os.fspath(path) for path in paths} & rows.keys()
        if not gone:
            return 0
        row_paths = iter(rows)
        segments = [
            _bury(segment, {row for row in segment.live if next(row_paths) in gone})
            for segment in self._state.segments
        ]
        self._commit([segment for segment in segments if len(segment)], self._state.next_id)
        self._rows = {path: row for path, row in rows.items() if path not in gone}
        return len(gone)

    def change_settings(self, settings: Settings) -> None:
        """Says how the index wants to be searched from now on.

        Raises:
            StoreError: outside of `writing`, or the disk is full.
        """
        self._begin()
        rows = self._rows
        self._replace(dataclasses.replace(self._state, settings=settings))
        self._rows = rows

    def compact(self, tolerated: float = 0.0) -> None:
        """Merges small neighbouring segments and forgets removed rows; images, order and ids stay.

        Afterwards each segment is at least twice as long as the next, or too long to merge with it:
        few segments, and over many runs a row is rewritten a few times only.

        Args:
            tolerated: the share of removed rows with which a segment may stay as it is; 0 also
                rewrites segments of older versions.

        Raises:
            StoreError: outside of `writing`, or the disk is full.
            StoreCorruptError: a segment that must be rewritten is damaged.
        """
        self._begin()
        segments = [self._merge(group, tolerated) for group in _neighbours(self._state.segments)]
        if tuple(segments) != self._state.segments:
            rows = self._rows
            self._commit(segments, self._state.next_id)
            self._rows = rows
        self._sweep()

    def verify(self) -> list[Damage]:
        """Looks at every byte of the live segments; [] says that all is whole.

        Raises:
            StoreError: a file cannot be read.
        """
        return [damage for segment in self._state.segments for damage in self._damage(segment)]

    def _damage(self, segment: Segment) -> list[Damage]:
        """What is wrong with a segment: nothing, or one thing."""
        path = self._folder / segment.file
        try:
            rows = damaged_rows(self._folder, segment)
            if rows is None:
                return []
            lost = set(rows)
            records = zip(segment.live, read_records(self._folder, segment), strict=True)
            paths = tuple(record.path for row, (_, record) in records if row in lost)
            reason = "the checksum of the features differs"
            return [
                Damage(file=path, reason=reason, images=len(rows), rows=tuple(rows), paths=paths)
            ]
        except FileNotFoundError as error:
            self._check_unchanged(error)
            reason = "it is missing"
        except ValueError as error:
            reason = str(error)
        except OSError as error:
            raise StoreError(f"Cannot read {path}: {error.strerror or error}.") from error
        return [Damage(file=path, reason=reason, images=len(segment), rows=None, paths=())]

    def repair(self, damages: list[Damage] | None = None) -> list[Damage]:
        """Drops what is damaged, and keeps the rest; what it returns is to be added again.

        Args:
            damages: of `verify`, within the same `writing`; None looks itself.

        Raises:
            StoreError: outside of `writing`, or the disk is full.
        """
        self._begin()
        damages = self.verify() if damages is None else damages
        by_file = {damage.file.name: damage for damage in damages}
        segments = []
        for segment in self._state.segments:
            damage = by_file.get(segment.file)
            if damage is None:
                segments.append(segment)
            elif damage.rows is not None:
                with writing_to(self._directory):
                    kept = rescue_rows(self._folder, segment, damage.rows)
                    if kept is not None:
                        segments.append(write_segment(self._folder, [kept]))
        if damages:
            self._commit(segments, self._state.next_id)
            self._sweep()
        return damages

    def _merge(self, group: list[Segment], tolerated: float) -> Segment:
        """One segment with the live rows of a group."""
        alone, outdated = len(group) == 1, not tolerated and is_outdated(group[0])
        if alone and not outdated and len(group[0].removed) <= tolerated * group[0].rows:
            return group[0]
        tables = []
        for segment in group:
            with self._reading(segment):
                tables.append(read_rows(self._folder, segment))
        with writing_to(self._directory):
            return write_segment(self._folder, tables)

    def _read_rows(self) -> dict[str, tuple[int, ImageRecord]]:
        """The ids and records by path, in row order."""
        if self._rows is None:
            rows: dict[str, tuple[int, ImageRecord]] = {}
            for segment in self._state.segments:
                with self._reading(segment):
                    for number, record in read_records(self._folder, segment):
                        rows[record.path] = (number, record)
            self._rows = rows
        return self._rows

    def _check_features(self, count: int, features: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
        """The features as float16, of the shape that this index wants."""
        shape = (count, self.manifest.num_vectors, self.manifest.dim)
        given = np.asarray(features)
        if given.shape != shape or not np.issubdtype(given.dtype, np.floating):
            raise VectorIndexError(
                f"Features must be floats of shape {shape}, not {given.dtype} of {given.shape}."
            )
        with np.errstate(over="ignore"):  # too large for float16 becomes infinite
            kept = given.astype(np.float16, copy=False)
        if not np.isfinite(kept).all():
            raise VectorIndexError("Features must be finite in float16.")
        return kept

    def _begin(self) -> None:
        """Before a change: the lock must be held, and the state be the one on disk.

        It is not if Ctrl-C came between a commit and the line after it.
        """
        if not self._writing:
            raise StoreError("An index can be changed only within `with store.writing():`.")
        self._refresh()

    def _refresh(self) -> None:
        state = read_state(self._directory)
        if state != self._state:
            self._rows = None
            self._state = state

    def _commit(self, segments: Sequence[Segment], next_id: int) -> None:
        """Makes these segments the live ones; forgets the records that were read."""
        self._replace(dataclasses.replace(self._state, next_id=next_id, segments=tuple(segments)))

    def _replace(self, state: State) -> None:
        with writing_to(self._directory):
            sync_folder(self._folder)
            write_state(self._directory, state)
        self._rows = None
        self._state = state

    def _sweep(self) -> None:
        """Deletes what killed runs and merges left: files of ours that the manifest names not."""
        live = {segment.file for segment in self._state.segments}
        leftovers = list(self._directory.glob(f"{MANIFEST}.*{TEMPORARY}"))
        for file in self._folder.glob(f"*{SUFFIX}"):
            if _OURS.fullmatch(file.name) and file.name not in live:
                leftovers.append(file)
        for file in leftovers:
            with contextlib.suppress(OSError):  # Windows: somebody still reads it
                file.unlink()

    @contextlib.contextmanager
    def _reading(self, segment: Segment) -> Iterator[None]:
        """Turns what goes wrong with a segment's file into one sentence that names it."""
        file = self._folder / segment.file
        try:
            yield
        except FileNotFoundError as error:
            self._check_unchanged(error)
            raise damaged(file, self._directory, "it is missing") from error
        except ValueError as error:
            raise damaged(file, self._directory, str(error)) from error
        except OSError as error:
            raise StoreError(f"Cannot read {file}: {error.strerror or error}.") from error

    def _check_unchanged(self, error: FileNotFoundError) -> None:
        """Tells a file that another process has merged away from one that is lost."""
        if read_state(self._directory) != self._state:
            raise StoreError(
                f"The index in {self._directory} was changed by another process while it was "
                "read: run the command again."
            ) from error


def _bury(segment: Segment, rows: set[int]) -> Segment:
    """A segment with some more of its rows dead."""
    if not rows:
        return segment
    return dataclasses.replace(segment, removed=tuple(sorted(rows.union(segment.removed))))


def _neighbours(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Cuts the segments into the groups that `compact` merges."""
    groups: list[list[Segment]] = []
    sizes: list[int] = []  # live rows of each group
    for segment in segments:
        groups.append([segment])
        sizes.append(len(segment))
        while len(groups) > 1 and sizes[-2] < 2 * sizes[-1] and sum(sizes[-2:]) <= SEGMENT_ROWS:
            groups[-2:] = [groups[-2] + groups[-1]]
            sizes[-2:] = [sum(sizes[-2:])]
    return groups


def _check_new(records: Sequence[ImageRecord], rows: Container[str]) -> None:
    """Raises StoreError for a path that is live, or comes twice."""
    seen: set[str] = set()
    for record in records:
        if record.path in rows or record.path in seen:
            raise StoreError(f"{record.path} is in the index already: remove it first.")
        seen.add(record.path)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds the write lock of a folder; a killed process lets go of it by itself."""
    lock = FileLock(directory / _LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StoreLockedError(
            f"Another process is writing to the index in {directory}: wait until it is done."
        ) from error
    except (OSError, NotImplementedError) as error:
        raise cannot_write(directory, error) from error
    try:
        yield
    finally:
        lock.release()
