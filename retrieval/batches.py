"""The batches of training: which images, which captions, which crops, at every step.

Everything is drawn from (seed, epoch, image) alone, so that a batch is the same on every machine, over
any number of processes, and after a resumption.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..indexes.base import Float32
from .augment import crop_to_pixels
from .data import CaptionedImage, captions_and_owners
from .distributed import World
from .errors import DatasetError, ImageReadError
from .feature_cache import TokenCache
from .preprocess import ImageTransform, load_image
from .recipe import DataConfig


class Batch(NamedTuple):
    """One process's pairs of a batch."""

    images: Tensor  # pixels (b, 3, S, S), or encoder tokens (b, P, D), float32
    captions: list[str]  # b * K: the K of an image one after the other
    group_ids: Tensor  # (b,), int64
    skipped: list[str]  # why images were left out since the last batch, each with its name


class BatchSource(Protocol):
    """What the trainer reads from."""

    images: int | None  # in an epoch; None for a stream
    encoded: bool  # whether `Batch.images` are encoder tokens

    @property
    def captions(self) -> list[str] | None:
        """All that may come; None for a stream."""

    def batches(self, batch_size: int, first: int, seed: int, world: World) -> Iterator[Batch]:
        """Yield this process's share of the batches number `first`, `first + 1`, ... for ever."""
        ...


class CachedTokens:
    """Images whose encoder tokens were computed beforehand."""

    encoded = True

    def __init__(
        self, data: Sequence[CaptionedImage], cache: TokenCache, captions_per_image: int = 1
    ) -> None:
        """Take the cache of the images' paths, in their order."""
        self._data = [data[row] for row in cache.rows]
        if not self._data:
            raise DatasetError(f"no image can be read: {cache.skipped[0]}")
        self._groups = group_numbers(self._data)
        self._cache = cache
        self._captions_per_image = captions_per_image
        self.images: int | None = len(self._data)

    @property
    def captions(self) -> list[str] | None:
        """All of them."""
        return captions_and_owners(self._data)[0]

    def batches(self, batch_size: int, first: int, seed: int, world: World) -> Iterator[Batch]:
        """Yield batches; of each image one view is drawn, and its captions."""
        skipped = list(self._cache.skipped)
        for number in itertools.count(first):
            epoch, rows = epoch_rows(number, len(self._data), batch_size, seed)
            rows = rows[world.own(batch_size)]
            tokens, captions = [], []
            for row in rows:
                generator = np.random.default_rng((seed, epoch, int(row)))
                of_image = self._data[row].captions
                captions += draw_captions(of_image, self._captions_per_image, generator)
                views = self._cache.tokens[row]
                tokens.append(views[generator.integers(len(views))])
            images = torch.from_numpy(np.stack(tokens)).float()
            yield Batch(images, captions, torch.from_numpy(self._groups[rows]), skipped)
            skipped = []


class DrawnImages:
    """Images that are decoded and cropped afresh each time, by worker processes."""

    encoded = False

    def __init__(
        self, data: Sequence[CaptionedImage], transform: ImageTransform, config: DataConfig
    ) -> None:
        """Take the images, and how they become pixels."""
        self._data = data
        self._transform = transform
        self._config = config
        self.images: int | None = len(data)

    @property
    def captions(self) -> list[str] | None:
        """All of them."""
        return captions_and_owners(self._data)[0]

    def batches(self, batch_size: int, first: int, seed: int, world: World) -> Iterator[Batch]:
        """Yield batches; in place of an image that cannot be read stands the next one that can."""
        dataset = _Drawings(self._data, self._transform, self._config, seed)
        sampler = _Rows(len(self._data), batch_size, first, seed, world)
        return load_batches(dataset, self._config.workers, batch_sampler=sampler)


def load_batches(dataset: Dataset[Any], workers: int, **sampling: Any) -> Iterator[Batch]:
    """Yield the batches of a dataset of `Drawn`, decoded by worker processes.

    Args:
        dataset: an item may also be a DatasetError, which is raised here: raised in a worker, its
            message would be that worker's traceback.
        workers: processes; 0 decodes in this one.
        sampling: what else DataLoader wants to know.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        collate_fn=_collate,
        num_workers=workers,
        worker_init_fn=_start_worker,
        **sampling,
    )
    for batch in loader:
        if isinstance(batch, DatasetError):
            raise batch
        yield batch


def epoch_rows(
    number: int, images: int, batch_size: int, seed: int
) -> tuple[int, npt.NDArray[np.int64]]:
    """Return the epoch that a batch lies in, and its rows; the odd rest of an epoch is dropped."""
    epoch, i = divmod(number, images // batch_size)
    return epoch, _shuffled(images, seed, epoch)[i * batch_size : (i + 1) * batch_size]


@lru_cache(maxsize=2)
def _shuffled(images: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(images)


def group_numbers(data: Sequence[CaptionedImage]) -> npt.NDArray[np.int64]:
    """Number the groups of images: (N,)."""
    numbers = {group: i for i, group in enumerate(sorted({image.group for image in data}))}
    return np.array([numbers[image.group] for image in data], dtype=np.int64)


def draw_captions(captions: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Draw so many different captions; where there are fewer, they come again."""
    order = generator.permutation(len(captions))
    return [captions[i] for i in np.resize(order, count).tolist()]


class Drawn(NamedTuple):
    """One image and its captions, as a worker draws them."""

    pixels: Float32  # (3, S, S)
    captions: list[str]
    group: int
    skipped: list[str]


class _Rows:
    """The (epoch, row) pairs of this process's share of every batch."""

    def __init__(self, images: int, batch_size: int, first: int, seed: int, world: World) -> None:
        self._settings = images, batch_size, seed
        self._first = first
        self._own = world.own(batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in itertools.count(self._first):
            epoch, rows = epoch_rows(number, *self._settings)
            yield [(epoch, int(row)) for row in rows[self._own]]


class _Drawings(Dataset["Drawn | DatasetError"]):
    def __init__(
        self,
        data: Sequence[CaptionedImage],
        transform: ImageTransform,
        config: DataConfig,
        seed: int,
    ) -> None:
        self._data = data
        self._groups = group_numbers(data)
        self._transform = transform
        self._config = config
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Drawn | DatasetError:
        epoch, row = key
        skipped: list[str] = []
        for candidate in itertools.chain(range(row, len(self._data)), range(row)):
            image = self._data[candidate]
            try:
                loaded = load_image(image.path)
            except ImageReadError as error:
                skipped.append(str(error))
                continue
            generator = np.random.default_rng((self._seed, epoch, candidate))
            count = self._config.captions_per_image
            captions = draw_captions(image.captions, count, generator)
            pixels = crop_to_pixels(loaded, self._transform, self._config, generator)
            return Drawn(pixels, captions, int(self._groups[candidate]), skipped)
        return DatasetError(f"none of the {len(self._data)} images can be read: {skipped[0]}")


def _collate(items: Sequence[Drawn | DatasetError]) -> Batch | DatasetError:
    drawn = [item for item in items if isinstance(item, Drawn)]
    for item in items:
        if isinstance(item, DatasetError):
            return item
    return Batch(
        torch.from_numpy(np.stack([one.pixels for one in drawn])),
        [caption for one in drawn for caption in one.captions],
        torch.tensor([one.group for one in drawn]),
        [reason for one in drawn for reason in one.skipped],
    )


def _start_worker(worker: int) -> None:
    """Leave the signals that reach a whole group of processes to the trainer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
