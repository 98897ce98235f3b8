"""From folders of photographs to rows of the store: scan, compare, decode in parallel, encode.

What is done is committed every few hundred images, so a killed run loses little and the next one
goes on from there.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePath
from stat import S_ISREG
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..indexes.base import Float32
from ..indexes.errors import StoreCorruptError
from ..indexes.files import HASH_BYTES, writing_to
from ..indexes.manifest import RerankFeatures
from ..indexes.store import ImageRecord, Store
from ..indexes.token_files import TokenFiles
from .embedder import Embedder, PixelTransform
from .errors import DeviceMemoryError, ImageReadError
from .preprocess import load_for
from .progress import OnProgress

log = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
)
COMMIT_IMAGES = 512  # images between two commits ...
COMMIT_COPIES = 8192  # ... of files whose features are known
KEPT_BYTES = 100_000  # of image tokens, in int8, that "auto" keeps of each image
TIDY_IMAGES = 8192  # images until small segments are merged, so that searches meanwhile are quick
COMMIT_SECONDS = 20.0  # ... or seconds, whichever comes first


class SkippedFile(NamedTuple):
    """A file or folder that could not be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What a run of the indexer did, in images."""

    added: int
    updated: int
    reused: int  # of the added and updated: moved, copied or touched; not encoded again
    unchanged: int
    removed: int
    skipped: tuple[SkippedFile, ...]
    total: int  # in the index now
    seconds: float
    interrupted: bool


@dataclass
class Plan:
    """What has to be done to make the index agree with the disk."""

    new: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: int = 0
    vanished: list[str] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)


def make_plan(
    paths: Sequence[str | Path],
    records: Iterable[ImageRecord],
    is_complete: Callable[[ImageRecord], bool] = lambda record: True,
) -> Plan:
    """Compare files and folders with what the index holds.

    A record counts as vanished when its file lay under one of `paths` and is there no more; what
    was indexed from elsewhere is left alone. What is not complete counts as changed.

    Raises:
        ImageReadError: one of `paths` does not exist and the index knows nothing below it.
    """
    plan = Plan()
    known = {record.path: record for record in records}
    roots = check_roots(paths, known)
    found = _scan(roots, plan.skipped)
    for path in found:
        record = known.get(path)
        if record is None:
            plan.new.append(path)
        elif _differs(path, record) or not is_complete(record):
            plan.changed.append(path)
        else:
            plan.unchanged += 1
    gone = (path for path in known.keys() - set(found) if _is_under(path, roots))
    plan.vanished = [path for path in gone if _is_gone(path)]
    return plan


def check_roots(paths: Sequence[str | Path], known: Iterable[str]) -> dict[str, None]:
    """Return the absolute paths of files and folders to index, each once, in their order.

    Raises:
        ImageReadError: one of them neither exists nor has anything of `known` below it.
    """
    if isinstance(paths, (str, Path)):
        raise TypeError("paths is a sequence of paths: write [path] for a single one")
    roots = {os.path.abspath(path): None for path in paths}
    for root in roots:
        if not os.path.lexists(root) and not any(_is_under(path, {root: None}) for path in known):
            raise ImageReadError("no such file or folder", root)
    return roots


def _scan(roots: Iterable[str], skipped: list[SkippedFile]) -> list[str]:
    def complain(error: OSError) -> None:
        skipped.append(SkippedFile(str(error.filename), error.strerror or str(error)))

    found: dict[str, None] = {}  # a set that keeps the order
    for root in roots:
        if not os.path.isdir(root):
            found[root] = None
            continue
        for folder, subfolders, names in os.walk(root, onerror=complain):
            subfolders.sort()
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() in EXTENSIONS:
                    found[os.path.join(folder, name)] = None
    return list(found)


def _differs(path: str, record: ImageRecord) -> bool:
    try:
        stat = os.stat(path)
    except OSError:
        return True  # decoding it will say why
    return (stat.st_size, stat.st_mtime_ns) != (record.size, record.mtime_ns)


def _is_gone(path: str) -> bool:
    """Tell a file that is there no more from one that cannot be reached at the moment."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _is_under(path: str, roots: Mapping[str, None]) -> bool:
    return path in roots or any(str(parent) in roots for parent in PurePath(path).parents)


class _Decoded(NamedTuple):
    record: ImageRecord
    pixels: Float32  # (3, S, S)


class _Known(NamedTuple):
    record: ImageRecord
    twin: str  # a path in the index whose content is the same


