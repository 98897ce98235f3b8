"""The random resized crop and flip of training (BLIP-2, appendix; fine-tuning keeps 0.5 to 1)."""

from __future__ import annotations

import numpy as np
from PIL import Image

ASPECT = (3 / 4, 4 / 3)


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
    share = generator.uniform(*scale)
    aspect = np.exp(generator.uniform(*np.log(ASPECT)))
    width = min(image.width, image.width * np.sqrt(share * aspect))
    height = min(image.height, image.height * np.sqrt(share / aspect))
    left = generator.uniform(0, image.width - width)
    top = generator.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    crop = image.resize(size, Image.Resampling.BICUBIC, box=box)
    mirrored = generator.random() < 0.5
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and mirrored else crop
