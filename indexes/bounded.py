"""Exact search that looks at a few directions of every vector, and at all of a few images.

N images, Q vectors an image, B queries, E numbers a vector, K = min(k, N) results; d directions.

The vectors of a retrieval model fill few of their E directions: of `mini`'s 256, the first 48 hold
97 % of their energy. With orthonormal directions U (E, d), and what they leave of v and q,

    q . v  <=  (U'q) . (U'v) + |q - UU'q| |v - UU'v|

by Cauchy and Schwarz. Both terms are one inner product of d + 1 numbers, kept for every vector: the
bound. An image whose bound is below K similarities that are known is no answer, and is never looked
at. Of the others, those that rounding may have put in the wrong order are scored as the oracle does,
so that the answer is the oracle's to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .base import Float32, Int64, SearchResult
from .ranking import best_first, blocks, check_features, check_k, check_queries, similarities_of

_ENERGY = 0.95  # of the vectors, that the directions must hold
_STEP = 16  # directions come in multiples of it
_LARGEST_SHARE = 0.5  # of E; with more directions than this nothing is won
_SAMPLE = 1 << 15  # vectors from which the directions are found
_FIRST = 2  # images looked at first, for each image wanted
_CACHED = 1 << 18  # numbers scored at once: 1 MB in float32 stays in a core's cache
_IN_FLIGHT = 1 << 22  # numbers held at once while searching, about: 16 MB in float32
_UNIT = 2.0**-24  # of float32's rounding


class BoundedIndex:
    """Bounds in memory, 4 * N * Q * (d + 1) bytes; see `base.VectorIndex` for the contract.

    >>> features = np.array([[[1, 0], [0, 1]], [[2, 0], [0, 0]], [[0, 1], [1, 0]]], np.float32)
    >>> BoundedIndex(features).search([[0.0, 1.0], [1.0, 0.0]], k=2).images.tolist()
    [[0, 2], [1, 0]]
    """

    def __init__(self, features: npt.NDArray[Any], directions: int | None = None) -> None:
        """Keeps the features, (N, Q, E) in float16 or float32, without a copy; they may lie on disk.

        Args:
            features: of all images.
            directions: d; None takes as many as hold 95 % of the vectors' energy, or all E where
                that is more than half of them.

        Raises:
            VectorIndexError: another shape or type, or a number that is not finite.
        """
        check_features(features)
        self._features = features
        self._directions = _find_directions(features, directions)  # (E, d)
        d = self._directions.shape[1]
        # How far the directions are from orthonormal, after rounding.
        u = self._directions.astype(np.float64)
        self._skew = float(np.linalg.norm(u.T @ u - np.eye(d)))
        self._bounds = np.empty((len(features), features.shape[1], d + 1), np.float32)
        self._longest = 0.0  # the greatest length of a vector
        with np.errstate(over="ignore", invalid="ignore"):  # see `_bounds_of`
            for part in blocks(len(features), features[:1].size, _IN_FLIGHT):
                vectors = np.asarray(features[part], np.float32)
                self._bounds[part], longest = self._split(vectors)
                self._longest = max(self._longest, longest)

    @property
    def num_images(self) -> int:
        """N."""
        return int(self._features.shape[0])

    @property
    def dim(self) -> int:
        """E."""
        return int(self._features.shape[2])

    @property
    def directions(self) -> int:
        """D."""
        return int(self._directions.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes in memory beside the features, which are read for a few images a query."""
        return int(self._bounds.nbytes)

    def search(self, queries: npt.ArrayLike, k: int) -> SearchResult:
        """Finds the K best images of each query; see `base.VectorIndex.search`."""
        queries = check_queries(queries, self.dim)  # (B, E)
        count = check_k(k, self.num_images)
        images = np.empty((len(queries), count), np.int64)
        scores = np.empty((len(queries), count), np.float32)
        if not count:
            return SearchResult(scores=scores, images=images)
        for part in blocks(len(queries), self.num_images, _IN_FLIGHT):
            for row, bounds in zip(
                range(part.start, part.stop), self._bounds_of(queries[part]), strict=True
            ):
                images[row], scores[row] = self._answer(queries[row], bounds, count)
        return SearchResult(scores=scores, images=images)

    def _bounds_of(self, queries: Float32) -> Float32:
        """What no similarity exceeds: (B, E) -> (B, N); infinite where float32 cannot tell."""
        with np.errstate(over="ignore", invalid="ignore"):
            split = self._split(queries)[0].T  # (d + 1, B)
            bounds = np.empty((self.num_images, len(queries)), np.float32)
            size = self._bounds[:1].size + self._bounds.shape[1] * len(queries)
            for part in blocks(self.num_images, size, _IN_FLIGHT):
                products = self._bounds[part].reshape(-1, len(split)) @ split
                products = products.reshape(-1, self._bounds.shape[1], len(queries))
                bounds[part] = products.max(axis=1)
            lengths = np.linalg.norm(queries.astype(np.float64), axis=1)
            bounds += (self._margin() * lengths).astype(np.float32)
        bounds[~np.isfinite(bounds)] = np.inf
        return bounds.T

    def _split(self, vectors: Float32) -> tuple[Float32, float]:
        """Vectors (..., E) along the directions, and the length of what these leave: (..., d + 1).

        The length comes from Pythagoras, rounded up by what rounding can take from it; and the
        greatest length of a vector.
        """
        along = vectors @ self._directions
        whole = np.einsum("...e,...e->...", vectors, vectors)
        covered = np.einsum("...d,...d->...", along, along)
        slack = 2 * (vectors.shape[-1] + 4) * _UNIT + 4 * self._skew
        left = np.sqrt(np.maximum(whole * (1 + slack) - covered * (1 - slack), 0))
        longest = float(np.sqrt(whole.max(initial=0.0) * (1 + slack)))
        return np.concatenate((along, left[..., None]), axis=-1), longest

    def _margin(self) -> float:
        """What rounding can take from a bound, for a query of length 1.

        Inner products and lengths of n numbers are off by at most n * u of the product of the
        lengths, in the first order of u = 2 ** -24 (Higham, Accuracy and Stability of Numerical
        Algorithms, 3.1): the oracle's own sum, the two along the directions and the two lengths.
        """
        terms = 4 * self.dim + 6 * (self.directions + 1)
        return self._longest * (1.1 * terms * _UNIT + 4 * self._skew) + 2.0**-100

    def _answer(self, query: Float32, bounds: Float32, count: int) -> tuple[Int64, Float32]:
        """The best images of a query, and their similarities."""
        margin = 2 * self._margin() * float(np.linalg.norm(query.astype(np.float64)))
        first = min(self.num_images, _FIRST * count)
        seen = np.argpartition(-bounds, first - 1)[:first]
        scores = self._approximate(seen, query)
        # K images are at least this good: whoever cannot reach it is no answer.
        reach = bounds >= np.partition(scores, first - count)[first - count] - margin
        reach[seen] = False
        more = np.flatnonzero(reach)
        images: Int64 = np.concatenate((seen, more))
        approximate = np.concatenate((scores, self._approximate(more, query)))
        if np.isfinite(approximate).all():
            # What rounding may have put in the wrong order is scored again, as the oracle does.
            last = np.partition(approximate, len(images) - count)[len(images) - count]
            images = images[approximate >= last - 2 * margin]
        else:
            images = np.arange(self.num_images)
        exact = similarities_of(self._features, images, query)
        best = best_first(exact, images, count)
        return images[best], exact[best]

    def _approximate(self, images: Int64, query: Float32) -> npt.NDArray[np.float64]:
        """The similarities of some images but for rounding: (n,) -> (n,)."""
        scores = np.empty(len(images), np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            for part in blocks(len(images), self._features[:1].size, _CACHED):
                vectors = self._features[images[part]].astype(np.float32)
                scores[part] = (vectors @ query).max(axis=1)
        return scores


def _find_directions(features: npt.NDArray[Any], wanted: int | None) -> Float32:
    """The directions (E, d) along which a sample of the vectors has most energy."""
    dim = features.shape[2]
    step = max(1, len(features) * features.shape[1] // _SAMPLE)
    sample = np.asarray(features[::step], np.float64).reshape(-1, dim)
    energy, directions = np.linalg.eigh(sample.T @ sample)  # ascending
    if wanted is None:
        share = np.cumsum(energy[::-1]) / max(float(energy.sum()), np.finfo(np.float64).tiny)
        needed = int(np.searchsorted(share, _ENERGY)) + 1
        wanted = -(-needed // _STEP) * _STEP
        if wanted > _LARGEST_SHARE * dim:
            wanted = dim
    return np.ascontiguousarray(directions[:, ::-1][:, :wanted], np.float32)
