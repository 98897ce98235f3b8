"""The three masks: as literal tables, and through the Q-Former."""

import pytest
import torch

from blip2_search.retrieval.config import QFormerConfig
from blip2_search.retrieval.masks import (
    bi_directional_mask,
    multimodal_causal_mask,
    uni_modal_mask,
)
from blip2_search.retrieval.qformer import QFormer
from blip2_search.retrieval.text_batch import TextBatch

# Q = 2 queries, then T = 3 tokens of which the last is padding. Rows attend to columns.
LITERAL = {
    uni_modal_mask: """
        1 1 0 0 0
        1 1 0 0 0
        0 0 1 1 0
        0 0 1 1 0
        0 0 1 1 0""",
    bi_directional_mask: """
        1 1 1 1 0
        1 1 1 1 0
        1 1 1 1 0
        1 1 1 1 0
        1 1 1 1 0""",
    multimodal_causal_mask: """
        1 1 0 0 0
        1 1 0 0 0
        1 1 1 0 0
        1 1 1 1 0
        1 1 1 1 0""",
}
MASKS = list(LITERAL)
Q, T = 3, 5  # through the network; the last of the T tokens is padding


def read(table):
    rows = table.strip().splitlines()
    return torch.tensor([[cell == "1" for cell in row.split()] for row in rows])


@pytest.mark.parametrize("mask", MASKS)
def test_literal(mask):
    got = mask(2, torch.tensor([[True, True, False]]))
    assert got.shape == (1, 1, 5, 5)
    assert torch.equal(got[0, 0], read(LITERAL[mask]))


@pytest.mark.parametrize("mask", MASKS)
def test_each_row_of_a_batch_has_its_own_padding(mask):
    text_mask = torch.tensor([[True, True, True], [True, False, False]])
    both = mask(2, text_mask)
    for i in range(2):
        assert torch.equal(both[i], mask(2, text_mask[i : i + 1])[0])


def test_text_alone():
    mask = torch.tensor([[True, True, False]])
    assert torch.equal(uni_modal_mask(0, mask)[0, 0], read("1 1 0\n1 1 0\n1 1 0"))
    assert torch.equal(multimodal_causal_mask(0, mask)[0, 0], read("1 0 0\n1 1 0\n1 1 0"))


# ---- through the network: who changes when one thing is changed ------------------------------------


@pytest.fixture(scope="module")
def qformer():
    torch.manual_seed(0)
    config = QFormerConfig(
        num_layers=3, hidden_size=32, num_heads=4, ffn_size=48, num_queries=Q,
        image_token_size=24, vocab_size=20, max_positions=8, dropout=0.0,
    )  # fmt: skip
    model = QFormer(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "image_tokens": torch.randn(1, 4, 24, generator=generator),
        "token_ids": torch.tensor([[1, 2, 3, 4, 5]]),
    }


@torch.no_grad()
def outputs(qformer, mask, inputs):
    text_mask = torch.tensor([[True] * (T - 1) + [False]])
    out = qformer(**inputs, mask=mask(Q, text_mask))
    return torch.cat((out.queries, out.text), dim=1)[0]  # (Q + T, H)


def changed(before, after):
    """Return the positions that differ: 0..Q-1 are queries, Q..Q+T-1 text."""
    return set(((before - after).abs().amax(dim=-1) > 1e-5).nonzero().flatten().tolist())


QUERIES, TEXT = set(range(Q)), set(range(Q, Q + T))


@pytest.mark.parametrize("token", range(T))
@pytest.mark.parametrize("mask", MASKS)
def test_changing_one_token(qformer, inputs, mask, token):
    before = outputs(qformer, mask, inputs)
    inputs["token_ids"][0, token] = 9
    own = Q + token
    expected = {
        uni_modal_mask: TEXT,
        bi_directional_mask: QUERIES | TEXT,
        multimodal_causal_mask: {position for position in TEXT if position >= own},
    }[mask]
    if token == T - 1:  # padding is seen by nobody, so that only its own output changes
        expected = {own}
    assert changed(before, outputs(qformer, mask, inputs)) == expected


