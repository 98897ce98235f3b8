"""The contract of an index: many vectors an image, found by the best of them.

N images, Q vectors an image, B queries, E numbers a vector, K = min(k, N) results.

    similarity(query, image) = max over the image's Q vectors of (query . vector)

Every exact index gives the same answer, to the last bit: the K images of greatest similarity, in
descending order, and of equal similarities the lower image number first. An image's number is its
row in the features that the index was built from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .errors import VectorIndexError

Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The best images of each query, best first."""

    scores: Float32  # (B, K), descending
    images: Int64  # (B, K), image numbers


class VectorIndex(Protocol):
    """What a retriever needs of an index."""

    @property
    def num_images(self) -> int:
        """N."""

    @property
    def dim(self) -> int:
        """E."""

    def search(self, queries: npt.ArrayLike, k: int) -> SearchResult:
        """Finds the K best images of each query.

        Args:
            queries: (B, E), any float type, used as float32.
            k: how many images a query; more than N gives N.

        Raises:
            VectorIndexError: k < 1, queries not (B, E), or a number in them that is not finite.
        """


def search_any(index: VectorIndex, queries: npt.ArrayLike, k: int) -> tuple[Float32, Int64]:
    """Searches for one thing described by M vectors (image -> image): the best of them counts.

    Args:
        index: any index.
        queries: (M, E), M >= 1.
        k: how many images; more than N gives N.

    Returns:
        scores (K,) and images (K,): the K greatest of max over M of the similarity, ordered as
        `search` orders.

    Raises:
        VectorIndexError: as `search`, or M = 0.
    """
    # Each vector's own top K is enough, where the index is exact. Take an image that none of them
    # lists at its best vector: there, K images stand before it, so they do overall, and it is no
    # answer. Likewise an image whose best vector does not list it may get too low a score here, never
    # too high, and it was no answer to begin with.
    found = index.search(queries, k)
    if not len(found.images):
        raise VectorIndexError("A search needs at least one query vector.")
    if len(found.images) == 1:
        return found.scores[0], found.images[0]
    images, row = np.unique(found.images, return_inverse=True)
    scores = np.full(len(images), -np.inf, np.float32)
    np.maximum.at(scores, row.reshape(-1), found.scores.reshape(-1))
    best = np.lexsort((images, -scores))[: found.images.shape[1]]
    return scores[best], images[best]
