"""The batches of training: which images, which captions, which crops, at every step.

Everything is drawn from (seed, epoch, image) alone, so that a batch is the same on every machine, over
any number of processes, and after a resumption.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from .augment import random_crop
from .data import CAPTION_COLUMNS, CaptionedImage
from .distributed import World
from .errors import DatasetError, ImageReadError
from .feature_cache import TokenCache
from .preprocess import ImageTransform, load_image
from .recipe import DataConfig

SHUFFLED_SAMPLES = 1000  # of a stream, held in memory so that neighbours part
SKIPPED_IN_A_ROW = 100  # of a stream, before it is given up


class Batch(NamedTuple):
    """One process's pairs of a batch."""

    images: Tensor  # pixels (b, 3, S, S), or encoder tokens (b, P, D), float32
    captions: list[str]
    group_ids: Tensor  # (b,), int64
    skipped: list[str]  # why images were left out since the last batch, each with its name


class BatchSource(Protocol):
    """What the trainer reads from."""

    images: int | None  # in an epoch; None for a stream
    encoded: bool  # whether `Batch.images` are encoder tokens

    def batches(self, batch_size: int, first: int, seed: int, world: World) -> Iterator[Batch]:
        """Yield this process's share of the batches number `first`, `first + 1`, ... for ever."""
        ...


class CachedTokens:
    """Images whose encoder tokens were computed beforehand."""

    encoded = True

    def __init__(self, data: Sequence[CaptionedImage], cache: TokenCache) -> None:
        """Take the cache of the images' paths, in their order."""
        self._data = [data[row] for row in cache.rows]
        if not self._data:
            raise DatasetError(f"no image can be read: {cache.skipped[0]}")
        self._groups = group_numbers(self._data)
        self._cache = cache
        self.images: int | None = len(self._data)

    def batches(self, batch_size: int, first: int, seed: int, world: World) -> Iterator[Batch]:
        """Yield batches; one view and one caption of each image are drawn."""
        skipped = list(self._cache.skipped)
        for number in itertools.count(first):
            epoch, rows = epoch_rows(number, len(self._data), batch_size, seed)
            rows = rows[world.own(batch_size)]
            tokens, captions = [], []
            for row in rows:
                generator = np.random.default_rng((seed, epoch, int(row)))
                captions.append(_draw_caption(self._data[row], generator))
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

    def batches(self, batch_size: int, first: int, seed: int, world: World) -> Iterator[Batch]:
        """Yield batches; in place of an image that cannot be read stands the next one that can."""
        dataset = _Drawings(self._data, self._transform, self._config, seed)
        sampler = _Rows(len(self._data), batch_size, first, seed, world)
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=_collate,
            num_workers=self._config.workers,
            worker_init_fn=_ignore_interrupts,
            persistent_workers=False,
        )
        yield from loader


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


def _draw_caption(image: CaptionedImage, generator: np.random.Generator) -> str:
    return image.captions[generator.integers(len(image.captions))]


class _Drawn(NamedTuple):
    pixels: Tensor
    caption: str
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


class _Drawings(Dataset[_Drawn]):
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

    def __getitem__(self, key: tuple[int, int]) -> _Drawn:
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
            caption = _draw_caption(image, generator)
            pixels = _crop(loaded, self._transform, self._config, generator)
            return _Drawn(pixels, caption, int(self._groups[candidate]), skipped)
        raise DatasetError(f"none of the {len(self._data)} images can be read: {skipped[0]}")


def _crop(
    image: Any, transform: ImageTransform, config: DataConfig, generator: np.random.Generator
) -> Tensor:
    crop = random_crop(image, transform.size, generator, scale=config.crop_scale, flip=config.flip)
    return transform.normalise(crop)


