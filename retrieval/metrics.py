"""Recall of image-text retrieval, as BLIP-2 counts it, and what else ranks tell.

TR (image -> text) is right when any of the image's captions is within the top k; IR (text -> image)
when the caption's image is. Percent. Ranks are 0-based.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating]
Ranks = npt.NDArray[np.int64]
Interval = tuple[float, float]

KS = (1, 5, 10)
RESAMPLES = 1000


def text_ranks(scores: Scores, text_to_image: Ranks) -> Ranks:
    """Return, for each image, the 0-based rank of its best caption.

    Args:
        scores: (N images, B texts); higher is better. Ties count against us.
        text_to_image: (B,), the image of each text; every image has at least one.
    """
    best = np.full(len(scores), -np.inf)
    np.maximum.at(best, text_to_image, scores[text_to_image, np.arange(scores.shape[1])])
    own = text_to_image[None, :] == np.arange(len(scores))[:, None]
    ranks: Ranks = ((scores >= best[:, None]) & ~own).sum(axis=1)
    return ranks


def image_ranks(scores: Scores, text_to_image: Ranks) -> Ranks:
    """Return, for each text, the 0-based rank of its image; arguments as in `text_ranks`."""
    own = scores[text_to_image, np.arange(scores.shape[1])]
    ranks: Ranks = (scores >= own[None, :]).sum(axis=0) - 1
    return ranks


def recall(ranks: Ranks, k: int) -> float:
    """Return the percentage of ranks within the top k."""
    return float(100 * np.mean(ranks < k))


def recall_table(scores: Scores, text_to_image: Ranks, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return {"tr@1": ..., "ir@10": ...}, percent; arguments as in `text_ranks`."""
    tr, ir = text_ranks(scores, text_to_image), image_ranks(scores, text_to_image)
    return {f"tr@{k}": recall(tr, k) for k in ks} | {f"ir@{k}": recall(ir, k) for k in ks}


def rank_statistics(ranks: Mapping[str, Ranks]) -> dict[str, float]:
    """Return everything that a table of results shows.

    Args:
        ranks: by direction, "tr" (N,) and "ir" (B,), or one of them.

    Returns:
        recall "tr@1" ... "ir@10" and their means "tr_mean", "ir_mean" and "mean" (of both), percent;
        the median rank "tr_median_rank", "ir_median_rank", counted from 1; and the mean reciprocal
        rank "tr_mrr", "ir_mrr", in [0, 1].
    """
    table = {f"{name}@{k}": recall(found, k) for name, found in ranks.items() for k in KS}
    for name, found in ranks.items():
        table[f"{name}_mean"] = float(np.mean([table[f"{name}@{k}"] for k in KS]))
        table[f"{name}_median_rank"] = float(np.median(found)) + 1
        table[f"{name}_mrr"] = float(np.mean(1 / (found + 1)))
    if len(ranks) == 2:
        table["mean"] = (table["tr_mean"] + table["ir_mean"]) / 2
    return table


def bootstrap_intervals(
    ranks: Mapping[str, Ranks],
    text_to_image: Ranks,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return the 95 % interval of every recall, by the percentile bootstrap.

    Images are drawn with replacement, each with all its captions: captions of one image are not
    independent, and drawing them singly would make the interval of IR too narrow. The gallery stays.

    Args:
        ranks: by direction, "tr" (N,) and "ir" (B,), or one of them.
        text_to_image: (B,), the image of each text.
        resamples: how often to draw.
        seed: of the draws.
    """
    images = int(text_to_image.max()) + 1
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(images, np.full(images, 1 / images), size=resamples)
    captions = np.bincount(text_to_image, minlength=images)
    intervals = {}
    for name, found in ranks.items():
        for k in KS:
            if name == "tr":
                shares = weights @ (found < k) / images
            else:
                hits = np.bincount(text_to_image, weights=found < k, minlength=images)
                shares = weights @ hits / (weights @ captions)
            low, high = np.percentile(100 * shares, [2.5, 97.5])
            intervals[f"{name}@{k}"] = (float(low), float(high))
    return intervals
