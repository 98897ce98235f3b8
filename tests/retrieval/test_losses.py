"""The three objectives: against torch's own losses, and with targets written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from blip2_search.retrieval.losses import (
    ITC,
    itc_loss,
    itc_targets,
    itg_loss,
    itm_loss,
    sample_hard_negatives,
)
from blip2_search.retrieval.masks import multimodal_causal_mask
from blip2_search.retrieval.model import max_over_queries
from tiny import build_tiny_model


def random_features(batch=6, queries=4, size=8):
    torch.manual_seed(0)
    images = F.normalize(torch.randn(batch, queries, size), dim=-1)
    return images, F.normalize(torch.randn(batch, size), dim=-1)


def test_max_over_queries_literal():
    images = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [-1.0, 0.0]]])
    texts = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    assert torch.allclose(max_over_queries(images, texts), torch.tensor([[0.8, 1.0], [-0.6, -1.0]]))


def test_itc_with_different_groups_is_label_smoothing():
    images, texts = random_features()
    loss, logits, transposed = itc_loss(images, texts, torch.tensor(0.07), torch.arange(6))
    assert torch.equal(transposed, logits.T)
    own = torch.arange(6)
    expected = F.cross_entropy(logits, own, label_smoothing=0.1)
    expected = (expected + F.cross_entropy(logits.T, own, label_smoothing=0.1)) / 2
    assert torch.allclose(loss, expected)
    by_hand = torch.stack([(images @ text).max(dim=1).values for text in texts], dim=1) / 0.07
    assert torch.allclose(logits, by_hand, atol=1e-5)


def test_itc_targets_spread_over_a_group():
    targets = itc_targets(torch.tensor([7, 3, 7, 9]))
    small, half, whole = 0.025, 0.475, 0.925
    assert torch.allclose(
        targets,
        torch.tensor(
            [
                [half, small, half, small],
                [small, whole, small, small],
                [half, small, half, small],
                [small, small, small, whole],
            ]
        ),
    )


def test_itc_takes_all_captions_of_an_image_for_positives():
    images, _ = random_features(batch=3)
    texts = F.normalize(torch.randn(6, 8), dim=-1)  # two of each image
    loss, to_text, to_image = itc_loss(images, texts, torch.tensor(0.07), torch.arange(3))
    logits = max_over_queries(images, texts) / 0.07
    positive = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    targets = torch.where(positive, 0.9 / 2, 0.0) + 0.1 / 6
    expected = -(targets * logits.log_softmax(1)).sum(1).mean() / 2
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    expected = expected + F.cross_entropy(logits.T, owner, label_smoothing=0.1) / 2
    assert torch.allclose(loss, expected)
    assert torch.equal(to_text, logits[:, [0, 2, 4]])  # of the first captions, for ITM
    assert torch.equal(to_image, logits[:, [0, 2, 4]].T)


def test_hard_negatives_follow_the_softmax_and_spare_the_group():
    torch.manual_seed(0)
    logits = torch.tensor([[9.0, 2.0, 1.0, 9.0]] * 4000)
    groups = torch.full((4000,), 5)
    columns = torch.tensor([5, 1, 2, 5])
    square = torch.zeros(4, 4)
    square[:] = logits[0]
    drawn = torch.stack([sample_hard_negatives(square, columns) for _ in range(2000)])
    assert not (drawn[:, 0] == 0).any()
    assert not (drawn[:, 0] == 3).any()
    share = (drawn[:, 0] == 1).float().mean().item()
    assert share == pytest.approx(math.e / (1 + math.e), abs=0.04)
    uniform = torch.stack([sample_hard_negatives(square, columns, 0.0) for _ in range(2000)])
    assert (uniform[:, 0] == 1).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert sample_hard_negatives(torch.zeros(3, 3), groups[:3]).tolist() == [-1, -1, -1]


def tiny_batch(model):
    torch.manual_seed(1)
    tokens = torch.randn(4, 4, 256)
    text = model.tokenize(["a red circle", "a blue square on black", "a green bar", "a picture"])
    return tokens, text


def test_itm_scores_positives_first_and_reaches_the_prior(tiny_model):
    tokens, text = tiny_batch(tiny_model)
    itc = ITC(torch.tensor(0.0), torch.randn(4, 4), torch.randn(4, 4))
    loss = itm_loss(tiny_model, tokens, text, itc, torch.arange(4))
    # One positive in three; an untrained head knows nothing, so the loss is near that of a coin.
    assert 0.5 < loss.item() < 0.9
    few = itm_loss(tiny_model, tokens, text, itc, torch.arange(4), anchors=2)
    assert few.item() != loss.item()


def test_itm_leaves_out_what_has_no_negative(tiny_model):
    tokens, text = tiny_batch(tiny_model)
    itc = ITC(torch.tensor(0.0), torch.randn(4, 4), torch.randn(4, 4))
    alone = itm_loss(tiny_model, tokens, text, itc, torch.zeros(4, dtype=torch.int64))
    assert alone.item() == 0
    alone.backward()  # zero, but connected: DDP waits for every gradient
    one = ITC(torch.tensor(0.0), torch.zeros(1, 1), torch.zeros(1, 1))
    single = text.select(torch.tensor([0]))
    assert itm_loss(tiny_model, tokens[:1], single, one, torch.zeros(1).long()).item() == 0
    tiny_model.zero_grad()


def test_hard_negatives_are_drawn_alike_from_generators_in_one_state():
    logits = torch.randn(5, 5)
    drawn = [
        sample_hard_negatives(logits, torch.arange(5), 1.0, torch.Generator().manual_seed(seed))
        for seed in (3, 3, *range(4, 24))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert any(not torch.equal(drawn[0], other) for other in drawn[2:])


def test_itg_equals_one_full_pass(tiny_model):
    tokens, text = tiny_batch(tiny_model)
    dec = tiny_model.config.qformer.vocab_size - 1
    loss = itg_loss(tiny_model, text, tiny_model.query_pass(tokens).keys_values, dec)
    ids = text.token_ids.clone()
    ids[:, 0] = dec
    mask = multimodal_causal_mask(4, text.mask)
    out = tiny_model.qformer(image_tokens=tokens, token_ids=ids, mask=mask)
    logits = tiny_model.lm_head(out.text, tiny_model.qformer.word_embeddings.weight)[:, :-1]
    labels = text.token_ids[:, 1:].masked_fill(~text.mask[:, 1:], -100)
    expected = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=0.1
    )
    assert torch.allclose(loss, expected, atol=1e-5)


def test_itg_needs_a_head():
    model = build_tiny_model()
    model.lm_head = None
    tokens, text = tiny_batch(model)
    with pytest.raises(ValueError, match="language-model head"):
        itg_loss(model, text, model.query_pass(tokens).keys_values, 0)
