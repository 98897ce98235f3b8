"""What a compact index finds of the exact answer, and how many candidates it must look at for it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .base import Float32
from .bounded import DEPTH, BoundedIndex
from .files import replace_file

TARGET = 0.999  # share of the exact answer's best 10 and 128 to be found
FEWEST, _MOST = 512, 20_000  # candidates


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A compact index's setting, and its mean recall of the exact answer over some queries."""

    directions: str  # their key
    images: int
    next_id: int  # of the store: tells how many images have come since
    queries: int
    mean_directions: int
    candidates: int | None  # None: as many as allowed find too little, and the index stays exact
    recall_at_10: float
    recall_at_128: float


def measure(
    exact: BoundedIndex, queries: Float32, mean_directions: int, next_id: int = 0
) -> Measured:
    """Finds the fewest candidates with which 0.999 of the best 10 and 128 images are found.

    Args:
        exact: the index.
        queries: (B, E), of texts such as people ask.
        mean_directions: of the means.
        next_id: of the store.
    """
    truth = exact.search(queries, DEPTH).images
    candidates = FEWEST
    index = exact
    while True:
        index = index.compact(candidates, mean_directions)
        found = index.search(queries, DEPTH).images
        at_10, at_128 = (recall(found, truth, depth) for depth in (10, DEPTH))
        enough = min(at_10, at_128) >= TARGET
        if enough or candidates == _MOST:
            return Measured(
                directions=exact.directions.key,
                images=exact.num_images,
                next_id=next_id,
                queries=len(queries),
                mean_directions=mean_directions,
                candidates=candidates if enough else None,
                recall_at_10=at_10,
                recall_at_128=at_128,
            )
        candidates = min(candidates * 3 // 2, _MOST)


def recall(
    found: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    truth: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    depth: int,
) -> float:
    """The mean share of the first `depth` images of `truth` (B, K) that `found` has there too."""
    shares = [
        len(np.intersect1d(ours[:depth], theirs[:depth])) / len(theirs[:depth])
        for ours, theirs in zip(found, truth, strict=True)
    ]
    return float(np.mean(shares))


def write_measured(path: Path, measured: Measured) -> None:
    """Writes what was measured.

    Raises:
        OSError: it cannot be written.
    """
    replace_file(path, json.dumps(asdict(measured), indent=1).encode())


def read_measured(path: Path) -> Measured | None:
    """What was measured; None where nothing was, or the file is not whole."""
    try:
        return Measured(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
