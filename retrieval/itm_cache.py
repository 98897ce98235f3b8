"""ITM logits on disk: a killed evaluation goes on, and a deeper rerank costs only the new pairs."""

from __future__ import annotations

import hashlib
import io
import logging
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from ..indexes.base import Float32, Int64
from ..indexes.files import replace_file
from .embedder import TensorEmbedder

log = logging.getLogger(__name__)
_SECONDS_A_FILE = 30.0  # what a kill may lose


class ItmCache:
    """Logits of pairs of images and captions that were scored before; a context manager.

    A folder of files, each there whole or not at all: pairs, their logits, and the seconds that they
    took.
    """

    def __init__(self, folder: Path) -> None:
        """Read what is in a folder, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._new: list[tuple[Int64, Float32, float]] = []
        self._written = time.monotonic()
        self.pairs, self.seconds = 0, 0.0  # that were scored, now and before
        ids, logits = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for file in sorted(folder.glob("*.npz")):
            try:
                with open(file, "rb") as stream, np.load(stream) as saved:
                    part = saved["ids"], saved["logits"], float(saved["seconds"])
            except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                log.warning("%s is damaged (%s): its pairs are scored again", file, error)
                continue
            ids.append(part[0])
            logits.append(part[1])
            self.seconds += part[2]
        self._ids, first = np.unique(np.concatenate(ids), return_index=True)
        self._logits: Float32 = np.concatenate(logits)[first]
        self.pairs = sum(map(len, ids))

    def __enter__(self) -> ItmCache:
        """Give the cache itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Write what is new, after an interrupt too."""
        self._write()

    def known(self, images: Int64, texts: Int64) -> Float32:
        """Return the logits (M,) of pairs; NaN for one that was not scored yet."""
        ids = _ids(images, texts)
        places = np.searchsorted(self._ids, ids)
        found = np.full(len(ids), np.nan, np.float32)
        hit = places < len(self._ids)
        hit[hit] = self._ids[places[hit]] == ids[hit]
        found[hit] = self._logits[places[hit]]
        return found

    def add(self, images: Int64, texts: Int64, logits: Float32, seconds: float) -> None:
        """Keep the logits (M,) of pairs that took so many seconds."""
        self._new.append((_ids(images, texts), logits, seconds))
        self.pairs += len(logits)
        self.seconds += seconds
        if time.monotonic() - self._written > _SECONDS_A_FILE:
            self._write()

    def _write(self) -> None:
        if not self._new:
            return
        ids, logits, seconds = zip(*self._new, strict=True)
        content = io.BytesIO()
        np.savez(
            content, ids=np.concatenate(ids), logits=np.concatenate(logits), seconds=sum(seconds)
        )
        replace_file(self._folder / f"{uuid.uuid4().hex}.npz", content.getvalue())
        self._new, self._written = [], time.monotonic()


def itm_cache_name(model: TensorEmbedder, captions: Sequence[str], settings: str) -> str:
    """Return the name of the folder for these captions: logits hang on the whole model."""
    digest = hashlib.blake2b(f"{settings} {model.fingerprint}".encode(), digest_size=12)
    for caption in captions:
        digest.update(f"\0{caption}".encode())
    return f"itm-{digest.hexdigest()}"


def _ids(images: Int64, texts: Int64) -> Int64:
    return images << 32 | texts
