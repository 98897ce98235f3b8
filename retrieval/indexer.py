"""From folders of photographs to rows of the store: scan, compare, decode in parallel, encode.

What is done is committed every few hundred images, so a killed run loses little and the next one
goes on from there.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..indexes.files import HASH_BYTES
from ..indexes.store import ImageRecord, Store
from .errors import ImageReadError
from .model import RetrievalModel
from .preprocess import ImageTransform, load_image

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
)
COMMIT_IMAGES = 512  # images between two commits ...
COMMIT_SECONDS = 20.0  # ... or seconds, whichever comes first

OnProgress = Callable[[int, int], None]  # (files done, files to do)


class SkippedFile(NamedTuple):
    """A file or folder that could not be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What a run of the indexer did, in images."""

    added: int
    updated: int
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


def make_plan(paths: Sequence[str | Path], records: Iterable[ImageRecord]) -> Plan:
    """Compare files and folders with what the index holds.

    A record counts as vanished when its file lay under one of `paths` and is there no more; what
    was indexed from elsewhere is left alone.

    Raises:
        ImageReadError: one of `paths` does not exist and the index knows nothing below it.
    """
    plan = Plan()
    known = {record.path: record for record in records}
    roots = [os.path.abspath(path) for path in paths]
    found = _scan(roots, plan.skipped)
    for root in roots:
        if not os.path.lexists(root) and not any(_is_under(path, [root]) for path in known):
            raise ImageReadError("no such file or folder", root)
    for path in found:
        record = known.get(path)
        if record is None:
            plan.new.append(path)
        elif _differs(path, record):
            plan.changed.append(path)
        else:
            plan.unchanged += 1
    present = set(found)
    plan.vanished = [path for path in known if path not in present and _is_gone(path, roots)]
    return plan


def _scan(roots: Sequence[str], skipped: list[SkippedFile]) -> list[str]:
    def complain(error: OSError) -> None:
        skipped.append(SkippedFile(str(error.filename), error.strerror or str(error)))

    found: dict[str, None] = {}  # a set that keeps the order
    for root in roots:
        if os.path.isfile(root):
            found[root] = None
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


def _is_gone(path: str, roots: Sequence[str]) -> bool:
    return _is_under(path, roots) and not os.path.exists(path)


def _is_under(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(os.path.join(root, "")) for root in roots)


class _Decoded(NamedTuple):
    record: ImageRecord
    pixels: Tensor  # (3, S, S)


def _decode(path: str, transform: ImageTransform) -> _Decoded | SkippedFile:
    try:
        stat = os.stat(path)
        data = Path(path).read_bytes()  # once, for the hash and the decoder
        image = load_image(io.BytesIO(data))
    except ImageReadError as error:
        return SkippedFile(path, error.reason)
    except OSError as error:
        return SkippedFile(path, error.strerror or str(error))
    record = ImageRecord(
        path=path,
        size=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
        content_hash=hashlib.blake2b(data, digest_size=HASH_BYTES).hexdigest(),
        width=image.width,
        height=image.height,
    )
    return _Decoded(record, transform(image))


def _decode_ahead(
    paths: Sequence[str], transform: ImageTransform, workers: int, ahead: int
) -> Generator[_Decoded | SkippedFile, None, None]:
    """Decode in threads (Pillow releases the interpreter lock), `ahead` files at most in memory."""
    with ThreadPoolExecutor(workers) as pool:
        rest = iter(paths)
        queue: deque[Future[_Decoded | SkippedFile]] = deque()
        try:
            for path in islice(rest, ahead):
                queue.append(pool.submit(_decode, path, transform))
            while queue:
                done = queue.popleft()
                queue.extend(pool.submit(_decode, path, transform) for path in islice(rest, 1))
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


class Indexer:
    """Carries out a plan on a store that is open for writing."""

    def __init__(self, store: Store, plan: Plan, on_progress: OnProgress | None) -> None:
        """Take the store inside `with store.writing()`."""
        self.store = store
        self.plan = plan
        self.on_progress = on_progress
        self.added = self.updated = 0
        self._old = set(plan.changed)
        self._records: list[ImageRecord] = []
        self._features: list[np.ndarray[tuple[int, ...], np.dtype[np.float16]]] = []
        self._stale: list[str] = []
        self._last_commit = time.monotonic()

    def run(self, model: RetrievalModel | None, batch_size: int, workers: int) -> bool:
        """Do everything; return False if Ctrl-C stopped it. What was encoded is kept either way.

        Args:
            model: may be None when nothing has to be encoded.
            batch_size: images a pass of the encoder.
            workers: decoding threads.
        """
        self.store.remove(self.plan.vanished)
        todo = self.plan.new + self.plan.changed
        if model is None or not todo:
            return True
        try:
            self._encode_all(model, todo, batch_size, workers)
        except KeyboardInterrupt:
            return False
        finally:
            self._commit()
        return True

    def _encode_all(
        self, model: RetrievalModel, todo: Sequence[str], batch_size: int, workers: int
    ) -> None:
        batch: list[_Decoded] = []
        stream = _decode_ahead(todo, model.image_transform, workers, batch_size + 2 * workers)
        with closing(stream):
            for done, item in enumerate(stream, start=1):
                if isinstance(item, SkippedFile):
                    self._skip(item)
                else:
                    batch.append(item)
                if len(batch) == batch_size or (done == len(todo) and batch):
                    self._encode(model, batch)
                    batch = []
                if self.on_progress is not None:
                    self.on_progress(done - len(batch), len(todo))

    def _skip(self, file: SkippedFile) -> None:
        self.plan.skipped.append(file)
        if file.path in self._old:
            self._stale.append(file.path)  # what the index knew of it is true no more

    @torch.inference_mode()
    def _encode(self, model: RetrievalModel, batch: Sequence[_Decoded]) -> None:
        tokens = model.tokens_from_pixels(torch.stack([item.pixels for item in batch]))
        features = model.query_pass(tokens).image_features
        self._features.append(features.to("cpu", torch.float16).numpy())
        self._records.extend(item.record for item in batch)
        late = time.monotonic() - self._last_commit > COMMIT_SECONDS
        if late or len(self._records) >= COMMIT_IMAGES:
            self._commit()

    def _commit(self) -> None:
        replaced = [record.path for record in self._records if record.path in self._old]
        self.store.remove(replaced + self._stale)
        if self._records:
            self.store.append(self._records, np.concatenate(self._features))
        self.updated += len(replaced)
        self.added += len(self._records) - len(replaced)
        self._records, self._features, self._stale = [], [], []
        self._last_commit = time.monotonic()
