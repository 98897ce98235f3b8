"""Vectors in a device's memory: the oracle's answer to the last bit, whatever the numbers."""

import numpy as np
import pytest
import torch

from blip2_search.indexes.exact import ExactIndex
from blip2_search.indexes.joined import Joined
from blip2_search.retrieval import gpu_index
from blip2_search.retrieval.errors import DeviceMemoryError
from blip2_search.retrieval.gpu_index import GpuIndex


def vectors(images=300, per_image=4, dim=64, dtype=np.float16):
    rng = np.random.default_rng(0)
    found = rng.standard_normal((images, 1, dim)) + 0.3 * rng.standard_normal(
        (images, per_image, dim)
    )
    return (found / np.linalg.norm(found, axis=-1, keepdims=True)).astype(dtype)


def assert_same(index, oracle, queries, k):
    found, expected = index.search(queries, k), oracle.search(queries, k)
    assert found.images.tolist() == expected.images.tolist()
    assert found.scores.tobytes() == expected.scores.tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("k", [1, 10, 300])
def test_equals_the_oracle(dtype, k, monkeypatch):
    features = vectors(dtype=dtype)
    queries = np.random.default_rng(1).standard_normal((20, 64))
    assert_same(GpuIndex(features, "cpu"), ExactIndex(features), queries, k)
    monkeypatch.setattr(gpu_index, "_IN_FLIGHT", 2000)
    assert_same(GpuIndex(features, "cpu"), ExactIndex(features), queries, k)


@pytest.mark.parametrize("scale", [1e-41, 1e-25, 1e-10, 1e10, 3e37])
def test_large_and_tiny_numbers(scale):
    features = (vectors(dtype=np.float64) * scale).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same(GpuIndex(features, "cpu"), ExactIndex(features), vectors()[:5, 0] * 2.0, 10)


def test_only_live_rows_are_found():
    features = vectors(30)
    live = np.array([0, 3, 4])
    joined = Joined([features[:10], features[10:]], [live, None])
    kept = np.concatenate((features[:10][live], features[10:]))
    assert_same(GpuIndex(joined, "cpu"), ExactIndex(kept), vectors()[:5, 0], 6)


def test_other_precisions_are_left_as_they_were():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        GpuIndex(vectors(9), "cpu").search(np.ones((1, 64)), 3)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_too_little_memory_is_one_sentence(monkeypatch):
    def full(*sizes, **how):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(DeviceMemoryError, match="do not fit into the GPU"):
        GpuIndex(vectors(9), "cpu")
