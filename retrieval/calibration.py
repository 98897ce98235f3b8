"""The scale of a small model's ITM head.

The published score adds a raw ITM logit to a cosine: how much each counts depends on how large the
logits have grown. In a model trained on few images they outgrow what they know. Scaling the head
changes neither head's own ranking, only the weight of ITM in the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .data import CaptionedImage, captions_and_owners
from .evaluation import candidates, match_all, rerank_table
from .metrics import recall_table
from .model import Precision, RetrievalModel, autocast, image_features, itc_similarities

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
    """
    captions, owner = captions_and_owners(images)
    tokens = model.image_tokens([image.path for image in images])
    itc = itc_similarities(image_features(model, tokens), model.encode_texts(captions))
    pairs = candidates(itc, rerank)
    with autocast(model.device, precision):
        itm = match_all(model, tokens, captions, pairs)
    alone = recall_table(itc, owner)
    gains = {}
    for scale in scales:
        table = rerank_table(itc, scale * itm, pairs, rerank, owner)
        gains[scale] = min(table[name] - alone[name] for name in ("tr@1", "ir@1"))
    best = max(gains, key=gains.__getitem__)
    model.itm_head.weight.mul_(best)
    model.itm_head.bias.mul_(best)
    model.refresh_fingerprint()
    return best, gains
