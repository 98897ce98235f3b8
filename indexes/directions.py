"""A few directions that hold most of what vectors are, and the bound that they give.

The vectors of a retrieval model fill few of their E directions: of `mini`'s 256, the first 48 hold
97 % of their energy. With orthonormal directions U (E, d), and what they leave of v and q,

    q . v  <=  (U'q) . (U'v) + |q - UU'q| |v - UU'v|

by Cauchy and Schwarz. Both terms are one inner product of d + 1 numbers, kept for every vector: the
bound.

Rounding. An inner product of n numbers is off by at most n * u of the product of the lengths, in the
first order of u = 2 ** -24 (Higham, Accuracy and Stability of Numerical Algorithms, 3.1); so the d
numbers U'v, taken as a vector, by sqrt(d) * E * u * |v|. What squares lose to underflow is less than
2 ** -110.

N images, Q vectors an image, E numbers a vector, d directions.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

from .base import Float32
from .files import replace_file
from .ranking import UNIT

TINY = 2.0**-55  # added to lengths, for what their squares lose to underflow
_VERSION = "1"  # of how shortcuts are computed: part of the key
_ENERGY = 0.95  # of the vectors, that the directions must hold
_STEP = 16  # directions come in multiples of it
_LARGEST_SHARE = 0.5  # of E; with more directions than this nothing is won
SAMPLE = 1 << 15  # vectors from which the directions are found


@dataclass(frozen=True, eq=False)
class Directions:
    """Orthonormal directions, those with most energy first."""

    matrix: Float32  # (E, d)
    found_on: int = 0  # images among which they were found
    model: str = ""  # the fingerprint of what made the vectors

    def __len__(self) -> int:
        """Give d."""
        return int(self.matrix.shape[1])

    @property
    def dim(self) -> int:
        """E."""
        return int(self.matrix.shape[0])

    @cached_property
    def skew(self) -> float:
        """How far they are from orthonormal, after rounding."""
        u = self.matrix.astype(np.float64)
        return float(np.linalg.norm(u.T @ u - np.eye(len(self))))

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits that tell them, and what is computed with them, from others."""
        digest = hashlib.blake2b(f"{_VERSION} {self.model} ".encode(), digest_size=8)
        digest.update(np.ascontiguousarray(self.matrix).data)
        return digest.hexdigest()

    def split(self, vectors: Float32) -> tuple[Float32, float]:
        """Vectors (..., E) along the directions, and the length of what these leave: (..., d + 1).

        The length comes from Pythagoras, rounded up by what rounding can take from it; and the
        greatest length of a vector.
        """
        along = vectors @ self.matrix
        whole = np.einsum("...e,...e->...", vectors, vectors)
        covered = np.einsum("...d,...d->...", along, along)
        slack = 2 * (np.sqrt(len(self)) + 1) * (self.dim + 4) * UNIT + 4 * self.skew
        left = np.sqrt(np.maximum(whole * (1 + slack) - covered * (1 - slack), 0) + TINY**2)
        longest = float(np.sqrt(whole.max(initial=0.0) * (1 + slack))) + TINY
        return np.concatenate((along, left[..., None]), axis=-1, dtype=np.float32), longest

    def margin(self, longest: float, query: float) -> float:
        """What rounding can take from a bound, for vectors and a query of these lengths."""
        terms = 2 * np.sqrt(len(self)) * self.dim + 4 * self.dim + 4 * (len(self) + 1)
        return float(longest * (query + TINY) * (1.1 * terms * UNIT + 4 * self.skew) + 2.0**-120)


def find_directions(
    features: npt.NDArray[Any], wanted: int | None = None, *, found_on: int = 0, model: str = ""
) -> Directions:
    """The directions along which a sample of the features (N, Q, E) has most energy.

    Args:
        features: of all images, or of some.
        wanted: d; None takes as many as hold 95 % of the vectors' energy, or all E where that is
            more than half of them.
        found_on: how many images there are.
        model: the fingerprint of what made the features.
    """
    dim = features.shape[2]
    step = -(-len(features) * features.shape[1] // SAMPLE) or 1
    sample = np.asarray(features[::step], np.float64).reshape(-1, dim)
    energy, directions = np.linalg.eigh(sample.T @ sample)  # ascending
    if wanted is None:
        share = np.cumsum(energy[::-1]) / max(float(energy.sum()), np.finfo(np.float64).tiny)
        needed = int(np.searchsorted(share, _ENERGY)) + 1
        wanted = -(-needed // _STEP) * _STEP
        if wanted > _LARGEST_SHARE * dim:
            wanted = dim
    matrix = np.ascontiguousarray(directions[:, ::-1][:, :wanted], np.float32)
    return Directions(matrix, found_on, model)


def write_directions(path: Path, directions: Directions) -> None:
    """Writes directions to an Arrow file, a row of the matrix each.

    Raises:
        OSError: it cannot be written.
    """
    about = {
        "found_on": str(directions.found_on), "model": directions.model, "key": directions.key,
    }  # fmt: skip
    column = pa.FixedSizeListArray.from_arrays(pa.array(directions.matrix.ravel()), len(directions))
    schema = pa.schema([("matrix", column.type)], metadata=about)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))
    replace_file(path, sink.getvalue())


def read_directions(path: Path) -> Directions | None:
    """The directions in a file; None where there is none, or not as it was written."""
    try:
        with pa.ipc.open_file(path.read_bytes()) as reader:
            column = reader.get_batch(0).column("matrix")
            about = reader.schema.metadata
            matrix = column.values.to_numpy().reshape(len(column), -1)
            found = Directions(matrix, int(about[b"found_on"]), about[b"model"].decode())
            return found if found.key == about[b"key"].decode() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        return None
