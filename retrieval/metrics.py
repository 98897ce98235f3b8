"""Recall of image-text retrieval, as BLIP-2 counts it.

TR (image -> text) is right when any of the image's captions is within the top k; IR (text -> image)
when the caption's image is. Percent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating]


def text_ranks(scores: Scores, text_to_image: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return, for each image, the 0-based rank of its best caption.

    Args:
        scores: (N images, B texts); higher is better. Ties count against us.
        text_to_image: (B,), the image of each text; every image has at least one.
    """
    best = np.full(len(scores), -np.inf)
    np.maximum.at(best, text_to_image, scores[text_to_image, np.arange(scores.shape[1])])
    own = text_to_image[None, :] == np.arange(len(scores))[:, None]
    ranks: npt.NDArray[np.int64] = ((scores >= best[:, None]) & ~own).sum(axis=1)
    return ranks


def image_ranks(scores: Scores, text_to_image: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return, for each text, the 0-based rank of its image; arguments as in `text_ranks`."""
    own = scores[text_to_image, np.arange(scores.shape[1])]
    ranks: npt.NDArray[np.int64] = (scores >= own[None, :]).sum(axis=0) - 1
    return ranks


def recall(ranks: npt.NDArray[np.int64], k: int) -> float:
    """Return the percentage of ranks within the top k."""
    return float(100 * np.mean(ranks < k))


def recall_table(
    scores: Scores, text_to_image: npt.NDArray[np.int64], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Return {"tr@1": ..., "ir@10": ...}, percent; arguments as in `text_ranks`."""
    tr, ir = text_ranks(scores, text_to_image), image_ranks(scores, text_to_image)
    return {f"tr@{k}": recall(tr, k) for k in ks} | {f"ir@{k}": recall(ir, k) for k in ks}
