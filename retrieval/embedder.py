"""What the index, the engine and the evaluation need of a model: images and texts to vectors.

BLIP-2's retrieval model gives 32 vectors an image, a dual encoder such as CLIP gives one; whoever
takes an `Embedder` asks it how many. Only a `Reranker` has an ITM head.

Images go through in two steps, the encoder, whose tokens can be kept (`feature_cache.py`), and what
makes vectors of the tokens. Searching and indexing know numpy arrays only, so that a model may run
without PyTorch (`onnx_model.py`); what training and evaluation ask for besides is a `TensorEmbedder`.

N images, Q vectors an image, E numbers a vector, P image tokens, D numbers a token, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..indexes.base import Float32, Int64
from .errors import CheckpointError
from .pairing import divide
from .preprocess import ImageLike, TextTransform, TokenisedTexts

if TYPE_CHECKING:
    import torch
    from torch import Tensor


NO_TOKENS = np.empty((0, 0, 0), np.float32)


class EncodedImages(NamedTuple):
    """What a model makes of images."""

    tokens: npt.NDArray[Any]  # (N, P, D), the encoder's, any float type; `NO_TOKENS` if not kept
    features: Float32  # (N, Q, E), each vector of length 1


class PixelTransform(Protocol):
    """From an image to what a model's encoder takes."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, S and S."""

    def __call__(self, image: ImageLike) -> Float32:
        """Return pixels (3, S, S).

        Raises:
            ImageReadError: see `preprocess.load_image`.
        """

    def to_pixels(self, image: Image.Image) -> Float32:
        """Return pixels (3, S, S) of an upright RGB image."""


class Embedder(Protocol):
    """A model that gives Q vectors an image and one a text, all of length 1."""

    @property
    def reranks(self) -> bool:
        """Whether it is a `Reranker`."""

    @property
    def name(self) -> str:
        """What to load again, such as "mini"."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell this model's vectors from another's."""

    @property
    def num_vectors(self) -> int:
        """Q, vectors an image."""

    @property
    def embedding_size(self) -> int:
        """E, numbers a vector."""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images become pixels, in words and numbers that JSON can hold."""

    @property
    def image_transform(self) -> PixelTransform:
        """From images to pixels."""

    def encode(self, pixels: Float32, *, keep_tokens: bool = True) -> EncodedImages:
        """Return the vectors of pixels (N, 3, S, S), and the encoder's tokens where they are kept.

        Raises:
            DeviceMemoryError: so many images do not fit into the GPU's memory.
        """

    def encode_images(self, images: Sequence[ImageLike], batch_size: int = ...) -> Float32:
        """Return the vectors of images: (N, Q, E).

        Raises:
            ImageReadError: an image cannot be decoded.
        """

    def encode_texts(self, texts: Sequence[str], batch_size: int = ...) -> Float32:
        """Return the vectors of captions: (B, E)."""


class Reranker(Embedder, Protocol):
    """An embedder with an ITM head."""

    @property
    def pairs_at_once(self) -> int:
        """Pairs in a pass, where there are many."""

    @property
    def text_transform(self) -> TextTransform:
        """From captions to tokens."""

    def match_pass(
        self,
        image_tokens: npt.NDArray[Any] | Tensor,
        text: TokenisedTexts,
        image_of: Int64 | None = None,
        text_of: Int64 | None = None,
    ) -> Float32:
        """Return the ITM logit "these match" of pairs: (B,), in one pass; raw, no softmax.

        Args:
            image_tokens: (B, P, D), of `encode`; with `image_of` (N, P, D).
            text: B captions; with `text_of` M.
            image_of: (B,), which of N images each pair has.
            text_of: (B,), which of M captions.
        """

    def match(
        self,
        image_tokens: npt.NDArray[Any] | Tensor,
        texts: Sequence[str],
        batch_size: int = ...,
    ) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """Return the ITM logit "these match" of pairs: (B,); raw, no softmax.

        Args:
            image_tokens: (B, P, D), of `encode`; (1, P, D) pairs one image with all texts.
            texts: B captions; the i-th is scored against the i-th image.
            batch_size: pairs a pass.

        Raises:
            ValueError: the two are not equally many.
        """


class TensorEmbedder(Embedder, Protocol):
    """An embedder whose two steps can be taken apart, with PyTorch's tensors in between."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type of number."""

    @property
    def encoder_fingerprint(self) -> str:
        """16 hex digits that tell this encoder's tokens from another's."""

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the encoder's tokens of pixels (N, 3, S, S): (N, P, D), on the model's device."""

    def features_from_encoder(self, tokens: Tensor) -> Tensor:
        """Return the vectors of the encoder's tokens (N, P, D): (N, Q, E), float32."""


class EncodesImages:
    """What every embedder makes of `image_transform` and `encode`."""

    def encode_images(self: Embedder, images: Sequence[ImageLike], batch_size: int = 32) -> Float32:
        """Return the vectors of images: (N, Q, E), float32, each of length 1.

        Args:
            images: paths or PIL images.
            batch_size: images a pass.

        Raises:
            ImageReadError: an image cannot be decoded.
        """
        found = [np.empty((0, self.num_vectors, self.embedding_size), np.float32)]
        for start in range(0, len(images), batch_size):
            pixels = [self.image_transform(image) for image in images[start : start + batch_size]]
            found.append(self.encode(np.stack(pixels), keep_tokens=False).features)
        return np.concatenate(found)


class MatchesPairs:
    """What every reranker makes of `text_transform` and `match_pass`."""

    def match(
        self: Reranker,
        image_tokens: npt.NDArray[Any] | Tensor,
        texts: Sequence[str],
        batch_size: int = 64,
    ) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """Return the ITM logit "these match" of pairs: (B,), float32; see `Reranker.match`."""
        logits = [np.empty(0, np.float32)]
        one = len(image_tokens) == 1  # else each pair has an image of its own: nothing to look up
        for part in divide(len(image_tokens), texts, batch_size):
            text, image_of = self.text_transform(part.texts), part.image_of if one else None
            logits.append(self.match_pass(image_tokens[part.images], text, image_of, part.text_of))
        return np.concatenate(logits)


def as_reranker(model: Embedder) -> Reranker:
    """Return the model, if it can rerank.

    Raises:
        CheckpointError: it is a dual encoder, or was trained by ITC alone.
    """
    if not model.reranks:
        raise CheckpointError(f"{model.name} is a model without an ITM head: rerank 0")
    return cast(Reranker, model)
