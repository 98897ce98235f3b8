"""A model on ONNX Runtime: what searching and indexing need of it, without PyTorch.

An exported model is a folder in our own checkpoint format with three graphs, which `onnx_export.py`
makes. They hold no weights, but point into `model.safetensors`:

    images.onnx   pixels (N, 3, S, S)                            -> tokens (N, P, D), features (N, Q, E)
    texts.onnx    token_ids (M, T), mask (M, T)                  -> features (M, E)
    match.onnx    image_tokens (N, P, D), token_ids (M, T),      -> ITM logits (B,)
                  mask (M, T), image_of (B,), text_of (B,)
    onnx.json     which model it is, and of which files it was made

All numbers are float32, or int64 and bool for the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..indexes.base import Float32
from .cache import cache_folder
from .embedder import NO_TOKENS, EncodedImages, EncodesImages
from .onnx_exports import DESCRIPTION
from .onnx_sessions import open_session
from .own_format import load_tokenizer, read_config, read_json
from .pairing import divide
from .preprocess import ImageTransform, TextTransform

# They have to start at once. The encoder gains more by what its own processor likes best.
_FOR_QUERIES = ("texts", "match")


class OnnxModel(EncodesImages):
    """An exported BLIP-2 retrieval model: a `Reranker` on the CPU."""

    reranks = True

    def __init__(self, folder: Path) -> None:
        """Read the description; graphs are loaded when they are first used.

        Raises:
            CheckpointError: something is missing or broken.
        """
        self._folder = folder
        self._config = read_config(folder)
        description = read_json(folder / DESCRIPTION)
        self.name = str(description["name"])
        self.fingerprint = str(description["fingerprint"])
        self.image_transform = ImageTransform(self._config.preprocess)
        self._session = cache(self._load)  # a graph's

    @property
    def num_vectors(self) -> int:
        """Q, vectors an image: one of each query token."""
        return self._config.qformer.num_queries

    @property
    def embedding_size(self) -> int:
        """E, numbers a vector."""
        return self._config.embedding_size

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images become pixels, in words and numbers that JSON can hold."""
        return self._config.preprocess.in_words

    def encode(self, pixels: Float32, *, keep_tokens: bool = True) -> EncodedImages:
        """Return the ITC features of pixels (N, 3, S, S), and the encoder's tokens, for `match`."""
        tokens, features = self._session("images").run(None, {"pixels": pixels})
        return EncodedImages(tokens if keep_tokens else NO_TOKENS, features)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Float32:
        """Return the ITC features of captions: (B, E), float32, each vector of length 1."""
        found = [np.empty((0, self.embedding_size), np.float32)]
        for start in range(0, len(texts), batch_size):
            inputs = self._text_transform(texts[start : start + batch_size])._asdict()
            found += self._session("texts").run(None, inputs)
        return np.concatenate(found)

    def match(
        self, image_tokens: npt.NDArray[Any], texts: Sequence[str], batch_size: int = 64
    ) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """Return the ITM logit "these match" of pairs: (B,), float32; see `Reranker.match`."""
        logits = [np.empty(0, np.float32)]
        for part in divide(len(image_tokens), texts, batch_size):
            inputs = {
                "image_tokens": image_tokens[part.images].astype(np.float32, copy=False),
                **self._text_transform(part.texts)._asdict(),
                "image_of": part.image_of,
                "text_of": part.text_of,
            }
            logits += self._session("match").run(None, inputs)
        return np.concatenate(logits)

    @cached_property
    def _text_transform(self) -> TextTransform:
        return load_tokenizer(self._folder, self._config)

    def _load(self, graph: str) -> Any:
        kept = (
            cache_folder() / "onnx-optimised" / self.fingerprint if graph in _FOR_QUERIES else None
        )
        return open_session(self._folder / f"{graph}.onnx", kept)
