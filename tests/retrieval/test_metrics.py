"""Recall, against a count that a child could follow."""

import numpy as np
import pytest

from blip2_search.retrieval.metrics import (
    bootstrap_intervals,
    image_ranks,
    rank_statistics,
    recall,
    recall_table,
    text_ranks,
)


def naive_recall(scores, owner, k):
    """Sort every row and column by hand."""
    tr = ir = 0
    for image, row in enumerate(scores):
        best = sorted(range(len(row)), key=lambda text: -row[text])[:k]
        tr += any(owner[text] == image for text in best)
    for text, column in enumerate(scores.T):
        best = sorted(range(len(column)), key=lambda image: -column[image])[:k]
        ir += owner[text] in best
    return 100 * tr / len(scores), 100 * ir / len(owner)


@pytest.mark.parametrize("captions", [1, 5])
def test_equals_the_naive_count(rng, captions):
    owner = rng.permutation(np.repeat(np.arange(20), captions))
    scores = rng.normal(size=(20, len(owner))) + 0.8 * (owner[None] == np.arange(20)[:, None])
    table = recall_table(scores, owner, ks=(1, 5, 10))
    for k in (1, 5, 10):
        assert (table[f"tr@{k}"], table[f"ir@{k}"]) == pytest.approx(naive_recall(scores, owner, k))


def test_literal():
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.2, 0.3]])
    owner = np.array([0, 1, 1])
    assert text_ranks(scores, owner).tolist() == [0, 1]
    assert image_ranks(scores, owner).tolist() == [0, 0, 1]
    assert recall(np.array([0, 1, 5, 9]), 5) == 50


def test_ties_count_against_us():
    scores = np.zeros((4, 4))
    assert recall_table(scores, np.arange(4), ks=(1,)) == {"tr@1": 0, "ir@1": 0}


def test_statistics_of_literal_ranks():
    table = rank_statistics({"tr": np.array([0, 1, 5, 20]), "ir": np.array([0, 0, 9, 3])})
    assert (table["tr@1"], table["tr@5"], table["tr@10"]) == (25, 50, 75)
    assert (table["ir@1"], table["ir@5"], table["ir@10"]) == (50, 75, 100)
    assert (table["tr_mean"], table["ir_mean"], table["mean"]) == (50, 75, 62.5)
    assert (table["tr_median_rank"], table["ir_median_rank"]) == (4, 2.5)
    assert table["tr_mrr"] == pytest.approx((1 + 1 / 2 + 1 / 6 + 1 / 21) / 4)
    assert table["ir_mrr"] == pytest.approx((1 + 1 + 1 / 10 + 1 / 4) / 4)


def test_intervals_equal_a_plain_loop(rng):
    owner = np.repeat(np.arange(30), rng.integers(1, 8, size=30))
    tr, ir = rng.integers(0, 12, size=30), rng.integers(0, 12, size=len(owner))
    intervals = bootstrap_intervals({"tr": tr, "ir": ir}, owner, resamples=200, seed=3)
    drawn = np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30), size=200)
    for k in (1, 5, 10):
        tr_shares, ir_shares = [], []
        for weights in drawn:
            chosen = np.repeat(np.arange(30), weights)
            tr_shares.append(np.mean(tr[chosen] < k))
            ir_shares.append(np.mean(np.concatenate([ir[owner == image] for image in chosen]) < k))
        for name, shares in (("tr", tr_shares), ("ir", ir_shares)):
            low, high = 100 * np.percentile(shares, [2.5, 97.5])
            assert intervals[f"{name}@{k}"] == pytest.approx((low, high))


def test_an_interval_has_the_width_of_a_binomial(rng):
    ranks = (rng.random(2000) > 0.3).astype(np.int64)
    low, high = bootstrap_intervals({"tr": ranks}, np.arange(2000))["tr@1"]
    assert high - low == pytest.approx(2 * 1.96 * 100 * np.sqrt(0.3 * 0.7 / 2000), rel=0.15)
