"""The three objectives of stage 1 (BLIP-2, section 3.1; ALBEF, section 3.2, for the hard negatives).

`group_ids` (B,) say which pairs of a batch describe the same thing, such as two captions of one
image: they are positives of each other in ITC and never negatives in ITM.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import RetrievalModel, max_over_queries
from .preprocess import TextBatch
from .qformer import KeyValue


def itc_targets(group_ids: Tensor, smoothing: float = 0.1) -> Tensor:
    """Return soft targets (B, B), rows summing to 1.

    `1 - smoothing` is spread over the entries of the same group and `smoothing` over all. With all
    groups different this is ordinary label smoothing.
    """
    same = (group_ids[:, None] == group_ids[None, :]).float()
    return (1 - smoothing) * same / same.sum(dim=1, keepdim=True) + smoothing / len(group_ids)


def itc_loss(
    image_features: Tensor, text_features: Tensor, temperature: Tensor, group_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Image-text contrastive loss.

    Args:
        image_features: (B, Q, E), normalised.
        text_features: (B, E), normalised.
        temperature: the learned scalar that similarities are divided by.
        group_ids: (B,), int64.

    Returns:
        the loss, and the similarity logits (B images, B texts) that it was taken of.
    """
    logits = max_over_queries(image_features, text_features) / temperature
    targets = itc_targets(group_ids)
    loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    return loss, logits


@torch.no_grad()
def sample_hard_negatives(logits: Tensor, group_ids: Tensor, hardness: float = 1.0) -> Tensor:
    """Draw one negative column for every row: (B,), int64.

    Args:
        logits: (B, B), row to column, as `itc_loss` returns them (transpose for texts as rows).
        group_ids: (B,); a row never draws a column of its own group.
        hardness: 1 draws from softmax(logits), 0 uniformly; in between, from a flattened softmax.

    Raises:
        ValueError: the whole batch is one group, so that there is no negative.
    """
    same = group_ids[:, None] == group_ids[None, :]
    if bool(same.all(dim=1).any()):
        raise ValueError("no negatives: a batch needs at least two different images")
    weights = (hardness * logits).masked_fill(same, float("-inf")).softmax(dim=1)
    return torch.multinomial(weights, 1).squeeze(1)


def itm_loss(
    model: RetrievalModel,
    image_tokens: Tensor,
    text: TextBatch,
    itc_logits: Tensor,
    group_ids: Tensor,
    *,
    hardness: float = 1.0,
    anchors: int | None = None,
) -> Tensor:
    """Image-text matching loss over positives, hard negative images and hard negative texts.

    Args:
        model: gives the match logits.
        image_tokens: (B, P, D).
        text: the B captions.
        itc_logits: (B images, B texts); the negatives are drawn by them.
        group_ids: (B,), int64.
        hardness: see `sample_hard_negatives`.
        anchors: use the first `anchors` pairs only (3 * anchors pairs are scored); all by default.
    """
    negative_text = sample_hard_negatives(itc_logits, group_ids, hardness)[:anchors]
    negative_image = sample_hard_negatives(itc_logits.T, group_ids, hardness)[:anchors]
    own = torch.arange(len(negative_text), device=image_tokens.device)
    images = torch.cat((own, negative_image, own))
    texts = torch.cat((own, own, negative_text))
    labels = torch.zeros_like(images)
    labels[: len(own)] = 1
    return F.cross_entropy(
        model.match_logits(image_tokens[images], text.select(texts)).float(), labels
    )


def itg_loss(
    model: RetrievalModel, text: TextBatch, keys_values: tuple[KeyValue, ...], dec_id: int
) -> Tensor:
    """Image-grounded text generation: next-token cross-entropy over the captions.

    Args:
        model: must have a language-model head.
        text: the captions; their [CLS] is replaced with [DEC] here.
        keys_values: of `model.query_pass` over the same images.
        dec_id: the token id of [DEC].

    Raises:
        ValueError: the model has no language-model head.
    """
    if model.lm_head is None:
        raise ValueError(
            "this model was published without a language-model head: ITG cannot train it"
        )
    token_ids = text.token_ids.clone()
    token_ids[:, 0] = dec_id
    hidden = model.caption_hidden(TextBatch(token_ids, text.mask), keys_values)
    # The head is wide (the vocabulary): apply it only where there is a token to predict.
    predicted = text.mask[:, 1:]
    logits = model.lm_head(hidden[:, :-1][predicted], model.qformer.word_embeddings.weight)
    return F.cross_entropy(logits.float(), text.token_ids[:, 1:][predicted], label_smoothing=0.1)
