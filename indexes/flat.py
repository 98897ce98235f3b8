"""Exact search by FAISS over all N * Q vectors, grouped to images; and which FAISS is installed.

N images, Q vectors an image, B queries, E numbers a vector, K = min(k, N) results.

FAISS knows vectors, not images, and sums in another order than the oracle, so its scores may differ
in the last bits. Two steps make the answer the oracle's:

1. Gather images with FAISS's scores until no other image can belong to the answer. Either fetch the
   best vectors, more and more of them; or, when that would be a large share of all, take the
   maximum of every image.
2. Score the few images that can still win exactly as the oracle does, and order them.

Both steps allow for a margin: the most by which two float32 inner products of the same vectors can
differ.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from .base import Float32, Int64, SearchResult
from .errors import VectorIndexError
from .ranking import best_first, blocks, check_features, check_k, check_queries, similarities_of

_FIRST_FETCH = 16  # vectors fetched for each image wanted: those of an image come together
_GROWTH = 4  # how many times more are fetched when that was too few
_SCAN_SHARE = 4  # fetching more than 1/4 of all vectors costs more than the maximum of every image
_IN_FLIGHT = 1 << 22  # numbers held at once while searching, about: 16 MB in float32

_DISTRIBUTIONS = (
    "faiss",
    "faiss-cpu",
    "faiss-cuda",
    "faiss-gpu",
    "faiss-gpu-cu11",
    "faiss-gpu-cu12",
    "faiss-gpu-cu12-cuvs",
    "faiss-gpu-cu13-cuvs",
    "faiss-gpu-cuvs",
)


class FaissIndex:
    """FAISS over N * Q vectors, in memory as float32; see `base.VectorIndex` for the contract."""

    def __init__(self, features: npt.NDArray[Any]) -> None:
        """Copies the features, (N, Q, E) in float16 or float32, into FAISS: 4 * N * Q * E bytes.

        Raises:
            VectorIndexError: another shape or type, a number that is not finite, or no faiss.
        """
        check_features(features)
        self._shape: tuple[int, int, int] = features.shape
        self._faiss = _import_faiss()
        self._index: Any = self._faiss.IndexFlatIP(self.dim)
        self._longest = 0.0  # the greatest length of a vector
        for part in blocks(len(features), features[:1].size, _IN_FLIGHT):
            vectors = np.ascontiguousarray(features[part], np.float32).reshape(-1, self.dim)
            self._index.add(vectors)
            self._longest = max(self._longest, float(np.linalg.norm(vectors, axis=1).max()))

    @property
    def num_images(self) -> int:
        """N."""
        return self._shape[0]

    @property
    def dim(self) -> int:
        """E."""
        return self._shape[2]

    def search(self, queries: npt.ArrayLike, k: int) -> SearchResult:
        """Finds the K best images of each query; see `base.VectorIndex.search`."""
        queries = check_queries(queries, self.dim)  # (B, E)
        count = check_k(k, self.num_images)
        result = SearchResult(
            scores=np.empty((len(queries), count), np.float32),
            images=np.empty((len(queries), count), np.int64),
        )
        pending = np.arange(len(queries) if count else 0)  # the rows without an answer yet
        fetch = _FIRST_FETCH * count
        while len(pending) and fetch * _SCAN_SHARE <= self._index.ntotal:
            pending = self._answer_by_fetching(queries, pending, fetch, result)
            fetch *= _GROWTH
        self._answer_by_scanning(queries, pending, result)
        return result

    def _answer_by_fetching(
        self, queries: Float32, rows: Int64, fetch: int, result: SearchResult
    ) -> Int64:
        """Answers the rows for which the best `fetch` vectors are enough; returns the others."""
        missed = []
        for part in blocks(len(rows), fetch, _IN_FLIGHT):
            scores, vectors = self._index.search(
                queries[rows[part]], fetch
            )  # (b, fetch), descending
            for row, row_scores, row_vectors in zip(rows[part], scores, vectors, strict=True):
                images, first = np.unique(row_vectors // self._shape[1], return_index=True)
                if not self._answer(
                    queries, row, images, row_scores[first], float(row_scores[-1]), result
                ):
                    missed.append(row)
        return np.array(missed, np.int64)

    def _answer_by_scanning(self, queries: Float32, rows: Int64, result: SearchResult) -> None:
        """Answers the rows from the maximum of every image."""
        images, per_image, _ = self._shape
        everyone = np.arange(images)
        for part in blocks(len(rows), images, _IN_FLIGHT):
            batch = queries[rows[part]].T  # (E, b)
            maxima = np.empty((images, batch.shape[1]), np.float32)
            for some in blocks(images, per_image * max(batch.shape), _IN_FLIGHT):
                products = self._vectors()[some].reshape(-1, self.dim) @ batch  # (n * Q, b)
                maxima[some] = products.reshape(-1, per_image, batch.shape[1]).max(axis=1)
            for row, approximate in zip(rows[part], maxima.T, strict=True):
                self._answer(queries, row, everyone, approximate, -np.inf, result)

    def _answer(
        self,
        queries: Float32,
        row: int,
        images: Int64,
        approximate: npt.NDArray[np.floating[Any]],
        unseen: float,
        result: SearchResult,
    ) -> bool:
        """Writes a row's answer if it lies among the images seen.

        Args:
            queries: (B, E).
            row: which query, and where the answer goes.
            images: (n,), the images seen.
            approximate: (n,), their similarities but for rounding.
            unseen: the greatest similarity, but for rounding, that an image not seen can have.
            result: receives the answer.

        Returns:
            False, with nothing written, if an image not seen may belong to the answer.
        """
        count = result.images.shape[1]
        if len(images) < count:
            return False
        # K images are at least as good as `last - margin`. An image below `last - 2 * margin` is
        # worse than each of them, whatever the rounding; with less distance than that it may be
        # better, or equal with a lower number. (float64: a cut rounded to float32 may be too high.)
        approximate = approximate.astype(np.float64)
        last = np.partition(approximate, len(approximate) - count)[len(approximate) - count]
        cut = last - 2 * self._margin(queries[row])
        if len(images) < self.num_images and unseen >= cut:
            return False
        images = images[approximate >= cut]
        scores = similarities_of(self._vectors(), images, queries[row])
        best = best_first(scores, images, count)
        result.images[row], result.scores[row] = images[best], scores[best]
        return True

    def _margin(self, query: Float32) -> float:
        """The most by which two sums of the query's inner product with any vector can differ.

        Each is off by at most E * u * |query| * |vector|, in the first order of u = 2 ** -24
        (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). The hundredth more covers
        the other orders, the last term underflow.
        """
        length = float(np.linalg.norm(query.astype(np.float64)))
        return 1.01 * 2 * self.dim * (2.0**-24 * length * self._longest + 2.0**-149)

    def _vectors(self) -> Float32:
        """FAISS's own copy of the features, (N, Q, E): a view, no second copy."""
        flat = self._faiss.rev_swig_ptr(self._index.get_xb(), self._index.ntotal * self.dim)
        vectors: Float32 = flat.reshape(self._shape)
        return vectors


