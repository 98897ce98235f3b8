"""Captioned images for training and evaluation, read from the files that people have.

A Karpathy split file (Flickr8k, Flickr30K, COCO), a CSV or Parquet table of paths and captions, or a
JSON list of labelled photographs. Shards of webdataset are streamed instead: see `batches.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import DatasetError, EmptySplitError

PATH_COLUMNS = ("path", "image", "filepath", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
RATING = re.compile(r"ratings?(_?\d+)?")  # columns of ratings: rating, ratings, rating_1, ...
TEXT = (*PATH_COLUMNS, *CAPTION_COLUMNS, "split")
TEMPLATES = (  # of captions for a photograph that has a label only
    "{}",
    "a photo of {}",
    "a picture of {}",
    "a close-up of {}",
    "a photograph showing {}",
    "there is {} in the picture",
)


@dataclass(frozen=True, kw_only=True)
class CaptionedImage:
    """One image, all its captions, and what it is an example of."""

    path: Path
    captions: tuple[str, ...]
    group: str  # images of one group match each other's captions; by default an image's own path
    split: str = ""  # as the file says; "" where it says nothing


def read_split(file: Path, images: Path, split: str | None = None) -> list[CaptionedImage]:
    """Read the images of one split, for an evaluation.

    Args:
        file: see `read_captioned`.
        images: the folder that the paths in it are relative to.
        split: None is "test", or everything where the file names no splits.

    Raises:
        DatasetError: as `read_captioned`; the splits that there are, are named.
    """
    everything = read_captioned(file, images, None)
    known = sorted({image.split for image in everything} - {""})
    if split is None and not known:
        return everything
    found = [image for image in everything if image.split == (split or "test")]
    if not found:
        there = f"its splits are {', '.join(known)}" if known else "it names no splits"
        raise EmptySplitError(f"{file} has no image in the split {split or 'test'}: {there}")
    return found


def read_captioned(file: Path, images: Path, splits: Sequence[str] | None) -> list[CaptionedImage]:
    """Read captioned images from a file of any format that is understood; see the readers below.

    Args:
        file: `.json`, `.csv`, `.tsv` or `.parquet`.
        images: the folder that the paths in it are relative to.
        splits: the splits wanted, where the file has any; a file without belongs to "train". None
            is all of them.

    Raises:
        DatasetError: the file is missing, of another format, or has nothing in these splits.
    """
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv", ".parquet"):
        return read_table(file, images, splits)
    if suffix != ".json":
        raise DatasetError(f"{file}: captions come as .json, .csv, .tsv, .parquet or .tar shards")
    return _read_json(file, images, splits)


def read_karpathy(
    file: Path, images: Path, splits: Sequence[str] | None = ("train",)
) -> list[CaptionedImage]:
    """Read a Karpathy split file (`dataset_flickr8k.json`, `dataset_coco.json`, ...).

    Args:
        file: the JSON file.
        images: the folder that its file names are relative to (`filepath` is honoured, as in COCO).
        splits: the splits wanted; COCO trains on ("train", "restval").

    Raises:
        DatasetError: the file is missing, of another format, or has no image in these splits.
    """
    data = _load_json(file)
    if not isinstance(data, dict):
        raise DatasetError(f"{file} is not in Karpathy's format: it holds no object")
    return _karpathy_images(file, data, images, splits)


def read_table(
    file: Path, images: Path, splits: Sequence[str] | None = ("train",)
) -> list[CaptionedImage]:
    """Read a CSV, TSV or Parquet table: a column of paths, one of captions, perhaps one of splits.

    Rows of one path are captions of one image; a cell of a Parquet table may also hold a list.

    Raises:
        DatasetError: the table cannot be read, lacks a column, or has no row in these splits.
    """
    names, rows = read_columns(file)
    path = _column(file, names, PATH_COLUMNS)
    caption = _column(file, names, CAPTION_COLUMNS)
    captions: dict[tuple[str, str], list[str]] = {}  # by path and split
    for row in rows:
        if not _wanted(row.get("split"), splits) or not row[path] or not row[caption]:
            continue
        cell = [row[caption]] if isinstance(row[caption], str) else row[caption]
        if not isinstance(cell, list) or not all(isinstance(one, str) for one in cell):
            raise DatasetError(f"{file}: {row[caption]!r} in the column {caption} is no caption")
        captions.setdefault((str(row[path]), row.get("split") or ""), []).extend(cell)
    found = [
        CaptionedImage(
            path=images / name,
            captions=tuple(of),
            group=str(images / name),
            split=split,
        )
        for (name, split), of in captions.items()
    ]
    return _not_empty(found, file, splits)


def read_columns(file: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Read a CSV, TSV or Parquet table: the names of its columns, and the rows of those we know.

    Raises:
        DatasetError: the table cannot be read.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    try:
        if file.suffix.lower() == ".parquet":
            table = parquet.read_table(file)
        else:
            delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
            table = csv.read_csv(
                file,
                parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=csv.ConvertOptions(column_types=dict.fromkeys(TEXT, pa.string())),
            )
    except OSError as error:
        raise DatasetError(f"cannot read {file}: {error.strerror or error}") from error
    except pa.ArrowException as error:
        raise DatasetError(f"cannot read {file}: {error}") from error
    wanted = [name for name in table.column_names if name in TEXT or RATING.fullmatch(name)]
    return table.column_names, table.select(wanted).to_pylist()


def read_labelled(
    file: Path, images: Path, splits: Sequence[str] | None = ("train",)
) -> list[CaptionedImage]:
    """Read labelled photographs: a JSON list of {"filename", "label", perhaps "wnid" and "split"}.

    Captions come from the label through templates, and from its synonyms where its WordNet id is one
    of ImageNet's. Photographs of one class form a group: none is a negative of another.

    Raises:
        DatasetError: the file is missing, of another format, or has no image in these splits; one
            without a split is for training.
    """
    data = _load_json(file)
    if not isinstance(data, list):
        raise DatasetError(f"{file} holds no list of labelled photographs")
    return _labelled_images(file, data, images, splits)


def captions_and_owners(
    images: Sequence[CaptionedImage],
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return all captions (B), and the number of the image that each belongs to (B,)."""
    captions = [caption for image in images for caption in image.captions]
    return captions, np.repeat(np.arange(len(images)), [len(image.captions) for image in images])


