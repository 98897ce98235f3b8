"""Training data in webdataset shards, streamed."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .augment import crop_to_pixels
from .batches import Batch, Drawn, draw_captions, load_batches
from .data import CAPTION_COLUMNS
from .distributed import World
from .errors import DatasetError, ImageReadError
from .preprocess import ImageTransform, load_image
from .recipe import DataConfig

SHUFFLED_SAMPLES = 1000  # held in memory so that neighbours part
SKIPPED_IN_A_ROW = 100  # samples or shards, before the stream is given up


class Shards:
    """Shards: images, each with a `.txt` caption or a `.json` that has one.

    Shards are drawn with replacement, so that any number of processes and workers can read any number
    of shards for ever. A resumed run draws anew: the stream does not go on where it stopped.
    """

    encoded = False
    images: int | None = None
    captions: list[str] | None = None

    def __init__(
        self, shards: Sequence[str], transform: ImageTransform, config: DataConfig
    ) -> None:
        """Take the shards: paths or URLs, also in webdataset's notation, `train-{000..131}.tar`.

        Raises:
            DatasetError: webdataset is not installed.
        """
        try:
            from webdataset.shardlists import expand_urls
        except ImportError as error:
            raise DatasetError(
                "shards need webdataset: pip install 'blip2-search[train]'"
            ) from error
        self._urls = [url for shard in shards for url in expand_urls(shard)]
        self._transform = transform
        self._config = config

    def batches(self, batch_size: int, first: int, seed: int, world: World) -> Iterator[Batch]:
        """Yield batches; a sample that cannot be used is left out."""
        seeds = (seed, first, world.rank)
        stream = _Samples(self._urls, self._transform, self._config, seeds)
        return load_batches(stream, self._config.workers, batch_size=batch_size // world.size)


class _Samples(IterableDataset["Drawn | DatasetError"]):
    def __init__(
        self,
        urls: Sequence[str],
        transform: ImageTransform,
        config: DataConfig,
        seeds: tuple[int, int, int],
    ) -> None:
        self._urls = urls
        self._transform = transform
        self._config = config
        self._seeds = seeds

    def __iter__(self) -> Iterator[Drawn | DatasetError]:
        import webdataset

        worker = get_worker_info()
        generator = np.random.default_rng((*self._seeds, worker.id if worker else 0))
        skipped: list[str] = []

        def skip(problem: Exception | str) -> bool:
            skipped.append(str(problem))
            return len(skipped) < SKIPPED_IN_A_ROW

        samples = webdataset.DataPipeline(
            _DrawnShards(self._urls, generator),
            webdataset.tarfile_to_samples(handler=skip),
            webdataset.shuffle(SHUFFLED_SAMPLES, seed=int(generator.integers(2**31))),
        )
        try:
            for sample in samples:
                name = f"{sample.get('__url__', '')}/{sample['__key__']}"
                try:
                    captions = _captions_of(sample)
                    image = load_image(io.BytesIO(_image_of(sample)))
                except (ImageReadError, DatasetError) as error:
                    if skip(f"{name}: {error}"):
                        continue
                    break
                pixels = crop_to_pixels(image, self._transform, self._config, generator)
                digest = hashlib.blake2b(name.encode(), digest_size=7).digest()
                group = int.from_bytes(digest, "big")
                count = self._config.captions_per_image
                drawn = draw_captions(captions, count, generator)
                yield Drawn(pixels, drawn, group, list(skipped))
                skipped.clear()
        except Exception as error:  # of the pipeline, after the handler gave up
            yield DatasetError(f"the shards cannot be read: {error}")
            return
        yield DatasetError(f"nothing readable in the shards: {skipped[0]}")


class _DrawnShards(IterableDataset[dict[str, str]]):
    """Shards drawn with replacement, as webdataset's pipelines take them."""

    def __init__(self, urls: Sequence[str], generator: np.random.Generator) -> None:
        self._urls = urls
        self._generator = generator

    def __iter__(self) -> Iterator[dict[str, str]]:
        while True:
            yield {"url": self._urls[int(self._generator.integers(len(self._urls)))]}


def _image_of(sample: dict[str, Any]) -> bytes:
    for name, content in sample.items():
        if name.rpartition(".")[2].lower() in ("jpg", "jpeg", "png", "webp"):
            return bytes(content)
    raise DatasetError("the sample has no .jpg, .jpeg, .png or .webp")


def _captions_of(sample: dict[str, Any]) -> list[str]:
    if "txt" in sample:
        return [sample["txt"].decode(errors="replace")]
    try:
        fields = json.loads(sample["json"])
        found = next(fields[name] for name in CAPTION_COLUMNS if name in fields)
    except (KeyError, ValueError, StopIteration, TypeError) as error:
        raise DatasetError("the sample has no .txt and no caption in .json") from error
    captions = [found] if isinstance(found, str) else found
    if (
        not captions
        or not isinstance(captions, list)
        or not all(isinstance(c, str) for c in captions)
    ):
        raise DatasetError(f"{found!r} is no caption")
    return captions
