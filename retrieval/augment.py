"""The random resized crop and flip of training (BLIP-2, appendix; fine-tuning keeps 0.5 to 1)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..indexes.base import Float32
from .embedder import PixelTransform
from .recipe import DataConfig

ASPECT = (3 / 4, 4 / 3)  # width / height of a crop
TRIES = 10


def _box(
    size: tuple[int, int], scale: tuple[float, float], generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """Draw a box as torchvision's RandomResizedCrop does: try ten times, then take the middle."""
    width, height = size
    for _ in range(TRIES):
        area = generator.uniform(*scale) * width * height
        aspect = np.exp(generator.uniform(*np.log(ASPECT)))
        w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = generator.uniform(0, width - w), generator.uniform(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, height * ASPECT[1]), min(height, width / ASPECT[0])
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def random_crop(
    image: Image.Image,
    size: tuple[int, int],
    generator: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    flip: bool = True,
) -> Image.Image:
    """Crop a random share of the area at a random aspect ratio, resize, perhaps flip.

    Args:
        image: RGB.
        size: (width, height) of the result, pixels.
        generator: where the randomness comes from.
        scale: the least and the largest share of the area.
        flip: mirror every other image, left to right.
    """
    box = _box(image.size, scale, generator)
    crop = image.resize(size, Image.Resampling.BICUBIC, box=box)
    mirrored = generator.random() < 0.5
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and mirrored else crop


def crop_to_pixels(
    image: Image.Image,
    transform: PixelTransform,
    config: DataConfig,
    generator: np.random.Generator,
) -> Float32:
    """Augment an image, if wanted, and return its pixels (3, S, S)."""
    if not config.augment:
        return transform.to_pixels(image)
    crop = random_crop(image, transform.size, generator, scale=config.crop_scale, flip=config.flip)
    return transform.to_pixels(crop)  # of this size already: only normalised