def _collate(drawn: Sequence[_Drawn]) -> Batch:
    return Batch(
        torch.stack([one.pixels for one in drawn]),
        [one.caption for one in drawn],
        torch.tensor([one.group for one in drawn]),
        [reason for one in drawn for reason in one.skipped],
    )


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which reaches the whole group of processes, to the trainer."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Shards:
    """Shards of webdataset, streamed: images, each with a `.txt` caption or a `.json` that has one.

    Shards are drawn with replacement, so that any number of processes and workers can read any number
    of shards for ever. A resumed run draws anew: the stream does not go on where it stopped.
    """

    encoded = False
    images: int | None = None

    def __init__(
        self, shards: Sequence[str], transform: ImageTransform, config: DataConfig
    ) -> None:
        """Take the shards: paths or URLs, also in webdataset's notation, `train-{000..131}.tar`.

        Raises:
            DatasetError: webdataset is not installed.
        """
        try:
            import webdataset  # noqa: F401
        except ImportError as error:
            raise DatasetError(
                "shards need webdataset: pip install 'blip2-search[train]'"
            ) from error
        self._shards = list(shards)
        self._transform = transform
        self._config = config

    def batches(self, batch_size: int, first: int, seed: int, world: World) -> Iterator[Batch]:
        """Yield batches; an image that cannot be read is left out."""
        stream = _Stream(self._shards, self._transform, self._config, (seed, first, world.rank))
        loader = DataLoader(
            stream,
            batch_size=world.share(batch_size),
            collate_fn=_collate,
            num_workers=self._config.workers,
            worker_init_fn=_ignore_interrupts,
        )
        yield from loader


class _Stream(IterableDataset[_Drawn]):
    def __init__(
        self,
        shards: Sequence[str],
        transform: ImageTransform,
        config: DataConfig,
        seeds: tuple[int, int, int],
    ) -> None:
        self._shards = list(shards)
        self._transform = transform
        self._config = config
        self._seeds = seeds

    def __iter__(self) -> Iterator[_Drawn]:
        import webdataset

        worker = get_worker_info()
        generator = np.random.default_rng((*self._seeds, worker.id if worker else 0))
        samples = webdataset.DataPipeline(
            _DrawnShards(self._shards, generator),
            webdataset.tarfile_to_samples(),
            webdataset.shuffle(SHUFFLED_SAMPLES, seed=int(generator.integers(2**31))),
        )
        skipped: list[str] = []
        for sample in samples:
            name = f"{sample.get('__url__', '')}/{sample['__key__']}"
            try:
                caption = _caption_of(sample, generator)
                loaded = load_image(io.BytesIO(_image_of(sample)))
            except (ImageReadError, DatasetError) as error:
                skipped.append(f"{name}: {error}")
                if len(skipped) > SKIPPED_IN_A_ROW:
                    raise DatasetError(f"nothing readable in the shards: {skipped[0]}") from error
                continue
            pixels = _crop(loaded, self._transform, self._config, generator)
            digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
            yield _Drawn(pixels, caption, int.from_bytes(digest, "big"), skipped)
            skipped = []


class _DrawnShards(IterableDataset[dict[str, str]]):
    """Shards drawn with replacement, as webdataset's pipelines take them."""

    def __init__(self, shards: Sequence[str], generator: np.random.Generator) -> None:
        from webdataset.shardlists import expand_urls

        self._urls = [url for shard in shards for url in expand_urls(shard)]
        self._generator = generator

    def __iter__(self) -> Iterator[dict[str, str]]:
        while True:
            yield {"url": self._urls[self._generator.integers(len(self._urls))]}


def _image_of(sample: dict[str, Any]) -> bytes:
    for name, content in sample.items():
        if name.rpartition(".")[2].lower() in ("jpg", "jpeg", "png", "webp"):
            return bytes(content)
    raise DatasetError("the sample has no .jpg, .jpeg, .png or .webp")


def _caption_of(sample: dict[str, Any], generator: np.random.Generator) -> str:
    if "txt" in sample:
        return str(sample["txt"].decode(errors="replace"))
    try:
        fields = json.loads(sample["json"])
        captions = next(fields[name] for name in CAPTION_COLUMNS if name in fields)
    except (KeyError, ValueError, StopIteration, TypeError) as error:
        raise DatasetError("the sample has no .txt and no caption in .json") from error
    return str(captions if isinstance(captions, str) else generator.choice(captions))
