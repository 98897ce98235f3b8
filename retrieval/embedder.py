"""What the index, the engine and the evaluation need of a model: images and texts to vectors.

BLIP-2's retrieval model gives 32 vectors an image, a dual encoder such as CLIP gives one; whoever
takes an `Embedder` asks it how many. Only a `RetrievalModel` can rerank.

Images go through in two steps, the encoder, whose tokens can be kept (`feature_cache.py`), and what
makes vectors of the tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..indexes.base import Float32
from .preprocess import ImageLike


class PixelTransform(Protocol):
    """From an image to what a model's encoder takes."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, S and S."""

    def __call__(self, image: ImageLike) -> Tensor:
        """Return pixels (3, S, S), float32.

        Raises:
            ImageReadError: see `preprocess.load_image`.
        """

    def to_pixels(self, image: Image.Image) -> Tensor:
        """Return pixels (3, S, S), float32, of an image that `load_image` gave."""


class Embedder(Protocol):
    """A model that gives Q vectors an image and one a text, all of length 1."""

    @property
    def name(self) -> str:
        """What to load again, such as "mini"."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type of number."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell this model's vectors from another's."""

    @property
    def encoder_fingerprint(self) -> str:
        """16 hex digits that tell this encoder's tokens from another's."""

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

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the encoder's tokens of pixels (N, 3, S, S): (N, P, D), on the model's device."""

    def features_from_encoder(self, tokens: Tensor) -> Tensor:
        """Return the vectors of the encoder's tokens (N, P, D): (N, Q, E), float32."""

    def encode_images(self, images: Sequence[ImageLike], batch_size: int = ...) -> Float32:
        """Return the vectors of images: (N, Q, E).

        Raises:
            ImageReadError: an image cannot be decoded.
        """

    def encode_texts(self, texts: Sequence[str], batch_size: int = ...) -> Float32:
        """Return the vectors of captions: (B, E)."""


def fingerprint(
    description: str, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> str:
    """Return 16 hex digits of a description and a sample of every tensor, rounded to a dtype.

    It is the same on every device that a model is moved to afterwards.
    """
    digest = hashlib.blake2b(description.encode(), digest_size=8)
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // 256)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(flat[::step].to(dtype).float().cpu().numpy().tobytes())
    return digest.hexdigest()
