"""The three objectives of stage 1 (BLIP-2, section 3.1; ALBEF, section 3.2, for the hard negatives).

`group_ids` say which pairs describe the same thing, such as two captions of one image: they are
positives of each other in ITC and never negatives in ITM. Over several processes each holds `b` of the
`B` pairs of a batch; negatives come from all of them. In one process the two are the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import gather, own_rows
from .model import RetrievalModel, max_over_queries
from .qformer import KeyValue
from .text_batch import TextBatch


class ITC(NamedTuple):
    """The contrastive loss, and similarities / temperature for ITM to draw its negatives by.

    Where images have several captions, these are similarities to the first of each.
    """

    loss: Tensor
    image_to_text: Tensor  # (b, B)
    text_to_image: Tensor  # (b, B)


def itc_targets(
    group_ids: Tensor, all_group_ids: Tensor | None = None, smoothing: float = 0.1
) -> Tensor:
    """Return soft targets (b, B), rows summing to 1.

    `1 - smoothing` is spread over the entries of the same group and `smoothing` over all. With all
    groups different this is ordinary label smoothing.
    """
    if all_group_ids is None:
        all_group_ids = group_ids
    same = (group_ids[:, None] == all_group_ids[None, :]).float()
    return (1 - smoothing) * same / same.sum(dim=1, keepdim=True) + smoothing / len(all_group_ids)


def itc_loss(
    image_features: Tensor, text_features: Tensor, temperature: Tensor, group_ids: Tensor
) -> ITC:
    """Image-text contrastive loss against the pairs of all processes.

    Args:
        image_features: (b, Q, E), normalised.
        text_features: (b * K, E), normalised; the K captions of an image one after the other.
        temperature: the learned scalar that similarities are divided by.
        group_ids: (b,), int64.
    """
    image_to_text = max_over_queries(image_features, gather(text_features)) / temperature
    text_to_image = max_over_queries(gather(image_features), text_features).T / temperature
    captions = len(text_features) // len(image_features)
    text_ids = group_ids.repeat_interleave(captions)
    loss = (
        F.cross_entropy(image_to_text, itc_targets(group_ids, gather(text_ids)))
        + F.cross_entropy(text_to_image, itc_targets(text_ids, gather(group_ids)))
    ) / 2
    return ITC(loss, image_to_text[:, ::captions], text_to_image[::captions])


@torch.no_grad()
def sample_hard_negatives(
    logits: Tensor,
    group_ids: Tensor,
    hardness: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one negative column for every row: (b,), int64, numbers within the B of all processes.

    A row without a column of another group gets -1.

    Args:
        logits: (b, B), a similarity of `ITC`.
        group_ids: (b,); a row never draws a column of its own group.
        hardness: 1 draws from softmax(logits), 0 uniformly; in between, from a flattened softmax.
        generator: on the CPU and in the same state in all processes, which then draw together what
            one process would.
    """
    same = group_ids[:, None] == gather(group_ids)[None, :]
    total = logits.shape[1]
    uniform = torch.rand(total, total, generator=generator).clamp_min(1e-20)
    gumbel = own_rows(-torch.log(-torch.log(uniform))).to(logits.device)
    # The largest of log-weights plus Gumbel noise is a draw from their softmax.
    scores = hardness * logits + gumbel
    drawn = scores.masked_fill(same, float("-inf")).argmax(dim=1)
    return drawn.masked_fill(same.all(dim=1), -1)


def itm_loss(
    model: RetrievalModel,
    encoder_tokens: Tensor,
    text: TextBatch,
    itc: ITC,
    group_ids: Tensor,
    *,
    hardness: float = 1.0,
    anchors: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Image-text matching loss over positives, hard negative images and hard negative texts.

    Zero in a batch of one, which has no negatives: positives alone would teach that all matches.

    Args:
        model: gives the match logits.
        encoder_tokens: (b, P, D), before `ln_vision`.
        text: the b captions; over several processes, padded to one length everywhere.
        itc: its similarities choose the negatives.
        group_ids: (b,), int64.
        hardness: see `sample_hard_negatives`.
        anchors: use the first `anchors` pairs only (3 * anchors pairs are scored); all by default.
        generator: see `sample_hard_negatives`.
    """
    draw = (group_ids, hardness, generator)
    negative_text = sample_hard_negatives(itc.image_to_text, *draw)[:anchors]
    negative_image = sample_hard_negatives(itc.text_to_image, *draw)[:anchors]
    all_images = gather(encoder_tokens)
    all_text = TextBatch(gather(text.token_ids), gather(text.mask))
    own = torch.arange(len(negative_text), device=encoder_tokens.device)
    with_image, with_text = own[negative_image >= 0], own[negative_text >= 0]
    images = torch.cat(
        (encoder_tokens[own], all_images[negative_image[with_image]], encoder_tokens[with_text])
    )
    texts = TextBatch.concatenate(
        (text.select(own), text.select(with_image), all_text.select(negative_text[with_text]))
    )
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    labels[: len(own)] = 1
    logits = model.match_logits(model.normalise_tokens(images), texts)
    loss = F.cross_entropy(logits.float(), labels)
    return loss if len(labels) > len(own) else 0.0 * loss


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
    labels = text.token_ids[:, 1:][predicted]
    total = F.cross_entropy(logits.float(), labels, label_smoothing=0.1, reduction="sum")
    # Over the mean number of tokens of all processes, so that the mean of their losses is the mean
    # over all tokens.
    return total / gather(predicted.sum()[None]).float().mean()
