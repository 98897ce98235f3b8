"""Several arrays of rows as one: the live rows of all segments, numbered through.

N live rows; a part is an array (rows, ...), which may lie on disk, and says which of its rows live.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .base import Int64


class Joined:
    """Rows of several arrays of one type, taken by their numbers; no more is read than is asked for.

    >>> joined = Joined([np.arange(4), np.arange(10, 12)], [np.array([0, 3]), None])
    >>> len(joined), joined[np.array([2, 0, 1])].tolist()
    (4, [10, 0, 3])
    """

    def __init__(
        self, parts: Sequence[npt.NDArray[Any]], live: Sequence[Int64 | None] | None = None
    ) -> None:
        """Join at least one part; `live` are the numbers of each's live rows, None for all."""
        self.parts = parts
        self.live = live or [None] * len(parts)
        counts = [
            len(part if rows is None else rows)
            for part, rows in zip(self.parts, self.live, strict=True)
        ]
        self._starts = np.cumsum([0, *counts])  # (parts + 1,)

    def __len__(self) -> int:
        """N."""
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...)."""
        return (len(self), *self.parts[0].shape[1:])

    def __getitem__(self, rows: Int64) -> npt.NDArray[Any]:
        """Copy rows: (n,) -> (n, ...)."""
        if len(self.parts) == 1:
            only = self.live[0]
            return self.parts[0][rows if only is None else only[rows]]
        found = np.empty((len(rows), *self.parts[0].shape[1:]), self.parts[0].dtype)
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in sorted(set(part_of.tolist())):  # np.unique would load numpy.ma
            places = np.flatnonzero(part_of == number)
            inside = rows[places] - self._starts[number]
            live = self.live[number]
            found[places] = self.parts[number][inside if live is None else live[inside]]
        return found

    def by_part(self) -> Iterator[tuple[slice, npt.NDArray[Any], Int64 | None]]:
        """Give the numbers of each part's live rows, the part, and which of its rows they are."""
        for start, stop, part, live in zip(
            self._starts, self._starts[1:], self.parts, self.live, strict=False
        ):
            yield slice(int(start), int(stop)), part, live
