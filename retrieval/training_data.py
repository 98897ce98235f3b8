"""From the files of a run to its batches and its validation images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .batches import BatchSource, CachedTokens, DrawnImages
from .data import CaptionedImage, read_captioned
from .distributed import World, any_says
from .errors import DatasetError, EmptySplitError, ImageReadError, RecipeError
from .feature_cache import TokenCache, encoder_tokens
from .frozen_parts import frozen_encoder
from .model import Precision, RetrievalModel
from .preprocess import ImageTransform, load_image
from .progress import Prepare
from .recipe import DataConfig, Recipe, check_length
from .shards import Shards


@dataclass(frozen=True, kw_only=True)
class CaptionFile:
    """A file of captions or webdataset shards, and the folder that its paths are relative to."""

    file: str  # shards may be URLs, and in webdataset's notation
    images: Path

    @property
    def is_shards(self) -> bool:
        """Whether this names webdataset shards."""
        return self.file.endswith((".tar", ".tar.gz"))


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What to train on, and what to validate with."""

    source: BatchSource
    held_out: list[CaptionedImage]  # those that can be read; perhaps none
    held_out_tokens: TokenCache | None  # where the encoder is frozen; in their order
    skipped: list[str]  # why validation images were left out


def training_data(
    recipe: Recipe,
    model: RetrievalModel,
    files: Sequence[CaptionFile],
    cache: Path,
    *,
    precision: Precision,
    world: World,
    prepare: Prepare | None = None,
) -> TrainingData:
    """Read the files of a run, and encode what a frozen encoder can encode beforehand.

    Only the first process gets validation images; the others need none.

    Raises:
        DatasetError: a file cannot be used, or has nothing to train on.
        RecipeError: there are too few images for a batch.
    """
    config, train_config = recipe.data, recipe.train
    shards = [part.file for part in files if part.is_shards]
    train = [] if shards else _read(files, config.splits)
    held_out = _read(files, config.validation_splits, required=False)
    if not held_out:
        train, held_out = _hold_out(train, config.validation_share, train_config.seed)

    frozen = not train_config.train_encoder
    encode = frozen_encoder(model, precision) if frozen else None

    def tokens(images: Sequence[CaptionedImage], views: int, what: str) -> TokenCache:
        return encoder_tokens(
            model,
            [image.path for image in images],
            cache,
            config,
            views=views,
            seed=train_config.seed,
            precision=precision,
            encode=encode,
            on_progress=prepare(f"Encoding {what} images") if prepare else None,
        )

    if config.rows == "captions":
        train = [replace(image, captions=(one,)) for image in train for one in image.captions]
    if not shards:
        check_length(train_config, len(train))
    if shards:
        source: BatchSource = Shards(shards, _training_images(model, config), config)
    elif recipe.views:
        if not world.is_first:
            any_says(False)  # until the first has filled the cache
        source = CachedTokens(
            train, tokens(train, recipe.views, "training"), config.captions_per_image
        )
        if world.is_first:
            any_says(False)
    else:
        source = DrawnImages(train, _training_images(model, config), config)
    if not world.is_first:
        return TrainingData(source=source, held_out=[], held_out_tokens=None, skipped=[])
    cached = tokens(held_out, 1, "validation") if held_out and frozen else None
    if cached is not None:
        rows, skipped = cached.rows, cached.skipped
    else:
        rows, skipped = _readable(held_out)
    if held_out and not rows:
        raise DatasetError(f"no validation image can be read: {skipped[0]}")
    kept = [held_out[row] for row in rows]
    return TrainingData(source=source, held_out=kept, held_out_tokens=cached, skipped=skipped)


def _training_images(model: RetrievalModel, config: DataConfig) -> ImageTransform:
    """Return how an image becomes pixels in training, of `config.crop_size` if there is one."""
    if config.crop_size is None:
        return model.image_transform
    if not model.image_encoder.takes_any_size:
        raise RecipeError(
            "data.crop_size is for encoders that take images of any size, such as a convolutional "
            "network whose grid is pooled; this one takes those of data.image_size"
        )
    return ImageTransform(replace(model.config.preprocess, image_size=config.crop_size))


def _read(
    files: Sequence[CaptionFile], splits: Sequence[str], *, required: bool = True
) -> list[CaptionedImage]:
    """Read what lies in these splits, of all files that are no shards."""
    found: list[CaptionedImage] = []
    for part in files:
        if not part.is_shards:
            with suppress(EmptySplitError):
                found += read_captioned(Path(part.file), part.images, splits)
    if required and not found:
        names = ", ".join(part.file for part in files)
        raise EmptySplitError(f"{names}: no image in the split(s) {', '.join(splits)}")
    return found


def _hold_out(
    images: list[CaptionedImage], share: float, seed: int
) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """Divide images without a validation split, at random; a group stays together."""
    groups = sorted({image.group for image in images})
    count = round(share * len(groups))
    chosen = np.random.default_rng((seed, len(groups))).permutation(len(groups))[:count]
    held = {groups[i] for i in chosen}
    return (
        [image for image in images if image.group not in held],
        [image for image in images if image.group in held],
    )


def _readable(images: Sequence[CaptionedImage]) -> tuple[list[int], list[str]]:
    """Return which images can be decoded, and why the others cannot."""

    def problem(image: CaptionedImage) -> str | None:
        try:
            load_image(image.path)
        except ImageReadError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = list(pool.map(problem, images))
    rows = [row for row, reason in enumerate(problems) if reason is None]
    return rows, [reason for reason in problems if reason is not None]