def _decode(
    path: str, transform: PixelTransform, known: Mapping[str, ImageRecord]
) -> _Decoded | _Known | SkippedFile:
    """Decode a file, unless its content is known: then its features are, too.

    Args:
        path: of the file.
        transform: from the image to pixels.
        known: the index's images by content hash.
    """
    try:
        stat = os.stat(path)
        if not S_ISREG(stat.st_mode):  # a pipe would be waited for, for ever
            return SkippedFile(path, "not a regular file")
        data = Path(path).read_bytes()  # once, for the hash and the decoder
        content_hash = hashlib.blake2b(data, digest_size=HASH_BYTES).hexdigest()
        if (twin := known.get(content_hash)) is not None:
            return _Known(replace(twin, path=path, mtime_ns=stat.st_mtime_ns), twin.path)
        image, width, height = load_for(io.BytesIO(data), transform.size)
    except ImageReadError as error:
        return SkippedFile(path, error.reason)
    except OSError as error:
        return SkippedFile(path, error.strerror or str(error))
    record = ImageRecord(
        path=path,
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        content_hash=content_hash,
        width=width,
        height=height,
    )
    return _Decoded(record, transform.to_pixels(image))


def _decode_ahead(
    paths: Sequence[str],
    transform: PixelTransform,
    known: Mapping[str, ImageRecord],
    workers: int,
    ahead: int,
) -> Generator[_Decoded | _Known | SkippedFile, None, None]:
    """Decode in threads (Pillow releases the interpreter lock), `ahead` files at most in memory."""
    with ThreadPoolExecutor(workers) as pool:
        rest = iter(paths)
        queue: deque[Future[_Decoded | _Known | SkippedFile]] = deque()
        try:
            for path in islice(rest, ahead):
                queue.append(pool.submit(_decode, path, transform, known))
            while queue:
                done = queue.popleft()
                queue.extend(
                    pool.submit(_decode, path, transform, known) for path in islice(rest, 1)
                )
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


