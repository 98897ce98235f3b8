"""FAISS gives the oracle's answer to the last bit, by both of its ways; and says what it is."""

import sys
from types import ModuleType

import numpy as np
import pytest

from blip2_search.indexes import flat
from blip2_search.indexes.errors import VectorIndexError
from blip2_search.indexes.exact import ExactIndex
from blip2_search.indexes.flat import FaissIndex, faiss_build


def photos(images, per_image, dim, seed=0):
    """Features as a model makes them: the vectors of an image resemble each other."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((images, 1, dim)) + 0.5 * rng.standard_normal((images, per_image, dim))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def queries_of(count, dim, seed=1):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def assert_same(index, oracle, queries, k):
    found, expected = index.search(queries, k), oracle.search(queries, k)
    assert found.images.tolist() == expected.images.tolist()
    assert found.scores.tobytes() == expected.scores.tobytes()


@pytest.fixture(params=["default", "fetching", "scanning"])
def way(request, force):
    """Take the way that the index chooses, and force each of the two."""
    force(request.param)
    return request.param


@pytest.mark.usefixtures("way")
class TestEqualsTheOracle:
    """Images, order and scores."""

    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    @pytest.mark.parametrize(("images", "per_image"), [(1, 1), (60, 1), (40, 32)])
    def test_for_every_k(self, images, per_image, dtype):
        features = photos(images, per_image, 48).astype(dtype)
        index, oracle = FaissIndex(features), ExactIndex(features)
        for k in range(1, images + 1):
            assert_same(index, oracle, queries_of(2, 48), k)

    @pytest.mark.parametrize("batch", [1, 25, 300])
    def test_for_every_batch(self, batch):
        features = photos(64, 4, 32)
        assert_same(FaissIndex(features), ExactIndex(features), queries_of(batch, 32), 5)

    @pytest.mark.parametrize("dim", [1, 2, 3, 17, 256, 700])
    def test_for_every_dim(self, dim):
        features = photos(80, 2, dim)
        index, oracle = FaissIndex(features), ExactIndex(features)
        for k in (1, 7, 80):
            assert_same(index, oracle, queries_of(3, dim), k)

    def test_with_identical_images(self):
        features = np.repeat(photos(8, 4, 64), 12, axis=0)
        features = features[np.random.default_rng(2).permutation(len(features))]
        index, oracle = FaissIndex(features), ExactIndex(features)
        for k in range(1, len(features) + 1):
            assert_same(index, oracle, queries_of(2, 64), k)

    def test_where_rounding_decides(self):
        """Images a few last bits apart, which FAISS and numpy put in different orders."""
        rng = np.random.default_rng(3)
        features = np.repeat(photos(1, 1, 256), 400, axis=0)
        noise = rng.integers(-2, 3, features.shape) * np.spacing(features)
        features = features + noise.astype(np.float32)
        index, oracle = FaissIndex(features), ExactIndex(features)
        queries = features[:6, 0].copy()
        _, by_faiss = index._index.search(queries, 20)
        assert by_faiss.tolist() != oracle.search(queries, 20).images.tolist()  # the trap is set
        for k in (1, 2, 20, 399):
            assert_same(index, oracle, queries, k)

    def test_one_image_that_fills_every_fetch(self):
        """The best vectors all belong to one image: the second is found all the same."""
        features = photos(50, 32, 16)
        query = queries_of(1, 16)
        features[17] = query[0] * (1 + np.arange(32)[:, None] / 100)
        assert_same(FaissIndex(features), ExactIndex(features), query, 2)

    def test_large_and_tiny_numbers(self):
        features = photos(30, 3, 16) * np.logspace(-30, 10, 30)[:, None, None].astype(np.float32)
        index, oracle = FaissIndex(features), ExactIndex(features)
        for k in (1, 10, 30):
            assert_same(index, oracle, queries_of(4, 16), k)


def test_a_small_k_is_answered_without_scanning(monkeypatch):
    """Else FAISS would be there for nothing."""
    features = photos(200, 8, 32)
    oracle = ExactIndex(features)
    monkeypatch.setattr(flat, "_FIRST_FETCH", 1)  # too few: 3 vectors, of fewer than 3 images
    monkeypatch.setattr(
        FaissIndex, "_answer_by_scanning", lambda self, queries, rows, result: rows.any() and 1 / 0
    )
    assert_same(FaissIndex(features), oracle, queries_of(4, 32), 3)


def test_the_features_may_change_afterwards():
    features = photos(20, 2, 8)
    index, oracle = FaissIndex(features), ExactIndex(features.copy())
    features[:] = 0
    assert_same(index, oracle, queries_of(2, 8), 4)


class TestBuild:
    """Which FAISS is installed."""

    @pytest.fixture
    def install(self, monkeypatch):
        def pretend(gpu, **versions):
            module = ModuleType("faiss")
            module.__version__ = "9.9"
            if gpu:
                module.StandardGpuResources = object
            monkeypatch.setitem(sys.modules, "faiss", module)
            installed = {name.replace("_", "-"): version for name, version in versions.items()}
            monkeypatch.setattr(flat, "_version", installed.get)

        return pretend

    def test_the_real_one(self):
        import faiss

        assert faiss.__version__ in faiss_build()
        assert faiss_build().startswith("faiss-")

    def test_one(self, install):
        install(False, faiss_cpu="1.15.1")
        assert faiss_build() == "faiss-cpu 1.15.1"
        install(True, faiss_gpu="1.15.1")
        assert faiss_build() == "faiss-gpu 1.15.1"
        install(True, faiss_gpu_cu12="1.14")
        assert faiss_build() == "faiss-gpu-cu12 1.14"

    def test_name_and_module_disagree(self, install):
        install(False, faiss_gpu="1.15.1")
        assert faiss_build() == "faiss-gpu 1.15.1 (without GPU support)"
        install(True, faiss_cpu="1.15.1")
        assert faiss_build() == "faiss-cpu 1.15.1 (with GPU support)"

    def test_built_from_source_or_by_conda(self, install):
        install(True)
        assert faiss_build() == "faiss-gpu 9.9"
        install(False, faiss="1.9")
        assert faiss_build() == "faiss-cpu 9.9"

    def test_two_at_once(self, install):
        install(True, faiss_cpu="1", faiss_gpu="1")
        with pytest.raises(VectorIndexError, match="pip uninstall -y faiss-cpu faiss-gpu"):
            faiss_build()

    def test_none(self, install, monkeypatch):
        install(False)
        monkeypatch.setitem(sys.modules, "faiss", None)
        with pytest.raises(VectorIndexError, match="pip install faiss-cpu"):
            faiss_build()
        with pytest.raises(VectorIndexError, match="pip install faiss-cpu"):
            FaissIndex(photos(2, 2, 2))
