"""Shortcuts: what a search looks at before it looks at vectors, for the images of a segment.

The bounds of `directions` rule most images out. An image's vectors are much alike, too: their mean
along the directions tells well enough which images are worth a look at their bounds.

On disk a shortcut is an Arrow file of two float32 columns, memory-mapped. It says nothing that the
features do not say: where it is missing, truncated or of another shape, it is computed anew.

N images, Q vectors an image, E numbers a vector, d directions.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

from .base import Float32
from .directions import Directions
from .files import replace_file
from .ranking import blocks, to_float32


@dataclass(frozen=True, eq=False)
class Shortcut:
    """Means and bounds of N images; they may lie on disk."""

    means: Float32  # (N, d), of each image's vectors along the directions
    bounds: Float32  # (N, Q, d + 1), see `Directions.split`
    longest: float  # the greatest length of a vector
    written: int | None = None  # the checksum in the file that it was read from


def make_shortcut(directions: Directions, features: npt.NDArray[Any]) -> Shortcut:
    """The shortcut to features (N, Q, E), float16 or float32."""
    images, per_image, _ = features.shape
    bounds = np.empty((images, per_image, len(directions) + 1), np.float32)
    longest = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # what is infinite bounds nothing
        for part in blocks(images, features[:1].size):
            bounds[part], length = directions.split(to_float32(features[part]))
            longest = max(longest, length)
        means = bounds[:, :, :-1].mean(axis=1)
    return Shortcut(means, bounds, longest)


def write_shortcut(path: Path, shortcut: Shortcut) -> None:
    """Writes a shortcut to a file, which is there whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    columns = [_column(shortcut.means), _column(shortcut.bounds)]
    about = {"longest": shortcut.longest.hex(), "crc32": str(_checksum(shortcut))}
    schema = pa.schema(
        [(name, column.type) for name, column in zip(("means", "bounds"), columns, strict=True)],
        metadata=about,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    replace_file(path, sink.getvalue())


def read_shortcut(path: Path, images: int, per_image: int, directions: int) -> Shortcut | None:
    """The shortcut in a file, mapped; None where there is none, or not of this shape."""
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            batch = reader.get_batch(0)
            about = reader.schema.metadata
            means, bounds = (
                batch.column(name).values.to_numpy(zero_copy_only=True).reshape(len(batch), -1)
                for name in ("means", "bounds")
            )
            bounds = bounds.reshape(images, per_image, directions + 1)
            longest = float.fromhex(about[b"longest"].decode())
            return Shortcut(means, bounds, longest, int(about[b"crc32"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        return None


def checksum_differs(shortcut: Shortcut) -> bool:
    """Whether a shortcut that was read is not what was written, as far as a checksum can tell."""
    return _checksum(shortcut) != shortcut.written


def _column(rows: Float32) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows[0].size)


def _checksum(shortcut: Shortcut) -> int:
    longest = zlib.crc32(shortcut.longest.hex().encode())
    return zlib.crc32(shortcut.bounds.data, zlib.crc32(shortcut.means.data, longest))
