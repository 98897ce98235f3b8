"""Recall, against a count that a child could follow."""

import numpy as np
import pytest

from blip2_search.retrieval.metrics import image_ranks, recall, recall_table, text_ranks


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
