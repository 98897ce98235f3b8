"""What all indexes share: checks of input, the similarity, and the order of the results.

N images, Q vectors an image, B queries, E numbers a vector.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .base import Float32, Int64
from .errors import VectorIndexError
from .joined import Joined

UNIT = 2.0**-24  # of float32's rounding
CACHED = 1 << 18  # numbers computed with at once: 1 MB in float32 stays in a core's cache
IN_FLIGHT = 1 << 22  # numbers held at once: 16 MB in float32
_SIGN_EXPONENT_MANTISSA = np.uint32(0x8FFFE000).view(
    np.int32
)  # of a float16, where float32 has them
_HALF_TO_SINGLE = np.float32(2.0**112)


def check_features(features: npt.NDArray[Any]) -> None:
    """Raises VectorIndexError unless features are finite float16 or float32 (N, Q, E)."""
    if features.ndim != 3 or 0 in features.shape[1:]:
        raise VectorIndexError(
            f"Features must have shape (images, vectors, dim), not {features.shape}."
        )
    if features.dtype not in (np.float16, np.float32):
        raise VectorIndexError(f"Features must be float16 or float32, not {features.dtype}.")
    for part in blocks(len(features), features[:1].size):
        if not np.isfinite(features[part]).all():
            raise VectorIndexError("Features must be finite: some are NaN or infinite.")


def check_queries(queries: npt.ArrayLike, dim: int) -> Float32:
    """Returns the queries as contiguous float32 (B, dim).

    Raises:
        VectorIndexError: they are of another shape, not numbers, or not finite.
    """
    try:
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, refused below
            checked = np.ascontiguousarray(queries, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise VectorIndexError(f"Queries must be numbers of shape (queries, {dim}).") from error
    if checked.ndim != 2 or checked.shape[1] != dim:
        raise VectorIndexError(
            f"Queries must have shape (queries, {dim}), not {np.shape(queries)}."
        )
    if not np.isfinite(checked).all():
        raise VectorIndexError("Queries must be finite: some numbers are NaN or infinite.")
    return checked


def check_k(k: int, num_images: int) -> int:
    """Returns K = min(k, N); raises VectorIndexError unless k is a whole number of at least 1."""
    try:
        wanted = operator.index(k)
    except TypeError as error:
        raise VectorIndexError(f"k must be a whole number, not {k!r}.") from error
    if wanted < 1:
        raise VectorIndexError(f"k must be at least 1, not {wanted}.")
    return min(wanted, num_images)


def blocks(count: int, size: int, limit: int = CACHED) -> Iterator[slice]:
    """Cuts `count` rows of `size` numbers into slices of some `limit` numbers, at least a row."""
    step = max(1, limit // max(1, size))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def to_float32(features: npt.NDArray[Any]) -> Float32:
    """Finite float16 or float32 numbers as float32; of float16 a copy, in a fifth of `astype`'s time.

    A float16's bits, moved to where a float32 has its exponent and mantissa, are the number divided by
    2 ** 112: the two exponents count from 15 and from 127. Multiplying is exact, subnormals included.
    """
    if features.dtype == np.float32:
        return features
    bits = features.view(np.int16).astype(np.int32)  # the sign fills the upper half
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _SIGN_EXPONENT_MANTISSA, out=bits)
    floats = bits.view(np.float32)
    return np.multiply(floats, _HALF_TO_SINGLE, out=floats)


def similarities(features: npt.NDArray[Any], query: Float32) -> Float32:
    """Similarity of each image to one query: features (N, Q, E) and query (E,) -> (N,).

    A similarity depends on its own image alone, to the last bit, however many images are scored at
    once: each inner product is one row's product and numpy's pairwise sum along E. A matrix product
    would be faster, but its rounding changes with the shape of the whole.
    """
    scores = np.empty(len(features), np.float32)
    for part in blocks(len(features), features[:1].size):
        products = np.multiply(to_float32(features[part]), query)  # (n, Q, E)
        scores[part] = products.sum(axis=-1).max(axis=-1)
    return scores


def similarities_of(features: npt.NDArray[Any] | Joined, images: Int64, query: Float32) -> Float32:
    """Similarities of some images, by their numbers (n,), to one query: (n,); see `similarities`."""
    scores = np.empty(len(images), np.float32)
    for part in blocks(len(images), int(np.prod(features.shape[1:])), IN_FLIGHT):
        scores[part] = similarities(features[images[part]], query)
    return scores


def rounding(query: Float32, longest: float) -> float:
    """The most by which two float32 sums of a query's (E,) inner product with any vector can differ.

    Args:
        query: the query.
        longest: no vector's length is greater.
    """
    return 1.01 * 2 * len(query) * (UNIT * length(query) * longest + 2.0**-149)


def length(query: Float32) -> float:
    """The length of a query (E,)."""
    return float(np.linalg.norm(query.astype(np.float64)))


def best_first(scores: Float32, images: Int64, k: int) -> Int64:
    """Positions of the k best, of equal scores the lower image first: (n,), (n,) -> (k,)."""
    if k < len(scores):  # only what can be among the k best is worth sorting
        cut = np.partition(scores, len(scores) - k)[len(scores) - k]
        kept = np.flatnonzero(scores >= cut)
        return kept[np.lexsort((images[kept], -scores[kept]))[:k]]
    return np.lexsort((images, -scores))
