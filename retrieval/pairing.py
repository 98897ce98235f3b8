"""Pairs of images and texts, divided into passes of the ITM head in which nothing is computed twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..indexes.base import Int64


class Pass(NamedTuple):
    """B pairs of some images and M texts."""

    images: slice  # which of all images
    image_of: Int64  # (B,), the place of each pair's image among them
    texts: list[str]  # M, each once
    text_of: Int64  # (B,), the place of each pair's text among them


def divide(num_images: int, texts: Sequence[str], batch_size: int) -> Iterator[Pass]:
    """Divide pairs into passes of at most `batch_size`.

    >>> for part in divide(3, ["a", "b", "b"], batch_size=2):
    ...     print(part.images, part.image_of, part.texts, part.text_of)
    slice(0, 2, None) [0 1] ['a', 'b'] [0 1]
    slice(2, 3, None) [0] ['b'] [0]

    Args:
        num_images: one of each text, in their order, or one of all.
        texts: the texts.
        batch_size: pairs a pass.

    Raises:
        ValueError: the two are not equally many.
    """
    if num_images not in (1, len(texts)):
        raise ValueError(f"{num_images} images cannot pair with {len(texts)} texts")
    for start in range(0, len(texts), batch_size):
        asked = texts[start : start + batch_size]
        places = {text: place for place, text in enumerate(dict.fromkeys(asked))}
        yield Pass(
            slice(start, start + len(asked)) if num_images > 1 else slice(0, 1),
            np.arange(len(asked), dtype=np.int64)
            if num_images > 1
            else np.zeros(len(asked), np.int64),
            list(places),
            np.array([places[text] for text in asked], np.int64),
        )
