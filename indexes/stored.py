"""A store's images, ready to be searched: its shortcuts, and which kind of index they make.

    shortcuts/directions.arrow   the directions (`directions`)
    shortcuts/NAME-KEY.arrow     the shortcut to the segment NAME along the directions KEY (`shortcuts`)
    shortcuts/recall.json        what a compact index was measured to find (`recall`)

All of it follows from the segments. The one process that writes to the store brings it up to date; a
reader makes in memory what is missing: slower to open, and the same answers.
"""

from __future__ import annotations

import contextlib
import os
import re
from functools import cached_property
from pathlib import Path

import numpy as np

from .base import Float32
from .bounded import BoundedIndex
from .directions import SAMPLE, Directions, find_directions, read_directions, write_directions
from .errors import StoreCorruptError, VectorIndexError
from .files import TEMPORARY, writing_to
from .joined import Joined
from .manifest import Segment, Settings
from .recall import FEWEST, Measured, measure, read_measured, write_measured
from .shortcuts import (
    Shortcut,
    checksum_differs,
    make_shortcut,
    read_shortcut,
    write_shortcut,
)
from .store import RECALL, SHORTCUTS, Damage, Store

_DIRECTIONS = "directions.arrow"
_SHORTCUT = r"[0-9a-f]{32}-[0-9a-f]{16}\.arrow"
_OURS = re.compile(  # sweeping touches no other name
    rf"{_SHORTCUT}|({_SHORTCUT}|directions\.arrow|recall\.json)\..*{re.escape(TEMPORARY)}"
)
_GROWTH = 4  # how many times more images call for new directions
_NEWCOMERS = 0.5  # the share of images come or gone since that calls for measuring again
_FEWEST_DIRECTIONS = 8  # of the means; with fewer they say too little
_WORTHWHILE = 2 * FEWEST  # images; of fewer a compact index would look at most


def check_memory(settings: Settings, images: int, dim: int) -> None:
    """Makes sure that so many images of E numbers a vector can be searched in the memory given.

    Raises:
        VectorIndexError: not even their means fit.
    """
    least = 4 * images * min(_FEWEST_DIRECTIONS, dim)
    if settings.kind != "exact" and images >= _WORTHWHILE and settings.memory < least:
        raise VectorIndexError(
            f"{images:,} images need a --memory of at least {least:,} bytes, "
            f"not {settings.memory:,}."
        )


