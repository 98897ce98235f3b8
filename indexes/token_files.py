"""Image tokens on disk, for a rerank without the encoder: a file an image, named by its content.

    tokens/MODEL/ab/ab12...    MODEL is the model's fingerprint, the name the photograph's content hash

A photograph that was moved or copied has them already. They are a convenience: where a file is missing
or damaged the photograph is encoded again. Little-endian: "B2T1", the kind (1 int8, 2 fp16), P and D,
the CRC-32 of the rest, all uint32; for int8 P scales, float32; P x D numbers.

P image tokens, D numbers a token.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import uuid
import zlib
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .base import Float32
from .files import TEMPORARY
from .manifest import RerankFeatures
from .ranking import to_float32

TOKENS = "tokens"
_HEADER = struct.Struct("<4sIIII")
_MAGIC = b"B2T1"
_INT8, _FP16 = 1, 2


class TokenFiles:
    """The tokens that an index keeps of its images, by one model."""

    def __init__(self, directory: Path, model_fingerprint: str) -> None:
        """Name the folder of an index; nothing is made before something is written."""
        self._root = directory / TOKENS
        self._folder = self._root / model_fingerprint

    def __contains__(self, content_hash: str) -> bool:
        """Tell whether there is a file, damaged or not."""
        return self._path(content_hash).exists()

    def write(self, content_hash: str, tokens: npt.NDArray[Any], kind: RerankFeatures) -> None:
        """Keep an image's tokens (P, D), any float type, as "int8" or "fp16".

        Of int8, each token has a scale of its own: its largest number becomes 127.

        Raises:
            OSError: the file cannot be written.
        """
        if kind == "int8":
            largest = np.abs(tokens).max(axis=1, initial=0).astype("<f4")
            scales = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype("<f4")
            content = scales.tobytes() + np.rint(tokens / scales[:, None]).astype(np.int8).tobytes()
        else:
            content = tokens.astype("<f2").tobytes()
        code = _INT8 if kind == "int8" else _FP16
        header = _HEADER.pack(_MAGIC, code, *tokens.shape, zlib.crc32(content))
        path = self._path(content_hash)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
        try:
            temporary.write_bytes(header + content)
            os.replace(temporary, path)  # not flushed: the checksum tells what a power cut has torn
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def read(self, content_hash: str) -> Float32 | None:
        """Return an image's tokens (P, D), float32; None where they are missing or damaged."""
        try:
            data = self._path(content_hash).read_bytes()
            magic, code, tokens, size, checksum = _HEADER.unpack_from(data)
        except (OSError, struct.error):
            return None
        content = memoryview(data)[_HEADER.size :]
        if magic != _MAGIC or zlib.crc32(content) != checksum:
            return None
        if code == _FP16:
            return to_float32(np.frombuffer(content, "<f2").reshape(tokens, size))
        scales = np.frombuffer(content, "<f4", tokens)
        numbers = np.frombuffer(content, np.int8, offset=scales.nbytes).reshape(tokens, size)
        tokens_found: Float32 = numbers * scales[:, None]
        return tokens_found

    def sweep(self, live: Container[str]) -> None:
        """Delete the tokens of all images but live ones, and those of other models."""
        for folder in self._root.iterdir() if self._root.exists() else ():
            if folder != self._folder:
                shutil.rmtree(folder, ignore_errors=True)
        for file in self._folder.glob("??/*"):
            if file.name not in live:
                with contextlib.suppress(OSError):
                    file.unlink()

    def _path(self, content_hash: str) -> Path:
        return self._folder / content_hash[:2] / content_hash
