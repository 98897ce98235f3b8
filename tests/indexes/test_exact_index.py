"""The oracle's own promises: right to float64, and the same whatever is scored together."""

import subprocess
import sys

import numpy as np
import pytest

from blip2_search.indexes import ranking
from blip2_search.indexes.exact import ExactIndex


def unit(rng, *shape):
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_scores_agree_with_float64(dtype):
    rng = np.random.default_rng(0)
    features, queries = unit(rng, 50, 32, 256).astype(dtype), unit(rng, 4, 256)
    found = ExactIndex(features).search(queries, 50)
    true = np.einsum("nqe,be->bnq", features.astype(np.float64), queries).max(axis=-1)
    np.testing.assert_allclose(
        found.scores, np.take_along_axis(true, found.images, 1), atol=1e-6, rtol=0
    )
    assert (np.diff(found.scores) <= 0).all()


def test_chunked_is_whole_to_the_last_bit(monkeypatch):
    rng = np.random.default_rng(0)
    features, query = unit(rng, 37, 3, 100), unit(rng, 100)
    whole = ranking.similarities(features, query)
    for limit in (1, 700, 1 << 30):
        monkeypatch.setattr(ranking.blocks, "__defaults__", (limit,))
        assert ranking.similarities(features, query).tobytes() == whole.tobytes()
    alone = [ranking.similarities(features[i : i + 1], query)[0] for i in range(37)]
    assert np.array(alone).tobytes() == whole.tobytes()


def test_blocks_cover_every_row_once():
    for count, size, limit in [(10, 3, 9), (10, 3, 1), (7, 1, 100), (0, 5, 10), (3, 0, 10)]:
        rows = [row for part in ranking.blocks(count, size, limit) for row in range(count)[part]]
        assert rows == list(range(count))
    assert [part.stop - part.start for part in ranking.blocks(10, 3, 9)] == [3, 3, 3, 1]


def test_importing_the_package_does_not_load_pyarrow():
    code = (
        "import sys, blip2_search.indexes, blip2_search.indexes.errors, blip2_search.indexes.base,"
        " blip2_search.indexes.exact;"
        "print(sorted({'pyarrow', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