class Indexer:
    """Carries out a plan on a store that is open for writing."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        on_progress: OnProgress | None,
        *,
        tidy: Callable[[], None],
    ) -> None:
        """Take the store inside `with store.writing()`; `tidy` is called once in a while."""
        self.store = store
        self._tidy = tidy
        self._since_tidy = 0  # images
        self.plan = plan
        self.on_progress = on_progress
        self._tokens = TokenFiles(store.directory, store.manifest.model_fingerprint)
        self.added = self.updated = self.reused = 0
        self._old = set(plan.changed)
        # Read before anything changes: a moved file's old path is on its way out.
        self._known = {
            record.content_hash: record for record in store.records if self._is_complete(record)
        }
        self._now = {record.path: record.content_hash for record in store.records}
        self._copies: list[_Known] = []
        self._reused = 0  # of the records that wait for a commit
        self.removed = 0
        self._records: list[ImageRecord] = []
        self._features: list[np.ndarray[tuple[int, ...], np.dtype[np.float16]]] = []
        self._stale: list[str] = []
        self._last_commit = time.monotonic()
        self._batch_size = 1  # images a pass; `run` is told

    def report(self, seconds: float, finished: bool) -> IndexReport:
        """Say what was done, in so many seconds; `finished` is what `run` returned."""
        return IndexReport(
            added=self.added,
            updated=self.updated,
            reused=self.reused,
            unchanged=self.plan.unchanged,
            removed=self.removed,
            skipped=tuple(self.plan.skipped),
            total=len(self.store),
            seconds=seconds,
            interrupted=not finished,
        )

    def run(self, model: Embedder | None, batch_size: int, workers: int) -> bool:
        """Do everything; return False if Ctrl-C stopped it. What was encoded is kept either way.

        Args:
            model: may be None when nothing has to be encoded.
            batch_size: images a pass of the encoder.
            workers: decoding threads.
        """
        todo = self.plan.new + self.plan.changed
        try:
            if model is not None and todo:
                self._batch_size = batch_size
                self._encode_all(model, todo, workers)
        except KeyboardInterrupt:
            return False
        finally:
            self._commit()
        # Last: files that were moved take their features along.
        self.removed = self.store.remove(self.plan.vanished)
        return True

    def _encode_all(self, model: Embedder, todo: Sequence[str], workers: int) -> None:
        batch: list[_Decoded] = []
        transform, ahead = model.image_transform, self._batch_size + 2 * workers
        stream = _decode_ahead(todo, transform, self._known, workers, ahead)
        with closing(stream):
            for done, item in enumerate(stream, start=1):
                if isinstance(item, _Known) and self._is_outdated(item):
                    item = _decode(item.record.path, transform, {})
                if isinstance(item, SkippedFile):
                    self._skip(item)
                elif isinstance(item, _Known):
                    self._copies.append(item)
                    self._commit_in_time()
                else:
                    batch.append(item)
                if len(batch) >= self._batch_size or (done == len(todo) and batch):
                    self._encode(model, batch)
                    batch = []
                if self.on_progress is not None:
                    self.on_progress(done - len(batch), len(todo))

    def _is_outdated(self, item: _Known) -> bool:
        """Tell whether this run has given the twin another content since."""
        twin = self._now.get(item.twin)
        return twin is None or twin != item.record.content_hash

    def _is_complete(self, record: ImageRecord) -> bool:
        return not self.store.settings.keeps_tokens or record.content_hash in self._tokens

    def _skip(self, file: SkippedFile) -> None:
        self.plan.skipped.append(file)
        if file.path in self._old:
            self._stale.append(file.path)  # what the index knew of it is true no more

    def _encode(self, model: Embedder, batch: Sequence[_Decoded]) -> None:
        """Encode images; where they do not fit into the GPU's memory together, half of them at once."""
        keep = self.store.settings.rerank_features != "none"
        encoded = None
        try:
            pixels = np.stack([item.pixels for item in batch])
            encoded = model.encode(pixels, keep_tokens=keep)
        except DeviceMemoryError as error:
            if len(batch) == 1:
                raise DeviceMemoryError(
                    "an image does not fit into the GPU's memory: try --device cpu; what was "
                    "encoded is kept"
                ) from error
            log.warning("%s: going on with half of them", error)
        if encoded is None:  # outside of `except`, which holds what the failed attempt did
            half = self._batch_size = len(batch) // 2
            self._encode(model, batch[:half])
            self._encode(model, batch[half:])
            return
        if keep:
            self._keep_tokens(model, batch, encoded.tokens)
        self._features.append(encoded.features.astype(np.float16))
        self._records.extend(item.record for item in batch)
        self._commit_in_time()

    def _keep_tokens(
        self, model: Embedder, batch: Sequence[_Decoded], tokens: npt.NDArray[Any]
    ) -> None:
        if self.store.settings.rerank_features == "auto":
            few = model.reranks and tokens[0].size <= KEPT_BYTES
            # An index that has images without them would have to encode those again.
            kind: RerankFeatures = "int8" if few and not len(self.store) else "none"
            self.store.change_settings(replace(self.store.settings, rerank_features=kind))
        kind = self.store.settings.rerank_features
        if kind == "none":
            return
        with writing_to(self.store.directory):
            for item, image in zip(batch, tokens, strict=True):
                self._tokens.write(item.record.content_hash, image, kind)

    def _commit_in_time(self) -> None:
        late = time.monotonic() - self._last_commit > COMMIT_SECONDS
        # Copies cost little to make again, and reading a segment for few of them much.
        if (
            (self._records and late)
            or len(self._records) >= COMMIT_IMAGES
            or len(self._copies) >= COMMIT_COPIES
        ):
            self._since_tidy += len(self._records) + len(self._copies)
            self._commit()
            if self._since_tidy >= TIDY_IMAGES:
                self._tidy()
                self._since_tidy = 0

    def _commit(self) -> None:
        if self._copies:
            # Once, before their twins are removed: an interrupt may lead here a second time.
            copies, self._copies = self._copies, []
            try:
                copied = self.store.features_of([copy.twin for copy in copies])
            except StoreCorruptError:
                self._commit()  # what was encoded is kept
                raise
            self._features.append(copied)
            self._records += [copy.record for copy in copies]
            self._reused += len(copies)
        records, features = self._records, self._features
        paths = [record.path for record in records]
        # New paths too: Ctrl-C may have come between an append's commit and here.
        self.store.remove(paths + self._stale)
        if records:
            self.store.append(records, np.concatenate(features))
        replaced = sum(path in self._old for path in paths)
        self.updated += replaced
        self.added += len(records) - replaced
        self.reused += self._reused
        for record in records:
            self._now[record.path] = record.content_hash
        for path in self._stale:
            self._now.pop(path, None)
        self._records, self._features, self._stale, self._reused = [], [], [], 0
        self._last_commit = time.monotonic()
