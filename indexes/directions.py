"""A few directions that hold most of what vectors are, and the bound that they give.

The vectors of a retrieval model fill few of their E directions: of `mini`'s 256, the first 48 hold
97 % of their energy. With orthonormal directions U (E, d), and what they leave of v and q,

    q . v  <=  (U'q) . (U'v) + |q - UU'q| |v - UU'v|

by Cauchy and Schwarz. Both terms are one inner product of d + 1 numbers, kept for every vector: the
bound.

N images, Q vectors an image, E numbers a vector, d directions.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .base import Float32
from .files import replace_file

UNIT = 2.0**-24  # of float32's rounding
_ENERGY = 0.95  # of the vectors, that the directions must hold
_STEP = 16  # directions come in multiples of it
_LARGEST_SHARE = 0.5  # of E; with more directions than this nothing is won
_SAMPLE = 1 << 15  # vectors from which the directions are found


@dataclass(frozen=True, eq=False)
class Directions:
    """Orthonormal directions, those with most energy first."""

    matrix: Float32  # (E, d)
    found_on: int  # images among which they were found

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
        """16 hexadecimal digits that tell them from others."""
        return hashlib.blake2b(self.matrix.tobytes(), digest_size=8).hexdigest()

    def split(self, vectors: Float32) -> tuple[Float32, float]:
        """Vectors (..., E) along the directions, and the length of what these leave: (..., d + 1).

        The length comes from Pythagoras, rounded up by what rounding can take from it; and the
        greatest length of a vector.
        """
        along = vectors @ self.matrix
        whole = np.einsum("...e,...e->...", vectors, vectors)
        covered = np.einsum("...d,...d->...", along, along)
        slack = 2 * (vectors.shape[-1] + 4) * UNIT + 4 * self.skew
        left = np.sqrt(np.maximum(whole * (1 + slack) - covered * (1 - slack), 0))
        longest = float(np.sqrt(whole.max(initial=0.0) * (1 + slack)))
        return np.concatenate((along, left[..., None]), axis=-1), longest


def find_directions(
    features: npt.NDArray[Any], wanted: int | None = None, *, found_on: int | None = None
) -> Directions:
    """The directions along which a sample of the features (N, Q, E) has most energy.

    Args:
        features: of all images, or of some.
        wanted: d; None takes as many as hold 95 % of the vectors' energy, or all E where that is
            more than half of them.
        found_on: how many images there are, if the features are of some.
    """
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
    matrix = np.ascontiguousarray(directions[:, ::-1][:, :wanted], np.float32)
    return Directions(matrix, len(features) if found_on is None else found_on)


def write_directions(path: Path, directions: Directions) -> None:
    """Writes directions to a file.

    Raises:
        OSError: it cannot be written.
    """
    content = io.BytesIO()
    np.savez(content, matrix=directions.matrix, found_on=directions.found_on)
    replace_file(path, content.getvalue())


def read_directions(path: Path) -> Directions | None:
    """The directions in a file; None where there is none, or not whole."""
    try:
        with open(path, "rb") as file, np.load(file) as saved:  # a zip: it has checksums
            return Directions(saved["matrix"], int(saved["found_on"]))
    except (OSError, ValueError, KeyError, zlib.error, zipfile.BadZipFile):
        return None
