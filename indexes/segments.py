"""Segments: Parquet files of some images each, which are never written again.

The features are one fixed-size binary value an image: Q * E little-endian float16 numbers, as the
column's metadata says. Measured against a list of float16 (8,000 images of 32 x 256, one thread):
read in 0.02 s instead of 0.12 s, written in 0.15 s instead of 0.7 to 0.9 s. Any Parquet reader
takes them with

    numpy.frombuffer(value, "<f2").reshape(num_vectors, dim)

The column is the last one and lies in one piece, so the checksum of the records does not need the
features' bytes.

N images, Q vectors an image, E numbers a vector.
"""

from __future__ import annotations

import dataclasses
import os
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

from .manifest import Manifest, Segment

FEATURES = "features"
CHECKSUM = "features_crc32"  # of each image's features, to tell which are damaged; not in version 1
SUFFIX = ".parquet"
_PAGE = 1 << 30  # bytes: a column in one piece, which can be mapped


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """What is known of an image beside its features.

    Raises:
        ValueError: the path is not absolute, the size negative, or width or height below 1.
    """

    path: str  # absolute, as os.fsdecode gives it: any name a file can have
    size: int  # bytes
    mtime_ns: int
    content_hash: str  # `hash_file`
    width: int  # pixels
    height: int

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not os.path.isabs(self.path):
            raise ValueError(f"The path of an image must be absolute: {self.path!r}.")
        if self.size < 0 or self.width < 1 or self.height < 1:
            raise ValueError(f"An image has a size, a width and a height: {self!r}.")


def make_table(
    manifest: Manifest, first_id: int, records: Sequence[ImageRecord], features: npt.NDArray[Any]
) -> pa.Table:
    """The rows of a segment: records and their features (N, Q, E), with ids from `first_id` on."""
    columns = [
        range(first_id, first_id + len(records)),
        [os.fsencode(record.path) for record in records],
        [record.size for record in records],
        [record.mtime_ns for record in records],
        [record.content_hash for record in records],
        [record.width for record in records],
        [record.height for record in records],
        _checksums(features),
    ]
    schema = _schema(manifest)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=False)]
    content = pa.py_buffer(np.ascontiguousarray(features, "<f2"))
    arrays.append(pa.Array.from_buffers(schema.field(FEATURES).type, len(records), [None, content]))
    return pa.table(arrays, schema=schema)


def write_segment(folder: Path, tables: Sequence[pa.Table]) -> Segment:
    """Writes the rows of some tables as a new segment and waits until it is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / f"{uuid.uuid4().hex}{SUFFIX}"
    table = pa.concat_tables(tables)
    compression = dict.fromkeys(table.column_names, "zstd") | {FEATURES: "none"}
    with open(path, "xb") as file:
        pq.write_table(
            table,
            file,
            row_group_size=table.num_rows,  # one piece a column
            compression=compression,
            use_dictionary=False,
            write_statistics=False,
            data_page_size=_PAGE,
        )
        file.flush()
        os.fsync(file.fileno())
    return _describe(path, table)


def read_records(folder: Path, segment: Segment) -> Iterator[tuple[int, ImageRecord]]:
    """The live rows' ids and records, without their features.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    table = read_record_table(folder, segment)
    ids, records = table.column("id").to_pylist(), records_in(table)
    for row in segment.live:
        yield ids[row], records[row]


def read_features(folder: Path, segment: Segment, out: npt.NDArray[np.float16]) -> None:
    """Reads the live rows' features into `out`, float16 (live rows, Q, E).

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    table = _read(folder, segment, [FEATURES])
    live = segment.live if segment.removed else slice(None)
    out[...] = _numbers(table.column(FEATURES).combine_chunks(), out.shape[1:])[live]


def map_features(folder: Path, segment: Segment, shape: tuple[int, int]) -> npt.NDArray[np.float16]:
    """The features of all rows (rows, Q, E), the dead ones too, read when they are looked at.

    Their checksum is not looked at. A file from before version 3 is read whole.

    Args:
        folder: of the segments.
        segment: which.
        shape: (Q, E).

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    content = _open(folder, segment)
    if segment.features_at is None:
        return _numbers(_read(folder, segment, [FEATURES]).column(FEATURES).combine_chunks(), shape)
    count = segment.rows * shape[0] * shape[1]
    return np.frombuffer(content, "<f2", count, segment.features_at).reshape(-1, *shape)


def is_outdated(segment: Segment) -> bool:
    """Whether writing a segment again would let its features be mapped."""
    return segment.features_at is None and segment.features_end - segment.features_start < _PAGE


def records_in(table: pa.Table, rows: Sequence[int] | None = None) -> list[ImageRecord]:
    """The records of some rows of `read_record_table`, by their numbers; None is all."""
    names = [field.name for field in dataclasses.fields(ImageRecord)]
    if rows is None:
        columns = {name: table.column(name).to_pylist() for name in names}
    else:  # not `take`: it loads pyarrow.compute, which a query would wait for
        columns = {name: [table.column(name)[row].as_py() for row in rows] for name in names}
    columns["path"] = [os.fsdecode(path) for path in columns["path"]]
    values = zip(*columns.values(), strict=True)
    return [ImageRecord(**dict(zip(names, row, strict=True))) for row in values]


