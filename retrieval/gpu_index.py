"""Exact search with all vectors in a GPU's memory: for programs that stay and ask much.

The GPU compares the queries with every vector in float32. Its sums may round otherwise than the oracle's,
by no more than `ranking.rounding` says; images that this could have put in the wrong order are scored again
as the oracle does, from where the features lie, so that the answer is the oracle's to the last bit.

N images, Q vectors an image, B queries, E numbers a vector, K = min(k, N) results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..indexes.base import Float32, Int64, SearchResult
from ..indexes.joined import Joined
from ..indexes.ranking import (
    best_first,
    blocks,
    check_features,
    check_k,
    check_queries,
    rounding,
    similarities_of,
)
from .errors import DeviceMemoryError

_IN_FLIGHT = 1 << 28  # numbers computed with at once: 1 GB in float32
_FLUSHED = 2.0**-120  # more than what sums lose where a GPU takes tiny numbers for zero


class GpuIndex:
    """An index in a GPU's memory, 2 * N * Q * E bytes of it for float16; see `base.VectorIndex`."""

    def __init__(self, features: npt.NDArray[Any] | Joined, device: str = "cuda") -> None:
        """Copy features to a device.

        Args:
            features: (N, Q, E), float16 or float32, finite; looked at again where they are.
            device: any that PyTorch knows.

        Raises:
            VectorIndexError: an array of another shape or type, or not finite.
            DeviceMemoryError: they do not fit.
        """
        if not isinstance(features, Joined):
            check_features(features)
            features = Joined([features])
        self._features = features
        kind = torch.from_numpy(np.empty(0, features.parts[0].dtype)).dtype
        try:
            self._vectors = torch.empty(features.shape, dtype=kind, device=device)
        except torch.cuda.OutOfMemoryError:
            size = int(np.prod(features.shape)) * kind.itemsize
            raise DeviceMemoryError(
                f"{size / 1e9:.1f} GB of vectors do not fit into the GPU"
            ) from None
        self._longest = 0.0
        for rows in blocks(len(features), int(np.prod(features.shape[1:])), _IN_FLIGHT >> 3):
            part = torch.from_numpy(features[np.arange(rows.start, rows.stop)])
            self._vectors[rows] = part.to(device)
            longest = torch.linalg.vector_norm(part.double(), dim=-1).max()
            self._longest = max(self._longest, float(longest))

    @property
    def num_images(self) -> int:
        """N."""
        return len(self._features)

    @property
    def dim(self) -> int:
        """E."""
        return self._features.shape[2]

    @torch.inference_mode()
    def search(self, queries: npt.ArrayLike, k: int) -> SearchResult:
        """Finds the K best images of each query; see `base.VectorIndex.search`."""
        asked = check_queries(queries, self.dim)
        count = check_k(k, self.num_images)
        images = np.empty((len(asked), count), np.int64)
        scores = np.empty((len(asked), count), np.float32)
        for part in blocks(len(asked) if count else 0, self.num_images, _IN_FLIGHT >> 2):
            near = self._near(asked[part], count)
            for row, seen in zip(range(part.start, part.stop), near, strict=True):
                exact = similarities_of(self._features, seen, asked[row])
                best = best_first(exact, seen, count)
                images[row], scores[row] = seen[best], exact[best]
        return SearchResult(scores=scores, images=images)

    def _near(self, queries: Float32, count: int) -> Iterator[Int64]:
        """Give for each query the images, ascending, that may be among its K best."""
        found = self._scores(torch.from_numpy(queries).to(self._vectors.device))  # (B, N)
        last = found.topk(count, dim=1).values[:, -1]
        for query, scores, least in zip(queries, found, last, strict=True):
            reach = ~scores.isfinite()
            if not reach.any():
                margin = 2 * rounding(query, self._longest) + _FLUSHED
                reach = scores.double() >= least.double() - margin
            else:  # float32 is too small for them: all are looked at
                reach = torch.ones_like(reach)
            yield reach.nonzero()[:, 0].cpu().numpy()

    def _scores(self, queries: Tensor) -> Tensor:
        """Return the similarities but for rounding: (B, E) -> (B, N)."""
        found = torch.empty((len(queries), self.num_images), device=queries.device)
        per_image = self._vectors.shape[1]
        with _full_precision():
            for rows in blocks(
                self.num_images, per_image * max(self.dim, len(queries)), _IN_FLIGHT
            ):
                vectors = self._vectors[rows].float().flatten(0, 1)  # (n Q, E)
                products = (vectors @ queries.T).view(-1, per_image, len(queries))
                found[:, rows] = products.amax(dim=1).T
        return found


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply in float32 proper, whatever the program has allowed elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
