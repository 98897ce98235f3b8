"""CLIP, SigLIP, EVA and their like, through open_clip: one vector an image, and no rerank.

A name is `open_clip:MODEL/WEIGHTS`, the weights a tag that open_clip knows or a file, or
`open_clip:local-dir:FOLDER` and `open_clip:hf-hub:OWNER/NAME`, which bring their weights along.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..indexes.base import Float32
from .embedder import NO_TOKENS, EncodedImages, EncodesImages
from .errors import CheckpointError, DeviceMemoryError
from .fingerprint import fingerprint
from .names import OPEN_CLIP
from .preprocess import ImageLike, load_for

_WHOLE = ("local-dir:", "hf-hub:")  # open_clip's names of a model together with its weights


class _Transform:
    """open_clip's own evaluation transform, behind our image reader."""

    def __init__(self, compose: Any, side: int) -> None:
        self._compose = compose
        self.size = (side, side)

    def __call__(self, image: ImageLike) -> Float32:
        return self.to_pixels(load_for(image, self.size).image)

    def to_pixels(self, image: Image.Image) -> Float32:
        pixels: Float32 = self._compose(image).numpy()
        return pixels


class DualEncoder(nn.Module, EncodesImages):
    """An open_clip model as an `Embedder`, with Q = 1."""

    num_vectors = 1
    reranks = False

    def __init__(self, name: str) -> None:
        """Load a model, in float32 on the CPU.

        Args:
            name: see above; paths in it may be relative.

        Raises:
            CheckpointError: open_clip has no such model or weights, or they do not fit.
        """
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        super().__init__()
        architecture, weights = _split(name)
        try:
            self.clip: Any = _create(open_clip, architecture, weights)
            self._tokenizer = open_clip.get_tokenizer(architecture)
        except Exception as error:  # whatever open_clip and the formats that it reads raise
            raise CheckpointError(f"{name} cannot be loaded: {error}") from error
        settings = open_clip.get_model_preprocess_cfg(self.clip)
        side = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
        self.image_transform = _Transform(
            image_transform_v2(PreprocessCfg(**settings), is_train=False), side
        )
        self.preprocessing = {
            "image_size": side,
            "mean": list(settings["mean"]),
            "std": list(settings["std"]),
            "resize": f"{settings['resize_mode']}, {settings['interpolation']}",
        }
        self.name = OPEN_CLIP + architecture + (f"/{weights}" if weights else "")
        self.eval()
        self.embedding_size = self.encode_texts(["a photo"]).shape[1]
        self.fingerprint = fingerprint(repr(self.preprocessing), self.clip.state_dict())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        weight: Tensor = next(self.clip.parameters())
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type of number."""
        weight: Tensor = next(self.clip.parameters())
        return weight.dtype

    @property
    def encoder_fingerprint(self) -> str:
        """The model's: its encoder's one token is its vector."""
        return self.fingerprint

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the vectors of pixels (N, 3, S, S): (N, 1, E), each of length 1."""
        features: Tensor = self.clip.encode_image(pixels.to(self.device, self.dtype))
        return F.normalize(features.float(), dim=-1)[:, None]

    def features_from_encoder(self, tokens: Tensor) -> Tensor:
        """Return (N, 1, E), float32, each of length 1 again."""
        return F.normalize(tokens.to(self.device).float(), dim=-1)

    @torch.inference_mode()
    def encode(self, pixels: Float32, *, keep_tokens: bool = True) -> EncodedImages:
        """Return the vectors of pixels (N, 3, S, S): (N, 1, E); the encoder's one token is the vector.

        Raises:
            DeviceMemoryError: so many images do not fit into the GPU's memory.
        """
        try:
            features = self.encode_pixels(torch.from_numpy(pixels)).cpu().numpy()
        except torch.cuda.OutOfMemoryError as error:
            raise DeviceMemoryError.of(len(pixels), error) from None
        return EncodedImages(features if keep_tokens else NO_TOKENS, features)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Float32:
        """Return the vectors of captions: (B, E), float32, each of length 1.

        Captions go to open_clip's tokenizer as they are: no prompt is put in front.
        """
        found = []
        for start in range(0, len(texts), batch_size):
            tokens = self._tokenizer(list(texts[start : start + batch_size])).to(self.device)
            features = self.clip.encode_text(tokens)
            found.append(F.normalize(features.float(), dim=-1).cpu().numpy())
        return np.concatenate(found) if found else np.empty((0, self.embedding_size), np.float32)


def _split(name: str) -> tuple[str, str]:
    """Divide a name into model and weights; "" where the model brings its own.

    >>> _split("open_clip:ViT-L-14/openai"), _split("open_clip:ViT-B-32/runs/clip.pt")[1]
    (('ViT-L-14', 'openai'), 'runs/clip.pt')
    """
    rest = name.removeprefix(OPEN_CLIP)
    if rest.startswith(_WHOLE):
        scheme, place = rest.split(":", 1)
        return f"{scheme}:{os.path.abspath(place) if scheme == 'local-dir' else place}", ""
    architecture, _, weights = rest.partition("/")
    return architecture, os.path.abspath(weights) if os.path.isfile(weights) else weights


def _create(open_clip: Any, architecture: str, weights: str) -> Any:
    """Build the model with its weights, all of them, and with the activation they were trained with."""
    whole = architecture.startswith(_WHOLE)
    if not whole and not weights:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        known = f"one of {', '.join(tags)}" if tags else "see open_clip.list_pretrained()"
        raise CheckpointError(f"name its weights, as {OPEN_CLIP}{architecture}/WEIGHTS: {known}")
    tag = {} if whole else open_clip.get_pretrained_cfg(architecture, weights) or {}
    pixels = {} if whole or tag else _usual_pixels(open_clip, architecture)
    with warnings.catch_warnings():
        # Of the wrong activation open_clip only warns; the vectors would be quietly worse.
        warnings.filterwarnings("error", message="QuickGELU mismatch")
        return open_clip.create_model(
            architecture,
            pretrained=weights or None,
            force_quick_gelu=bool(tag.get("quick_gelu")),
            force_preprocess_cfg=pixels,
            require_pretrained=True,
        )


def _usual_pixels(open_clip: Any, architecture: str) -> dict[str, Any]:
    """Return what all published weights of a model want of pixels, for a file of weights.

    A file says nothing about it, and CLIP's values, open_clip's default, would be wrong for SigLIP.
    """
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    known = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    wanted = [
        {key: found[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in found}
        for found in known
    ]
    return wanted[0] if wanted and all(one == wanted[0] for one in wanted) else {}
