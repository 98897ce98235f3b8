"""The oracle: exact search in plain numpy, which every other index is held to."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .base import SearchResult
from .ranking import best_first, check_features, check_k, check_queries, similarities


class ExactIndex:
    """Scores every image for every query; see `base.VectorIndex` for the contract.

    >>> import numpy as np
    >>> features = np.array([[[1, 0], [0, 1]], [[2, 0], [0, 0]], [[0, 1], [1, 0]]], np.float32)
    >>> found = ExactIndex(features).search([[0.0, 1.0], [1.0, 0.0]], k=2)
    >>> found.images.tolist()
    [[0, 2], [1, 0]]
    >>> found.scores.tolist()
    [[1.0, 1.0], [2.0, 1.0]]
    """

    def __init__(self, features: npt.NDArray[Any]) -> None:
        """Keeps the features, (N, Q, E) in float16 or float32, without a copy.

        Raises:
            VectorIndexError: another shape or type, or a number that is not finite.
        """
        check_features(features)
        self._features = features

    @property
    def num_images(self) -> int:
        """N."""
        return int(self._features.shape[0])

    @property
    def dim(self) -> int:
        """E."""
        return int(self._features.shape[2])

    def search(self, queries: npt.ArrayLike, k: int) -> SearchResult:
        """Finds the K best images of each query; see `base.VectorIndex.search`."""
        queries = check_queries(queries, self.dim)  # (B, E)
        count = check_k(k, self.num_images)
        images = np.empty((len(queries), count), np.int64)
        scores = np.empty((len(queries), count), np.float32)
        numbers = np.arange(self.num_images)
        for row, query in enumerate(queries):
            every = similarities(self._features, query)  # (N,)
            images[row] = best_first(every, numbers, count)
            scores[row] = every[images[row]]
        return SearchResult(scores=scores, images=images)