def read_rows(folder: Path, segment: Segment) -> pa.Table:
    """The live rows with all columns, to be written again.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    table = _with_checksums(_read(folder, segment, None))
    return table.take(pa.array(segment.live, pa.int64())) if segment.removed else table


def damaged_rows(folder: Path, segment: Segment) -> list[int] | None:
    """The live rows whose features are damaged; all of them where that cannot be told.

    None says that the file is whole; [] that what is damaged belongs to no live image.

    Raises:
        ValueError: the records are damaged too: the file says nothing that can be trusted.
        OSError: it cannot be read.
    """
    content = _open(folder, segment)
    start, end = segment.features_start, segment.features_end
    if _records_crc32(content, start, end) != segment.records_crc32:
        raise ValueError("the checksum of the records differs")
    if zlib.crc32(memoryview(content)[start:end]) == segment.features_crc32:
        return None
    try:
        table = pq.read_table(pa.BufferReader(content), columns=[CHECKSUM, FEATURES])
        expected = table.column(CHECKSUM).to_pylist()
        found = [zlib.crc32(value.as_py()) for value in table.column(FEATURES)]
    except (pa.ArrowException, OSError, KeyError):
        return segment.live
    return [row for row in segment.live if found[row] != expected[row]]


def rescue_rows(folder: Path, segment: Segment, damaged: Sequence[int]) -> pa.Table | None:
    """The live rows but for damaged ones, with all columns; None where none is left.

    Raises:
        OSError: the file cannot be read.
    """
    kept = sorted(set(segment.live) - set(damaged))
    if not kept:
        return None
    table = pq.read_table(pa.BufferReader(_open(folder, segment)), use_threads=False)
    return table.take(pa.array(kept, pa.int64()))


def _schema(manifest: Manifest) -> pa.Schema:
    shape = (manifest.num_vectors, manifest.dim)
    about = {"dtype": "float16, little-endian", "shape": f"{shape[0]} x {shape[1]}"}
    return pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("path", pa.binary(), nullable=False),  # os.fsencode: not always UTF-8
            pa.field("size", pa.int64(), nullable=False),
            pa.field("mtime_ns", pa.int64(), nullable=False),
            pa.field("content_hash", pa.string(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field(CHECKSUM, pa.uint32(), nullable=False),
            pa.field(FEATURES, pa.binary(shape[0] * shape[1] * 2), nullable=False, metadata=about),
        ]
    )


def _checksums(features: npt.NDArray[Any]) -> list[int]:
    return [zlib.crc32(np.ascontiguousarray(image, "<f2").data) for image in features]


def _with_checksums(table: pa.Table) -> pa.Table:
    """A table of version 1 with the checksums that it lacks."""
    if CHECKSUM in table.column_names:
        return table
    sums = [zlib.crc32(value.as_py()) for value in table.column(FEATURES)]
    field = pa.field(CHECKSUM, pa.uint32(), nullable=False)
    return table.add_column(table.num_columns - 1, field, pa.array(sums, pa.uint32()))


def _describe(path: Path, table: pa.Table) -> Segment:
    """What the manifest says of a file that was just written, of this table."""
    with pa.memory_map(str(path)) as file:
        content = file.read_buffer()
        group = pq.read_metadata(pa.BufferReader(content)).row_group(0)
        column = group.column(group.num_columns - 1)
        start = column.data_page_offset
        end = start + column.total_compressed_size
        # The numbers end the column's last page; are they all there in one piece?
        width = table.schema.field(FEATURES).type.byte_width
        at = end - table.num_rows * width
        written = 0
        for chunk in table.column(FEATURES).chunks:
            written = zlib.crc32(_numbers(chunk, (width // 2,)).data, written)
        in_one_piece = zlib.crc32(memoryview(content)[at:end]) == written
        return Segment(
            file=path.name,
            rows=group.num_rows,
            size=content.size,
            features_start=start,
            features_end=end,
            features_crc32=zlib.crc32(memoryview(content)[start:end]),
            records_crc32=_records_crc32(content, start, end),
            features_at=at if in_one_piece else None,
        )


def _records_crc32(content: pa.Buffer, start: int, end: int) -> int:
    """The checksum of everything but the features."""
    view = memoryview(content)
    return zlib.crc32(view[end:], zlib.crc32(view[:start]))


def _open(folder: Path, segment: Segment) -> pa.Buffer:
    """A file's bytes, mapped: what is not looked at is not read."""
    path = folder / segment.file
    size = path.stat().st_size
    if size != segment.size:
        raise ValueError(f"{size} bytes instead of {segment.size}")
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def read_record_table(folder: Path, segment: Segment) -> pa.Table:
    """All rows without their features, dead ones too, after a look at the checksum.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    content = _open(folder, segment)
    start, end = segment.features_start, segment.features_end
    if _records_crc32(content, start, end) != segment.records_crc32:
        raise ValueError("the checksum of the records differs")
    file = pq.ParquetFile(pa.BufferReader(content))  # not `read_table`: it loads pyarrow.dataset
    columns = [name for name in file.schema_arrow.names if name not in (CHECKSUM, FEATURES)]
    return file.read(columns, use_threads=False)


def _read(folder: Path, segment: Segment, columns: list[str] | None) -> pa.Table:
    """Some columns of all rows, the features among them, after a look at every checksum."""
    content = _open(folder, segment)
    start, end = segment.features_start, segment.features_end
    if _records_crc32(content, start, end) != segment.records_crc32:
        raise ValueError("the checksum of the records differs")
    if zlib.crc32(memoryview(content)[start:end]) != segment.features_crc32:
        raise ValueError("the checksum of the features differs")
    return pq.read_table(pa.BufferReader(content), columns=columns, use_threads=False)


def _numbers(column: pa.Array, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
    """The numbers of a features column, without a copy: (rows, Q, E)."""
    width = column.type.byte_width
    numbers = np.frombuffer(
        column.buffers()[1], "<f2", len(column) * width // 2, column.offset * width
    )
    return numbers.reshape(-1, *shape)
