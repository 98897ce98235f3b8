"""Bounds from a few directions give the oracle's answer to the last bit, and spare most images."""

import numpy as np
import pytest

from blip2_search.indexes import bounded
from blip2_search.indexes.bounded import BoundedIndex, index_in_memory
from blip2_search.indexes.errors import VectorIndexError
from blip2_search.indexes.exact import ExactIndex


def photos(images, per_image, dim, rank, seed=0):
    """Features as a model makes them: few directions hold most of them."""
    rng = np.random.default_rng(seed)
    few = rng.standard_normal((rank, dim))
    x = (
        rng.standard_normal((images, 1, rank)) + rng.standard_normal((images, per_image, rank))
    ) @ few
    x += 0.1 * np.sqrt(rank) * rng.standard_normal(x.shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float16)


def queries_near(features, count, seed=1):
    rng = np.random.default_rng(seed)
    chosen = features[rng.integers(0, len(features), count), 0].astype(np.float32)
    return chosen + 0.03 * rng.standard_normal(chosen.shape).astype(np.float32)


def assert_same(index, oracle, queries, k):
    found, expected = index.search(queries, k), oracle.search(queries, k)
    assert found.images.tolist() == expected.images.tolist()
    assert found.scores.tobytes() == expected.scores.tobytes()


@pytest.mark.parametrize("directions", [None, 1, 8, 64])
@pytest.mark.parametrize("k", [1, 7, 100, 400])
def test_equals_the_oracle(directions, k):
    features = photos(400, 8, 64, rank=12)
    index, oracle = index_in_memory(features, directions), ExactIndex(features)
    assert_same(index, oracle, queries_near(features, 20), k)
    assert_same(index, oracle, np.random.default_rng(2).standard_normal((5, 64)), k)


def test_equals_the_oracle_in_blocks(monkeypatch):
    monkeypatch.setattr(bounded, "IN_FLIGHT", 1000)
    monkeypatch.setattr(bounded, "_BOUNDS_HELD", 1000)
    features = photos(150, 4, 32, rank=6)
    assert_same(index_in_memory(features), ExactIndex(features), queries_near(features, 40), 9)


@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e-25, 1e-23, 1e-20, 1e-10, 1e-3, 1e3, 1e18, 3e37])
def test_large_and_tiny_numbers(scale):
    features = (photos(60, 3, 16, rank=4).astype(np.float64) * scale).astype(np.float32)
    queries = queries_near(photos(60, 3, 16, rank=4), 5)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same(index_in_memory(features, 4), ExactIndex(features), queries, 10)


@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e-25, 1e-23, 1e-20, 1e-10, 1e18])
def test_large_and_tiny_queries(scale):
    features = photos(200, 3, 64, rank=6)
    queries = (queries_near(features, 20).astype(np.float64) * scale).astype(np.float32)
    assert_same(index_in_memory(features, 8), ExactIndex(features), queries, 10)


def test_most_images_are_never_looked_at(monkeypatch):
    features = photos(3000, 8, 128, rank=16)
    index = index_in_memory(features)
    assert len(index.directions) <= 32
    looked_at = []
    whole = BoundedIndex._approximate
    monkeypatch.setattr(
        BoundedIndex, "_approximate", lambda s, i, q: looked_at.append(len(i)) or whole(s, i, q)
    )
    index.search(queries_near(features, 10), 10)
    assert sum(looked_at) / 10 < 0.2 * len(features)


def test_vectors_in_all_directions_take_all_of_them():
    features = np.random.default_rng(0).standard_normal((50, 2, 32)).astype(np.float32)
    assert len(index_in_memory(features).directions) == 32


def test_no_images():
    index = index_in_memory(np.empty((0, 4, 16), np.float16))
    assert index.search(np.ones((2, 16)), 3).images.shape == (2, 0)
    with pytest.raises(VectorIndexError):
        index_in_memory(np.empty((4, 16), np.float16))