class StoredIndex:
    """The index of a store as it is now."""

    def __init__(self, store: Store) -> None:
        """Name a store; what its shortcuts say is read when it is needed."""
        self.store = store
        self._folder = store.directory / SHORTCUTS

    @cached_property
    def directions(self) -> Directions | None:
        """Those on disk; None where there are none, or another model's."""
        found, manifest = read_directions(self._folder / _DIRECTIONS), self.store.manifest
        expected = (manifest.dim, manifest.model_fingerprint)
        return found if found is not None and (found.dim, found.model) == expected else None

    @cached_property
    def measured(self) -> Measured | None:
        """What was measured with these directions and settings; None where nothing was."""
        if self.directions is None or not self.wants_compact:
            return None
        found = read_measured(self._folder / RECALL)
        if found is None or found.directions != self.directions.key:
            return None
        fits = 4 * len(self.store) * found.mean_directions <= self.store.settings.memory
        return found if fits or found.mean_directions == self._affordable(self.directions) else None

    @property
    def revision(self) -> object:
        """Something that is equal as long as nothing was changed that a search depends on."""
        key = None if self.directions is None else self.directions.key
        return self.store.revision, key, self.measured

    @property
    def wants_compact(self) -> bool:
        """Whether a compact index was asked for, or is needed because the bounds are too many."""
        settings = self.store.settings
        if settings.kind == "exact" or len(self.store) < _WORTHWHILE:
            return False
        exact = self._exact_bytes
        return settings.kind == "compact" or (exact is not None and exact > settings.memory)

    @property
    def needs_measuring(self) -> bool:
        """Whether a compact index is wanted, and was not measured yet or has changed much since."""
        if self.directions is None or not self.wants_compact:
            return False
        if self.measured is None:
            return True
        before = self.measured.images
        come = self.store.next_id - self.measured.next_id
        gone = before + come - len(self.store)
        return max(come, gone) > _NEWCOMERS * before

    @property
    def search_bytes(self) -> int | None:
        """What every search goes through: the means, or the bounds; None where these are missing."""
        if self.measured is not None and self.measured.candidates is not None:
            return 4 * len(self.store) * self.measured.mean_directions
        return self._exact_bytes

    def open(self) -> BoundedIndex:
        """Opens the images, at least one, for searching; features and bounds are read as they are used.

        Raises:
            StoreCorruptError: a segment is damaged, as far as that is looked at.
        """
        index = self._exact(self.directions or self._find())
        if self.measured is None or self.measured.candidates is None:
            return index
        return index.compact(self.measured.candidates, self.measured.mean_directions)

    def features(self) -> Joined:
        """The features of all images (N, Q, E), read as they are used.

        Raises:
            StoreCorruptError: a segment is damaged, as far as that is looked at.
        """
        return Joined(
            [self.store.map_features(segment) for segment in self.store.segments],
            [np.array(x.live) if x.removed else None for x in self.store.segments],
        )

    def refresh(self) -> None:
        """Makes what is missing, and deletes what has become useless; within `store.writing()`.

        Raises:
            StoreError: the folder cannot be written to.
            StoreCorruptError: a segment is damaged, as far as that is looked at.
        """
        directions = self.directions
        if not len(self.store):
            if self._folder.is_dir():
                (self._folder / RECALL).unlink(missing_ok=True)
                _sweep(self._folder, keep=set())
            return
        with writing_to(self.store.directory):
            self._folder.mkdir(exist_ok=True)
            if directions is None or len(self.store) >= _GROWTH * directions.found_on:
                directions = self._find()
            needed = {self._path(segment, directions): segment for segment in self.store.segments}
            for path, segment in needed.items():
                if self._read(path, segment, directions) is None:
                    shortcut = make_shortcut(directions, self.store.map_features(segment))
                    write_shortcut(path, shortcut)
            if directions is not self.directions:  # last: they are nothing without their shortcuts
                write_directions(self._folder / _DIRECTIONS, directions)
        self._forget_what_was_read()
        _sweep(self._folder, keep=set(needed))

    def measure(self, queries: Float32) -> Measured:
        """Chooses how many candidates a compact index looks at, by what it finds for queries (B, E).

        Raises:
            StoreError: the folder cannot be written to.
        """
        directions = self.directions or self._find()
        affordable = self._affordable(directions)
        measured = measure(self._exact(directions), queries, affordable, self.store.next_id)
        with writing_to(self.store.directory):
            write_measured(self._folder / RECALL, measured)
        self._forget_what_was_read()
        return measured

    def damaged(self) -> list[Damage]:
        """The files that are not as they were written: no features are lost, but hits may be."""
        files = []
        if self.directions is None:
            files = [self._folder / _DIRECTIONS]
        else:
            for segment in self.store.segments:
                path = self._path(segment, self.directions)
                shortcut = self._read(path, segment, self.directions)
                if shortcut is None or checksum_differs(shortcut):
                    files.append(path)
        reason = "the checksum differs"
        return [
            Damage(file=path, reason=reason, images=0, rows=(), paths=())
            for path in files
            if path.exists()  # missing is not damaged, and another process may be writing
        ]

    def _exact(self, directions: Directions) -> BoundedIndex:
        features = self.features()
        shortcuts = [
            self._read(self._path(segment, directions), segment, directions)
            or make_shortcut(directions, part)
            for segment, part in zip(self.store.segments, features.parts, strict=True)
        ]
        return BoundedIndex(features, shortcuts, directions)

    def _find(self) -> Directions:
        images, manifest = len(self.store), self.store.manifest
        step = -(-images * manifest.num_vectors // SAMPLE)
        sample = self.features()[np.arange(0, images, step)]
        if not np.isfinite(sample).all():
            raise StoreCorruptError(
                f"The index in {self.store.directory} holds numbers that are not finite: mend it "
                f"with `blip2-search verify --repair --index {self.store.directory}`."
            )
        return find_directions(sample, found_on=images, model=manifest.model_fingerprint)

    @property
    def _exact_bytes(self) -> int | None:
        if self.directions is None:
            return None
        return 4 * len(self.store) * self.store.manifest.num_vectors * (len(self.directions) + 1)

    def _affordable(self, directions: Directions) -> int:
        """How many directions of the means fit into the memory given, in steps as images come."""
        fit = self.store.settings.memory // (4 * max(1, len(self.store)))
        steps = fit // _FEWEST_DIRECTIONS * _FEWEST_DIRECTIONS
        return min(max(steps, _FEWEST_DIRECTIONS), len(directions))

    def _path(self, segment: Segment, directions: Directions) -> Path:
        return self._folder / f"{os.path.splitext(segment.file)[0]}-{directions.key}.arrow"

    def _read(self, path: Path, segment: Segment, directions: Directions) -> Shortcut | None:
        return read_shortcut(path, segment.rows, self.store.manifest.num_vectors, len(directions))

    def _forget_what_was_read(self) -> None:
        for name in ("directions", "measured"):
            self.__dict__.pop(name, None)


def _sweep(folder: Path, keep: set[Path]) -> None:
    """Deletes shortcuts that are not kept, and what killed runs left."""
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path not in keep:
            with contextlib.suppress(OSError):  # Windows: somebody has it mapped
                path.unlink()
