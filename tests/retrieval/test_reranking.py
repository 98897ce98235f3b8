"""The two steps of retrieval, against lists sorted by hand."""

import numpy as np
import pytest

from blip2_search.retrieval.metrics import image_ranks, text_ranks
from blip2_search.retrieval.reranking import match_pairs, pairs_to_match, rank_by_itc


def ranks_by_hand(itc, itm, right, k):
    """Return where the best right answer of each row stands: k reranked, the others behind them."""
    found = []
    for row, extra, ok in zip(itc, itm, right, strict=True):
        by_itc = sorted(range(len(row)), key=lambda i: (-row[i], i))
        head = sorted(by_itc[:k], key=lambda i: -(row[i] + extra[i]))
        found.append(next(rank for rank, i in enumerate(head + by_itc[k:]) if ok[i]))
    return found


@pytest.mark.parametrize("captions", [1, 7, None])
@pytest.mark.parametrize("k", [1, 3, 10, 1000])
def test_equals_lists_sorted_by_hand(rng, captions, k):
    counts = rng.integers(1, 8, size=12) if captions is None else [captions] * 12
    owner = rng.permutation(np.repeat(np.arange(12), counts))
    right = owner == np.arange(12)[:, None]
    itc = (rng.normal(size=right.shape) + right).astype(np.float32)
    itm = rng.normal(size=right.shape).astype(np.float32)
    rankings = rank_by_itc(itc, owner, k)
    pairs = pairs_to_match(rankings, len(owner))
    logits = itm[pairs.images, pairs.texts]
    assert len(set(zip(pairs.images, pairs.texts, strict=True))) == len(pairs)
    for name, of in (("tr", slice(None)), ("ir", None)):
        ranking = rankings[name]
        scores = (itc, itm, right) if of is not None else (itc.T, itm.T, right.T)
        for depth in (0, 1, min(k, 2), k):
            found = ranking.reranked(logits[pairs.positions[name]], depth)
            assert found.tolist() == ranks_by_hand(*scores, depth)


def test_ties_count_against_us():
    itc = np.zeros((3, 3), np.float32)
    rankings = rank_by_itc(itc, np.arange(3), 3)
    for ranking in rankings.values():
        assert ranking.candidates.tolist() == [[0, 1, 2]] * 3
        assert ranking.itc_ranks.tolist() == [2, 2, 2]
        assert ranking.reranked(np.zeros((3, 3), np.float32), 3).tolist() == [2, 2, 2]
        # Outside of the first two, the third keeps its place behind them whatever ITM says.
        assert ranking.reranked(np.eye(3, dtype=np.float32), 2).tolist() == [0, 0, 2]


def test_one_direction_needs_only_its_own_pairs(rng):
    itc = rng.normal(size=(20, 20)).astype(np.float32)
    rankings = rank_by_itc(itc, np.arange(20), 4, ["ir"])
    assert set(rankings) == {"ir"}
    pairs = pairs_to_match(rankings, 20)
    assert len(pairs) == 80
    assert (rankings["ir"].itc_ranks == image_ranks(itc, np.arange(20))).all()
    assert (
        rank_by_itc(itc, np.arange(20), 1)["tr"].itc_ranks == text_ranks(itc, np.arange(20))
    ).all()


@pytest.mark.parametrize("memory", [1, 40_000, 1 << 30])
def test_every_pair_gets_its_logit_whatever_the_memory(tiny_model, photos, rng, memory):
    paths = sorted(photos.iterdir())
    captions = ["a red circle on black", "bar", "a picture of a clock tower", "white square"]
    tokens = tiny_model.image_tokens(paths).half().numpy()
    itc = rng.normal(size=(18, 4)).astype(np.float32)
    pairs = pairs_to_match(rank_by_itc(itc, np.array([0, 5, 9, 17]), 2, ["ir"]), 4)
    seen = []
    scores = match_pairs(
        tiny_model, list(tokens), captions, pairs,
        memory=memory, on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen[-1] == (8, 8)
    for image, text, score in zip(pairs.images, pairs.texts, scores, strict=True):
        alone = tiny_model.match(tiny_model.image_tokens([paths[image]]), [captions[text]])
        assert score == pytest.approx(alone[0], abs=2e-3)