@pytest.mark.parametrize("query", range(Q))
@pytest.mark.parametrize("mask", MASKS)
def test_changing_one_query(qformer, inputs, mask, query):
    before = outputs(qformer, mask, inputs)
    kept = qformer.query_tokens.detach().clone()
    with torch.no_grad():
        qformer.query_tokens[query] += torch.linspace(-1, 1, 32)
    after = outputs(qformer, mask, inputs)
    with torch.no_grad():
        qformer.query_tokens.copy_(kept)
    assert changed(before, after) == (QUERIES if mask is uni_modal_mask else QUERIES | TEXT)


@pytest.mark.parametrize("mask", MASKS)
def test_changing_the_image(qformer, inputs, mask):
    before = outputs(qformer, mask, inputs)
    inputs["image_tokens"] = inputs["image_tokens"].flip(-1)
    after = outputs(qformer, mask, inputs)
    assert changed(before, after) == (QUERIES if mask is uni_modal_mask else QUERIES | TEXT)


@torch.no_grad()
def test_uni_modal_halves_are_the_separate_passes(qformer, inputs):
    both = outputs(qformer, uni_modal_mask, inputs)
    text_mask = torch.tensor([[True] * (T - 1) + [False]])
    queries = qformer(image_tokens=inputs["image_tokens"]).queries[0]
    text = qformer(token_ids=inputs["token_ids"], mask=uni_modal_mask(0, text_mask)).text[0]
    torch.testing.assert_close(both, torch.cat((queries, text)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_caption_pass_reuses_the_query_pass(tiny_model):
    config = tiny_model.config.qformer
    torch.manual_seed(0)
    image_tokens = torch.randn(3, 4, config.image_token_size)
    ids = torch.randint(4, config.vocab_size, (3, 6))
    mask = torch.arange(6) < torch.tensor([[6], [4], [2]])
    full = tiny_model.qformer(
        image_tokens=image_tokens,
        token_ids=ids,
        mask=multimodal_causal_mask(config.num_queries, mask),
    ).text
    past = tiny_model.query_pass(image_tokens).keys_values
    reused = tiny_model.caption_hidden(TextBatch(ids, mask), past)
    torch.testing.assert_close(reused, full, atol=1e-5, rtol=0)
    # and the image does reach the captions
    other = tiny_model.query_pass(image_tokens.flip(0)).keys_values
    assert (tiny_model.caption_hidden(TextBatch(ids, mask), other) - full).abs().max() > 1e-3


@torch.no_grad()
def test_a_pass_with_text_gives_no_reusable_keys(qformer, inputs):
    assert qformer(**inputs).query_keys_values == ()
    assert len(qformer(image_tokens=inputs["image_tokens"]).query_keys_values) == 3


@torch.no_grad()
def test_images_that_share_their_tokens(tiny_model):
    config = tiny_model.config.qformer
    torch.manual_seed(0)
    tokens = torch.randn(2, 4, config.image_token_size)
    ids = torch.randint(4, config.vocab_size, (3, 6))
    mask = torch.arange(6) < torch.tensor([[6], [4], [2]])
    image_of = torch.tensor([1, 0, 1])
    shared = tiny_model.match_logits(tokens, TextBatch(ids, mask), image_of)
    alone = tiny_model.match_logits(tokens[image_of], TextBatch(ids, mask))
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=0)
    assert (shared[0] - shared[1]).abs().max() > 1e-4


@torch.no_grad()
def test_pairs_that_share_their_texts(tiny_model):
    config = tiny_model.config.qformer
    torch.manual_seed(0)
    tokens = torch.randn(3, 4, config.image_token_size)
    text = TextBatch(
        torch.randint(4, config.vocab_size, (2, 6)), torch.arange(6) < torch.tensor([[6], [4]])
    )
    image_of, text_of = torch.tensor([1, 0, 1, 2]), torch.tensor([0, 1, 1, 0])
    shared = tiny_model.match_logits(tokens, text, image_of, text_of)
    alone = tiny_model.match_logits(tokens[image_of], text.select(text_of))
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=0)
    assert (shared[1] - shared[2]).abs().max() > 1e-4


@torch.no_grad()
def test_queries_only_leaves_the_queries_as_they_are(qformer, inputs):
    mask = bi_directional_mask(Q, torch.tensor([[True] * (T - 1) + [False]]))
    full = qformer(**inputs, mask=mask)
    alone = qformer(**inputs, mask=mask, queries_only=True)
    torch.testing.assert_close(alone.queries, full.queries, atol=1e-5, rtol=0)
    assert alone.text is None
    assert alone.query_keys_values == ()
