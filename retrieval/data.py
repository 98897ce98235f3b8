"""Captioned images for training and evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import DatasetError


@dataclass(frozen=True, kw_only=True)
class CaptionedImage:
    """One image, all its captions, and what it is an example of."""

    path: Path
    captions: tuple[str, ...]
    group: str  # images of one group match each other's captions; by default an image's own path


def read_karpathy(
    file: Path, images: Path, splits: Sequence[str] = ("train",)
) -> list[CaptionedImage]:
    """Read a Karpathy split file (`dataset_flickr8k.json`, `dataset_coco.json`, ...).

    Args:
        file: the JSON file.
        images: the folder that its file names are relative to (`filepath` is honoured, as in COCO).
        splits: the splits wanted; COCO trains on ("train", "restval").

    Raises:
        DatasetError: the file is missing, of another format, or has no image in these splits.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["images"]
        wanted = [entry for entry in entries if entry["split"] in splits]
        found = [_karpathy_image(entry, images) for entry in wanted]
    except OSError as error:
        raise DatasetError(f"cannot read {file}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{file} is not in Karpathy's format: {error!r}") from error
    if not found:
        raise DatasetError(f"{file} has no image in the split(s) {', '.join(splits)}")
    return found


def _karpathy_image(entry: dict[str, object], images: Path) -> CaptionedImage:
    path = images / str(entry.get("filepath", "")) / str(entry["filename"])
    sentences = entry["sentences"]
    if not isinstance(sentences, list):
        raise TypeError("sentences is no list")
    return CaptionedImage(
        path=path, captions=tuple(sentence["raw"] for sentence in sentences), group=str(path)
    )


def captions_and_owners(
    images: Sequence[CaptionedImage],
) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return all captions (B), and the number of the image that each belongs to (B,)."""
    captions = [caption for image in images for caption in image.captions]
    return captions, np.repeat(np.arange(len(images)), [len(image.captions) for image in images])