def faiss_build() -> str:
    """Says which FAISS is in use, such as "faiss-cpu 1.15.1".

    Raises:
        VectorIndexError: none is installed, or several are: they overwrite each other's files.
    """
    installed = [name for name in _DISTRIBUTIONS if _version(name)]
    if len(installed) > 1:
        raise VectorIndexError(
            f"{' and '.join(installed)} are installed together and overwrite each other's files: "
            f"run `pip uninstall -y {' '.join(installed)}`, then `pip install` the one you want."
        )
    faiss = _import_faiss()
    on_gpu = hasattr(faiss, "StandardGpuResources")
    if not installed or installed == ["faiss"]:  # built from source, or conda's: one name for both
        return f"faiss-{'gpu' if on_gpu else 'cpu'} {getattr(faiss, '__version__', '')}".rstrip()
    build = f"{installed[0]} {_version(installed[0])}"
    return (
        build
        if on_gpu == ("cpu" not in installed[0])
        else f"{build} ({'with' if on_gpu else 'without'} GPU support)"
    )


def _version(distribution: str) -> str | None:
    """The version of an installed distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_faiss() -> Any:
    """Imports faiss; raises VectorIndexError with the command that installs it."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise VectorIndexError(
            f"FAISS cannot be used ({error}): run `pip install faiss-cpu` (or faiss-gpu)."
        ) from error
