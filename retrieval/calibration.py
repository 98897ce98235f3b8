"""The scale of a small model's ITM head.

The published score adds a raw ITM logit to a cosine: how much each counts depends on how large the
logits have grown. In a model trained on few images they outgrow what they know. Scaling the head
changes neither head's own ranking, only the weight of ITM in the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .data import CaptionedImage, captions_and_owners
from .embedder import as_reranker
from .feature_cache import cached_features, plain_tokens
from .metrics import recall
from .model import Precision, RetrievalModel, autocast, itc_similarities
from .reranking import DIRECTIONS, Direction, match_pairs, pairs_to_match, rank_by_itc

SCALES = (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)


@torch.no_grad()
def calibrate_itm(
    model: RetrievalModel,
    images: Sequence[CaptionedImage],
    *,
    rerank: int = 16,
    scales: Sequence[float] = SCALES,
    precision: Precision = "fp32",
) -> tuple[float, dict[float, float]]:
    """Scale the ITM head in place, so that ITM logit + ITC similarity ranks best.

    Best is what gains most R@1 over ITC alone in the direction, TR or IR, that gains less.

    Args:
        model: scaled; its fingerprint changes unless the scale is 1.
        images: to choose on, not those trained on.
        rerank: candidates a query.
        scales: to choose from.
        precision: of the rerank.

    Returns:
        the scale, and for each scale that lesser gain, in points of R@1.

    Raises:
        CheckpointError: the model has no ITM head.
    """
    as_reranker(model)  # before anything is encoded
    with plain_tokens(model, [image.path for image in images], None) as cache:
        captions, owner = captions_and_owners([images[row] for row in cache.rows])
        features = torch.from_numpy(cached_features(model, cache.images)).to(model.device)
        itc = itc_similarities(features, model.encode_texts(captions))
        rankings = rank_by_itc(itc, owner, rerank)
        pairs = pairs_to_match(rankings, len(captions))
        with autocast(model.device, precision):
            itm = match_pairs(model, cache.images, captions, pairs)

    def gain(direction: Direction, scale: float) -> float:
        ranking = rankings[direction]
        ranks = ranking.reranked(scale * itm[pairs.positions[direction]], rerank)
        return recall(ranks, 1) - recall(ranking.itc_ranks, 1)

    gains = {scale: min(gain(direction, scale) for direction in DIRECTIONS) for scale in scales}
    best = max(gains, key=gains.__getitem__)
    assert model.itm_head is not None
    model.itm_head.weight.mul_(best)
    model.itm_head.bias.mul_(best)
    model.refresh_fingerprint()
    return best, gains
