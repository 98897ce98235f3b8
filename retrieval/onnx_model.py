"""A model on ONNX Runtime: what searching and indexing need of it, without PyTorch.

An exported model is a folder in our own checkpoint format with its graphs, which `onnx_export.py`
makes. They hold no weights, but point into `model.safetensors`:

    encoder.onnx  pixels (N, 3, S, S)                            -> tokens (N, P, D)
    queries.onnx  image_tokens (N, P, D)                         -> features (N, Q, E)
    texts.onnx    token_ids (M, T), mask (M, T)                  -> features (M, E)
    match.onnx    image_tokens (N, P, D), token_ids (M, T),      -> ITM logits (B,)
                  mask (M, T), image_of (B,), text_of (B,)      (where there is an ITM head)
    onnx.json     which model it is, and of which files it was made

All numbers are float32, or int64 and bool for the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..indexes.base import Float32, Int64
from .cache import cache_folder
from .embedder import NO_TOKENS, EncodedImages, EncodesImages, MatchesPairs, as_reranker
from .onnx_exports import DESCRIPTION
from .onnx_sessions import open_session
from .own_format import load_tokenizer, read_config, read_json
from .preprocess import ImageTransform, TextTransform, TokenisedTexts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# They have to start at once. The encoder gains more by what its own processor likes best.
_MAPPED = ("texts", "match")


class OnnxModel(EncodesImages, MatchesPairs):
    """An exported BLIP-2 retrieval model on the CPU: a `Reranker`, if it has an ITM head."""

    pairs_at_once = 64

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
    def reranks(self) -> bool:
        """Whether there is an ITM head: `match` needs it."""
        return self._config.itm_head

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
        (tokens,) = self._session("encoder").run(None, {"pixels": pixels})
        (features,) = self._session("queries").run(None, {"image_tokens": tokens})
        return EncodedImages(tokens if keep_tokens else NO_TOKENS, features)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Float32:
        """Return the ITC features of captions: (B, E), float32, each vector of length 1."""
        found = [np.empty((0, self.embedding_size), np.float32)]
        for start in range(0, len(texts), batch_size):
            inputs = self.text_transform(texts[start : start + batch_size])._asdict()
            found += self._session("texts").run(None, inputs)
        return np.concatenate(found)

    def match_pass(
        self,
        image_tokens: npt.NDArray[Any] | Tensor,
        text: TokenisedTexts,
        image_of: Int64 | None = None,
        text_of: Int64 | None = None,
    ) -> Float32:
        """Return the ITM logit "these match" of pairs: (B,), float32; see `Reranker.match_pass`."""
        as_reranker(self)
        each = np.arange(len(image_tokens if image_of is None else image_of), dtype=np.int64)
        inputs = {
            "image_tokens": np.asarray(image_tokens, np.float32),
            **text._asdict(),
            "image_of": each if image_of is None else image_of,
            "text_of": each if text_of is None else text_of,
        }
        (logits,) = self._session("match").run(None, inputs)
        return logits  # type: ignore[no-any-return]

    # ---- for the evaluation, which takes the encoder and the queries apart --------------------------

    @property
    def device(self) -> torch.device:
        """The CPU."""
        import torch

        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type of number in which everything is computed, float32."""
        import torch

        return torch.float32

    @property
    def encoder_fingerprint(self) -> str:
        """The model's, and that its tokens differ from PyTorch's in the last digits."""
        return f"{self.fingerprint} onnx"

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the encoder's tokens of pixels (N, 3, S, S): (N, P, D)."""
        return self._of_tensor("encoder", "pixels", pixels)

    def features_from_encoder(self, tokens: Tensor) -> Tensor:
        """Return the vectors of the encoder's tokens (N, P, D): (N, Q, E), float32."""
        return self._of_tensor("queries", "image_tokens", tokens)

    def _of_tensor(self, graph: str, name: str, values: Tensor) -> Tensor:
        import torch

        return torch.from_numpy(self._session(graph).run(None, {name: values.float().numpy()})[0])

    @cached_property
    def text_transform(self) -> TextTransform:
        """From captions to tokens."""
        return load_tokenizer(self._folder, self._config)

    def _load(self, graph: str) -> Any:
        kept = cache_folder() / "onnx-optimised" / self.fingerprint if graph in _MAPPED else None
        return open_session(self._folder / f"{graph}.onnx", kept)
