"""A frozen encoder's tokens, computed once: an epoch then costs the Q-Former only.

Augmentation is drawn beforehand: view 0 of an image is the squashed image of evaluation, the others
are random resized crops, flipped half of the time. On disk the cache is one fp16 array
(images, views, P, D), memory-mapped, beside the key of what it was made of.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .model import Precision, RetrievalModel, autocast
from .preprocess import load_image

CROP_SCALE = (0.5, 1.0)  # share of the area that a crop keeps (method of the fine-tuning stage)


def encoder_tokens(
    model: RetrievalModel,
    paths: Sequence[Path],
    directory: Path,
    *,
    views: int = 1,
    seed: int = 0,
    precision: Precision = "fp32",
) -> np.ndarray[tuple[int, int, int, int], np.dtype[np.float16]]:
    """Return the encoder's tokens of images, from the cache or computed into it.

    Args:
        model: its encoder is frozen; tokens are taken before `ln_vision`.
        paths: N image files.
        directory: where caches live; made if need be.
        views: V views an image; the first is the image itself.
        seed: of the crops.
        precision: of the encoder's arithmetic; bf16 is several times faster where the processor has
            it and moves the tokens by a few percent, which training takes for augmentation.

    Returns:
        (N, V, P, D), float16, memory-mapped and read-only.

    Raises:
        ImageReadError: an image cannot be decoded.
        ValueError: the tokens overflow float16.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{_cache_key(model, paths, f'{views} {seed} {precision}')}.npy"
    if not file.exists():
        partial = file.with_suffix(".partial")
        with autocast(model, precision):
            _fill(model, paths, partial, views, seed)
        os.replace(partial, file)
    cache: np.ndarray[tuple[int, int, int, int], np.dtype[np.float16]] = np.load(
        file, mmap_mode="r"
    )
    return cache


def _cache_key(model: RetrievalModel, paths: Sequence[Path], settings: str) -> str:
    digest = hashlib.blake2b(f"{settings} {model.config.preprocess}".encode(), digest_size=12)
    digest.update(repr(model.config.encoder).encode())
    for name, tensor in sorted(model.image_encoder.state_dict().items()):
        # In half precision, so that a checkpoint stored in it finds the same cache.
        digest.update(name.encode() + tensor.flatten()[:64].half().cpu().numpy().tobytes())
    for path in paths:
        digest.update(f"{path}\0{path.stat().st_size}\0".encode())
    return digest.hexdigest()


@torch.inference_mode()
def _fill(model: RetrievalModel, paths: Sequence[Path], file: Path, views: int, seed: int) -> None:
    from rich.progress import track

    array: Any = None
    done = 0
    batches = list(_batches(len(paths), max(1, 32 // views)))
    with ThreadPoolExecutor(2) as pool:
        for rows in track(batches, description="encoding images", transient=True):
            pixels = pool.map(lambda i: _views(model, paths[i], views, seed + i), rows)
            tokens = model.image_encoder(torch.cat(list(pixels)).to(model.device, model.dtype))
            if array is None:
                shape = (len(paths), views, *tokens.shape[1:])
                array = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
            tokens = tokens.unflatten(0, (-1, views)).to("cpu", torch.float16)
            if not tokens.isfinite().all():
                raise ValueError("the encoder's tokens do not fit into float16")
            array[done : done + len(tokens)] = tokens.numpy()
            done += len(tokens)
    array.flush()


def _views(model: RetrievalModel, path: Path, views: int, seed: int) -> Tensor:
    image = load_image(path)
    transform = model.image_transform
    generator = np.random.default_rng(seed)
    crops = [_random_crop(image, transform.size, generator) for _ in range(views - 1)]
    return torch.stack([transform.squash(image), *map(transform.normalise, crops)])


def _random_crop(
    image: Image.Image, size: tuple[int, int], generator: np.random.Generator
) -> Image.Image:
    """Crop a random share of the area at a random aspect ratio, resize, and flip every other one."""
    share = generator.uniform(*CROP_SCALE)
    aspect = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
    width = min(image.width, image.width * np.sqrt(share * aspect))
    height = min(image.height, image.height * np.sqrt(share / aspect))
    left = generator.uniform(0, image.width - width)
    top = generator.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    crop = image.resize(size, Image.Resampling.BICUBIC, box=box)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else crop


def _batches(total: int, size: int) -> Iterator[range]:
    for start in range(0, total, size):
        yield range(start, min(start + size, total))