def _wanted(split: str | None, splits: Sequence[str] | None) -> bool:
    return splits is None or (split or "train") in splits


def _read_json(file: Path, images: Path, splits: Sequence[str] | None) -> list[CaptionedImage]:
    data = _load_json(file)
    if isinstance(data, dict):
        return _karpathy_images(file, data, images, splits)
    return _labelled_images(file, data if isinstance(data, list) else [], images, splits)


def _load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise DatasetError(f"{file} is no JSON: {error}") from error


def _karpathy_images(
    file: Path, data: Mapping[str, Any], images: Path, splits: Sequence[str] | None
) -> list[CaptionedImage]:
    try:
        wanted = [entry for entry in data["images"] if _wanted(entry["split"], splits)]
        read = [_karpathy_image(entry, images) for entry in wanted]
        found = [image for image in read if image.captions]
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{file} is not in Karpathy's format: {error!r}") from error
    return _not_empty(found, file, splits)


def _karpathy_image(entry: Mapping[str, Any], images: Path) -> CaptionedImage:
    path = images / str(entry.get("filepath", "")) / str(entry["filename"])
    captions = tuple(sentence["raw"] for sentence in entry["sentences"])
    return CaptionedImage(path=path, captions=captions, group=str(path), split=str(entry["split"]))


def _labelled_images(
    file: Path, data: Iterable[Mapping[str, Any]], images: Path, splits: Sequence[str] | None
) -> list[CaptionedImage]:
    from timm.data.imagenet_info import ImageNetInfo

    imagenet: Any = ImageNetInfo("imagenet-1k")
    known = set(imagenet.label_names())
    found = []
    try:
        for entry in data:
            if not _wanted(entry.get("split"), splits):
                continue
            label, wnid = str(entry["label"]), str(entry.get("wnid", ""))
            lemmas = imagenet.label_name_to_description(wnid).split(", ") if wnid in known else []
            names = dict.fromkeys([label, *(lemma for lemma in lemmas if lemma.islower())])
            captions = tuple(
                template.format(with_article(name)) for name in names for template in TEMPLATES
            )
            path = images / str(entry["filename"])
            found.append(
                CaptionedImage(
                    path=path,
                    captions=captions,
                    group=wnid or label,
                    split=str(entry.get("split", "")),
                )
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{file} is no list of labelled photographs: {error!r}") from error
    return _not_empty(found, file, splits)


def with_article(label: str) -> str:
    """Put "a" or "an" before a label.

    >>> with_article("orange")
    'an orange'
    """
    return f"{'an' if label[0].lower() in 'aeiou' else 'a'} {label}"


def _column(file: Path, names: Sequence[str], known: Sequence[str]) -> str:
    for name in known:
        if name in names:
            return name
    raise DatasetError(f"{file} has no column called {', '.join(known)}; it has {', '.join(names)}")


def _not_empty(
    found: list[CaptionedImage], file: Path, splits: Sequence[str] | None
) -> list[CaptionedImage]:
    if not found:
        of = "" if splits is None else f" in the split(s) {', '.join(splits)}"
        raise EmptySplitError(f"{file} has no image{of}")
    return found
