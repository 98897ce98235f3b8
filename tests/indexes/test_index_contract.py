"""What every index promises, held against sums that a child could follow.

The features are small whole numbers: every similarity is exact, and many of them are equal.
"""

import numpy as np
import pytest
import torch

from blip2_search.indexes.base import search_any
from blip2_search.indexes.bounded import index_in_memory
from blip2_search.indexes.errors import Blip2SearchError, VectorIndexError
from blip2_search.indexes.exact import ExactIndex
from blip2_search.retrieval.gpu_index import GpuIndex

ON_A_GPU = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
)


@pytest.fixture(params=["exact", "bounded", "one direction", "cpu", ON_A_GPU])
def build(request):
    """Return what makes an index."""
    if request.param == "exact":
        return ExactIndex
    if request.param == "bounded":
        return index_in_memory
    if request.param == "one direction":
        return lambda features: index_in_memory(features, directions=1)
    return lambda features: GpuIndex(features, request.param)


def whole_numbers(*shape, seed=0):
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def naive(features, queries, k):
    """Sort all images for each query, by hand."""
    images, scores = [], []
    for query in queries.tolist():
        every = [
            max(sum(a * b for a, b in zip(vector, query, strict=True)) for vector in image)
            for image in features.tolist()
        ]
        images.append(sorted(range(len(every)), key=lambda i: (-every[i], i))[:k])
        scores.append([every[i] for i in images[-1]])
    return images, scores


def test_literal(build):
    features = np.array(
        [
            [[1, 0], [0, 1]],
            [[2, 0], [0, 0]],
            [[0, 1], [1, 0]],  # as the first, in another order: a tie in every query
            [[-3, -1], [-1, -3]],
        ],
        np.float32,
    )
    found = build(features).search(np.array([[0, 1], [1, 0], [-1, 0]], np.float32), k=3)
    assert found.images.tolist() == [[0, 2, 1], [1, 0, 2], [3, 0, 1]]
    assert found.scores.tolist() == [[1, 1, 0], [2, 1, 1], [3, 0, 0]]
    assert (found.images.dtype, found.scores.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize("per_image", [1, 5, 32])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_equals_the_naive_sort_for_every_k(build, per_image, dtype):
    features = whole_numbers(23, per_image, 4).astype(dtype)
    queries = whole_numbers(3, 4, seed=1)
    index = build(features)
    for k in range(1, 26):
        found = index.search(queries, k)
        assert (found.images.tolist(), found.scores.tolist()) == naive(features, queries, k)


@pytest.mark.parametrize("copies", [2, 17, 40])
def test_of_identical_images_the_lower_number_is_first(build, copies):
    features = np.repeat(whole_numbers(3, 2, 4), copies, axis=0)
    features = features[np.random.default_rng(2).permutation(len(features))]
    queries = whole_numbers(4, 4, seed=1)
    index = build(features)
    for k in range(1, len(features) + 1):
        found = index.search(queries, k)
        assert (found.images.tolist(), found.scores.tolist()) == naive(features, queries, k)


def test_all_similarities_equal(build):
    found = build(np.zeros((9, 3, 2), np.float32)).search(np.ones((2, 2), np.float32), 5)
    assert found.images.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert not found.scores.any()


def test_all_similarities_negative(build):
    features = -1 - abs(whole_numbers(12, 3, 4))
    queries = 1 + abs(whole_numbers(2, 4, seed=1))
    found = build(features).search(queries, 12)
    assert found.scores.max() < 0
    assert (found.images.tolist(), found.scores.tolist()) == naive(features, queries, 12)


def test_many_queries_are_each_alone(build):
    features, queries = whole_numbers(30, 4, 8), whole_numbers(70, 8, seed=1)
    index = build(features)
    together = index.search(queries, 7)
    for row, query in enumerate(queries):
        alone = index.search(query[None], 7)
        assert alone.images[0].tolist() == together.images[row].tolist()
        assert alone.scores[0].tolist() == together.scores[row].tolist()


def test_one_image_no_image_no_query(build):
    one, none = build(whole_numbers(1, 2, 3)), build(whole_numbers(0, 2, 3))
    assert (one.num_images, one.dim) == (1, 3)
    assert (none.num_images, none.dim) == (0, 3)
    assert one.search(np.ones((2, 3)), 5).images.tolist() == [[0], [0]]
    assert none.search(np.ones((2, 3)), 5).images.shape == (2, 0)
    assert none.search(np.ones((2, 3)), 5).scores.shape == (2, 0)
    assert one.search(np.ones((0, 3)), 5).images.shape == (0, 1)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.ones((1, 3)), 0, "k must be at least 1"),
        (np.ones((1, 3)), -1, "k must be at least 1"),
        (np.ones((1, 3)), 1.5, "whole number"),
        (np.ones((1, 4)), 1, "shape"),
        (np.ones(3), 1, "shape"),
        (np.ones((1, 1, 3)), 1, "shape"),
        ([["a", "b", "c"]], 1, "numbers"),
        (np.array([[1, np.nan, 1]]), 1, "finite"),
        (np.array([[1, np.inf, 1]]), 1, "finite"),
        (np.array([[1, 1e300, 1]]), 1, "finite"),
    ],
)
@pytest.mark.parametrize("images", [0, 2])
def test_refused_searches(build, images, queries, k, message):
    index = build(whole_numbers(images, 2, 3))
    with pytest.raises(VectorIndexError, match=message):
        index.search(queries, k)


@pytest.mark.parametrize(
    "features",
    [
        np.ones((2, 3), np.float32),
        np.ones((2, 0, 3), np.float32),
        np.ones((2, 3, 0), np.float32),
        np.ones((2, 2, 3), np.float64),
        np.ones((2, 2, 3), np.int64),
        np.full((2, 2, 3), np.nan, np.float16),
        np.full((2, 2, 3), -np.inf, np.float32),
    ],
)
def test_refused_features(build, features):
    with pytest.raises(VectorIndexError):
        build(features)


def test_errors_are_of_the_project():
    assert issubclass(VectorIndexError, Blip2SearchError)


class TestSearchAny:
    """One query of many vectors: the best of them counts."""

    def test_literal(self, build):
        features = np.array([[[5, 0]], [[0, 4]], [[3, 3]], [[-9, -9]]], np.float32)
        scores, images = search_any(build(features), np.eye(2, dtype=np.float32), 3)
        assert (images.tolist(), scores.tolist()) == ([0, 1, 2], [5, 4, 3])
        assert (images.dtype, scores.dtype) == (np.int64, np.float32)

    @pytest.mark.parametrize("vectors", [1, 2, 9])
    def test_equals_the_naive_sort_for_every_k(self, build, vectors):
        features, queries = whole_numbers(21, 3, 4), whole_numbers(vectors, 4, seed=1)
        index = build(features)
        best = (features @ queries.T).max(axis=(1, 2)).tolist()
        order = sorted(range(21), key=lambda i: (-best[i], i))
        for k in range(1, 23):
            scores, images = search_any(index, queries, k)
            assert images.tolist() == order[:k]
            assert scores.tolist() == [best[i] for i in order[:k]]

    def test_no_images(self, build):
        scores, images = search_any(build(whole_numbers(0, 3, 4)), np.ones((2, 4)), 3)
        assert (scores.shape, images.shape) == ((0,), (0,))

    def test_no_vectors(self, build):
        with pytest.raises(VectorIndexError, match="at least one"):
            search_any(build(whole_numbers(3, 3, 4)), np.ones((0, 4)), 3)
