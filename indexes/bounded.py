"""Search that looks at a few numbers of every image, and at all of a few images.

N images, Q vectors an image, B queries, E numbers a vector, K = min(k, N) results; d directions.

A shortcut (see `shortcuts`) has a bound for every image that its similarity cannot exceed. An image
whose bound is below K similarities that are known is no answer, and is never looked at. Of the
others, those that rounding may have put in the wrong order are scored as the oracle does, so that
the answer is the oracle's to the last bit. That is the kind "exact".

The kind "compact" looks at the bounds of C candidates only: those whose mean is nearest to the query.
What it finds among them is exact, and how much that is of all has been measured (see `recall`).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from .base import Float32, Int64, SearchResult
from .directions import Directions, find_directions
from .joined import Joined
from .ranking import (
    IN_FLIGHT,
    best_first,
    blocks,
    check_features,
    check_k,
    check_queries,
    length,
    rounding,
    similarities_of,
    to_float32,
)
from .shortcuts import Shortcut, make_shortcut

DEPTH = 128  # results that a compact index's candidates are meant for
_FIRST = 2  # images looked at first, for each image wanted
_BOUNDS_HELD = 1 << 26  # bounds of all images for some queries: 256 MB in float32


class BoundedIndex:
    """Exact or compact search over images that may lie on disk; see `base.VectorIndex`."""

    def __init__(
        self,
        features: Joined,
        shortcuts: Sequence[Shortcut],
        directions: Directions,
        *,
        candidates: int | None = None,
        mean_directions: int | None = None,
    ) -> None:
        """Search features where they are; of a compact index the means are copied, nothing else.

        Args:
            features: (N, Q, E), float16 or float32, finite.
            shortcuts: of each part of the features, along the directions.
            directions: d of them.
            candidates: C, images whose bounds are looked at; None is all: exact.
            mean_directions: of the d, how many the means are compared along; None is all.
        """
        self._features = features
        self._shortcuts = shortcuts
        self._directions = directions
        self._bounds = Joined([shortcut.bounds for shortcut in shortcuts], features.live)
        self._longest = max((shortcut.longest for shortcut in shortcuts), default=0.0)
        self._candidates = candidates
        self._means = np.empty((0, 0), np.float32)
        if candidates is not None:
            self._means = self._copy_means(mean_directions or len(directions))

    def compact(self, candidates: int, mean_directions: int | None = None) -> BoundedIndex:
        """The same images, searched among candidates; see `__init__`."""
        if self._candidates is None or mean_directions != self._means.shape[1]:
            return BoundedIndex(
                self._features, self._shortcuts, self._directions,
                candidates=candidates, mean_directions=mean_directions,
            )  # fmt: skip
        other = copy(self)  # the means are the same
        other._candidates = candidates
        return other

    def _copy_means(self, mean_directions: int) -> Float32:
        """The means of all live images in one piece: (N, mean_directions)."""
        means = Joined([shortcut.means for shortcut in self._shortcuts], self._features.live)
        found = np.empty((len(means), mean_directions), np.float32)
        for images, part, live in means.by_part():
            columns = part[:, :mean_directions]
            found[images] = columns if live is None else columns[live]
        return found

    @property
    def num_images(self) -> int:
        """N."""
        return len(self._features)

    @property
    def dim(self) -> int:
        """E."""
        return self._directions.dim

    @property
    def directions(self) -> Directions:
        """The directions of the bounds."""
        return self._directions

    @property
    def candidates(self) -> int | None:
        """C, images whose bounds a query looks at; None is all of them: exact."""
        return self._candidates

    @property
    def nbytes(self) -> int:
        """Bytes that every query goes through: of the means, or of the bounds."""
        if self._candidates is not None:
            return self._means.nbytes
        return int(np.prod(self._bounds.shape)) * 4

    def search(self, queries: npt.ArrayLike, k: int) -> SearchResult:
        """Finds the K best images of each query; see `base.VectorIndex.search`.

        A compact index finds them among its candidates: not always all of them.
        """
        queries = check_queries(queries, self.dim)  # (B, E)
        count = check_k(k, self.num_images)
        images = np.empty((len(queries), count), np.int64)
        scores = np.empty((len(queries), count), np.float32)
        if not count:
            return SearchResult(scores=scores, images=images)
        for part in blocks(len(queries), self.num_images, _BOUNDS_HELD):
            near = self._near(queries[part], self._wanted(count))
            for row, (seen, bounds) in zip(range(part.start, part.stop), near, strict=True):
                images[row], scores[row] = self._answer(queries[row], seen, bounds, count)
        return SearchResult(scores=scores, images=images)

    def _wanted(self, count: int) -> int:
        """How many images are worth a look, for so many results.

        Candidates are enough for the best 128 (see `recall`); more results take more of them.
        """
        if self._candidates is None:
            return self.num_images
        return min(self.num_images, max(count, self._candidates * -(-count // DEPTH)))

    def _near(self, queries: Float32, wanted: int) -> list[tuple[Int64, Float32]]:
        """For each query the images (n,) worth a look, ascending, and their bounds (n,).

        A bound is infinite where float32 cannot tell.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            split = np.ascontiguousarray(self._directions.split(queries)[0].T)  # (d + 1, B)
            if wanted >= self.num_images:
                everyone = np.arange(self.num_images)
                near = [(everyone, bounds) for bounds in self._bounds_of_all(split)]
            else:
                near = [
                    (images, self._bounds_of(images, split[:, [row]]))
                    for row, images in enumerate(self._nearest_means(split, wanted))
                ]
            for query, (_, bounds) in zip(queries, near, strict=True):
                bounds += np.float32(self._directions.margin(self._longest, length(query)))
                bounds[~np.isfinite(bounds)] = np.inf
        return near

    def _nearest_means(self, split: Float32, wanted: int) -> list[Int64]:
        """The images (wanted,) of each query whose means are nearest, ascending."""
        products = self._means @ split[: self._means.shape[1]]  # (N, B)
        products[~np.isfinite(products)] = np.inf
        return [
            np.sort(np.argpartition(-column, wanted - 1)[:wanted])
            for column in np.ascontiguousarray(products.T)
        ]

    def _bounds_of_all(self, split: Float32) -> Float32:
        """What no similarity exceeds but for rounding, of all images: (B, N)."""
        found = np.empty((split.shape[1], self.num_images), np.float32)
        for images, part, live in self._bounds.by_part():
            maxima = _maxima(part, split)
            found[:, images] = (maxima if live is None else maxima[live]).T
        return found

    def _bounds_of(self, images: Int64, split: Float32) -> Float32:
        """The same of some images (n,), for one query: (n,)."""
        found = np.empty(len(images), np.float32)
        for some in blocks(len(images), int(np.prod(self._bounds.shape[1:]))):
            found[some] = _maxima(self._bounds[images[some]], split)[:, 0]
        return found

    def _answer(
        self, query: Float32, images: Int64, bounds: Float32, count: int
    ) -> tuple[Int64, Float32]:
        """The best of some images (n,) for a query, and their similarities."""
        margin = rounding(query, self._longest)
        first = min(len(images), _FIRST * count)
        seen = np.argpartition(-bounds, first - 1)[:first]
        scores = self._approximate(images[seen], query)
        # K images are at least this good: whoever cannot reach it is no answer.
        reach = bounds >= np.partition(scores, first - count)[first - count] - margin
        reach[seen] = False
        more = np.flatnonzero(reach)
        approximate = np.concatenate((scores, self._approximate(images[more], query)))
        if np.isfinite(approximate).all():
            # What rounding may have put in the wrong order is scored again, as the oracle does.
            images = images[np.concatenate((seen, more))]
            last = np.partition(approximate, len(images) - count)[len(images) - count]
            images = images[approximate >= last - 2 * margin]
        exact = similarities_of(self._features, images, query)
        best = best_first(exact, images, count)
        return images[best], exact[best]

    def _approximate(self, images: Int64, query: Float32) -> npt.NDArray[np.float64]:
        """The similarities of some images but for rounding: (n,) -> (n,)."""
        scores = np.empty(len(images), np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            for part in blocks(len(images), int(np.prod(self._features.shape[1:]))):
                scores[part] = (to_float32(self._features[images[part]]) @ query).max(axis=1)
        return scores


def index_in_memory(
    features: npt.NDArray[Any], directions: int | None = None, *, candidates: int | None = None
) -> BoundedIndex:
    """An index of features, with shortcuts of 4 * N * (Q * (d + 1) + d) bytes.

    >>> features = np.array([[[1, 0], [0, 1]], [[2, 0], [0, 0]], [[0, 1], [1, 0]]], np.float32)
    >>> index_in_memory(features).search([[0.0, 1.0], [1.0, 0.0]], k=2).images.tolist()
    [[0, 2], [1, 0]]

    Args:
        features: (N, Q, E), float16 or float32; not copied, and may lie on disk.
        directions: d; see `find_directions`.
        candidates: see `BoundedIndex`.

    Raises:
        VectorIndexError: another shape or type, or a number that is not finite.
    """
    check_features(features)
    found = find_directions(features, directions)
    shortcut = make_shortcut(found, features)
    return BoundedIndex(Joined([features]), [shortcut], found, candidates=candidates)


def _maxima(bounds: Float32, split: Float32) -> Float32:
    """The greatest product of each image: (n, Q, d + 1) and (d + 1, B) -> (n, B)."""
    images, per_image, size = bounds.shape
    found = np.empty((images, split.shape[1]), np.float32)
    for part in blocks(images, per_image * max(size, split.shape[1]), IN_FLIGHT):
        products = bounds[part].reshape(-1, size) @ split
        found[part] = products.reshape(-1, per_image, split.shape[1]).max(axis=1)
    return found
