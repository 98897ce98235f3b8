"""A frozen encoder's tokens, computed once: an epoch then costs the Q-Former only.

Augmentation is drawn beforehand: view 0 of an image is the squashed image of evaluation, the others
are random resized crops, flipped half of the time. On disk the cache is a folder, named by the key of
what it was made of, of Arrow files of fp16 tokens, one row an image, memory-mapped. A file is there
whole or not at all, so that a run that was stopped while it encoded goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..indexes.base import Float32
from .augment import crop_to_pixels
from .embedder import PixelTransform, TensorEmbedder
from .errors import DatasetError, ImageReadError, TokenOverflowError
from .model import Precision, autocast
from .preprocess import load_image
from .progress import OnProgress
from .recipe import DataConfig

IMAGES_A_BATCH = 32
IMAGES_A_FILE = 512
_PIXELS = 2  # of the way from an image to pixels: raised when that changes


@dataclass(frozen=True, eq=False)
class TokenCache:
    """Encoder tokens of the images that could be read."""

    rows: list[int]  # of the paths that were asked for: those that could be read
    tokens: list[npt.NDArray[np.float16]]  # one (V, P, D) a row, memory-mapped and read-only
    skipped: list[str]  # a reason for each of the others, which names the file
    folder: Path  # of the cache
    computed: int = 0  # how many of the paths were not in the cache before

    @property
    def images(self) -> list[npt.NDArray[np.float16]]:
        """The tokens (P, D) of each row's first view, the image itself."""
        return [views[0] for views in self.tokens]


def encoder_tokens(
    model: TensorEmbedder,
    paths: Sequence[Path],
    directory: Path,
    data: DataConfig,
    *,
    views: int = 1,
    seed: int = 0,
    precision: Precision = "fp32",
    encode: Callable[[Tensor], Tensor] | None = None,
    on_progress: OnProgress | None = None,
) -> TokenCache:
    """Return the encoder's tokens of images, from the cache or computed into it.

    Args:
        model: its encoder is frozen; tokens are taken before `ln_vision`.
        paths: N image files.
        directory: where caches live; made if need be.
        data: how crops are drawn.
        views: V views an image; the first is the image itself.
        seed: of the crops.
        precision: of the encoder's arithmetic; bf16 is several times faster where the processor has
            it and moves the tokens by a few percent, which training takes for augmentation.
        encode: a faster way to the same tokens than `model.encode_pixels`.
        on_progress: called after every batch that is encoded.

    Raises:
        TokenOverflowError: the tokens overflow float16.
    """
    settings = f"{_PIXELS} {views} {precision} {model.dtype} {'onnx' if encode else 'torch'}"
    if views > 1:
        settings += f" {seed} {data.augment} {data.crop_scale} {data.flip}"
    folder = directory / _cache_key(model, paths, settings)
    folder.mkdir(parents=True, exist_ok=True)
    draw = _Views(model.image_transform, data, views, seed)
    encode = encode or model.encode_pixels
    cache, computed = TokenCache([], [], [], folder), 0
    for chunk in _batches(len(paths), IMAGES_A_FILE):
        file = folder / f"{chunk.start:08d}.arrow"
        if not file.exists():
            partial = file.with_suffix(f".{os.getpid()}.partial")
            try:
                with torch.inference_mode(), autocast(model.device, precision):
                    _fill(paths, chunk, partial, draw, encode, on_progress)
                os.replace(partial, file)
                computed += len(chunk)
            finally:
                partial.unlink(missing_ok=True)
        _read(file, chunk.start, cache)
    return replace(cache, computed=computed)


@contextmanager
def plain_tokens(
    model: TensorEmbedder,
    paths: Sequence[Path],
    directory: Path | None,
    precision: Precision = "fp32",
    on_progress: OnProgress | None = None,
) -> Iterator[TokenCache]:
    """Give the encoder's tokens of images as they are, not augmented, for an evaluation.

    Args:
        model: as for `encoder_tokens`.
        paths: N image files.
        directory: where caches live; None is a temporary one, gone afterwards.
        precision: of the encoder's arithmetic.
        on_progress: called after every batch that is encoded.

    Raises:
        DatasetError: no image can be read.
        TokenOverflowError: the tokens overflow float16.
    """
    with ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plain = DataConfig(augment=False)
        cache = encoder_tokens(
            model, paths, directory, plain, precision=precision, on_progress=on_progress
        )
        if not cache.rows:
            raise DatasetError(f"no image can be read: {(cache.skipped or ['there is none'])[0]}")
        yield cache


@torch.inference_mode()
def cached_features(
    model: TensorEmbedder, tokens: Sequence[npt.NDArray[np.float16]], batch_size: int = 64
) -> npt.NDArray[np.float32]:
    """Return the vectors (N, Q, E), float32, of N images' tokens, each (P, D)."""
    parts = []
    for start in range(0, len(tokens), batch_size):
        batch = torch.from_numpy(np.stack(tokens[start : start + batch_size]))
        parts.append(model.features_from_encoder(batch).float().cpu().numpy())
    return np.concatenate(parts)


def _cache_key(model: TensorEmbedder, paths: Sequence[Path], settings: str) -> str:
    digest = hashlib.blake2b(f"{settings} {model.encoder_fingerprint}".encode(), digest_size=12)
    for path in paths:
        digest.update(f"{os.path.abspath(path)}\0".encode())
        with suppress(OSError):
            stat = path.stat()
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Views:
    """Decodes an image and draws its views."""

    transform: PixelTransform
    data: DataConfig
    views: int
    seed: int

    def __call__(self, row: int, path: Path) -> Float32 | ImageReadError:
        """Return the pixels of all views of an image: (V, 3, S, S)."""
        try:
            whole = self.transform(path)
            if self.views == 1:
                return whole[None]
            image = load_image(path)
        except ImageReadError as error:
            return error
        generator = np.random.default_rng((self.seed, row))
        crops = [
            crop_to_pixels(image, self.transform, self.data, generator)
            for _ in range(self.views - 1)
        ]
        return np.stack([whole, *crops])


def _fill(
    paths: Sequence[Path],
    chunk: range,
    file: Path,
    views: _Views,
    encode: Callable[[Tensor], Tensor],
    on_progress: OnProgress | None,
) -> None:
    import pyarrow as pa

    width, height = views.transform.size
    patches, channels = _encoded(encode, np.zeros((1, 3, height, width), np.float32)).shape[1:]
    size = views.views * patches * channels
    row_type = pa.list_(pa.float16(), size)
    schema = pa.schema(
        [("tokens", row_type), ("error", pa.string())],
        metadata={"shape": json.dumps([views.views, patches, channels])},
    )
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for rows in _batches(len(chunk), max(1, IMAGES_A_BATCH // views.views)):
            batch = chunk[rows.start : rows.stop]
            pixels = list(pool.map(views, batch, [paths[row] for row in batch]))
            good = {i: image for i, image in enumerate(pixels) if isinstance(image, np.ndarray)}
            tokens = np.zeros((len(batch), size), np.float16)
            if good:
                encoded = _encoded(encode, np.concatenate(list(good.values())))
                tokens[list(good)] = encoded.reshape(len(good), size)
            errors = [str(image) if isinstance(image, ImageReadError) else None for image in pixels]
            column = pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), type=row_type)
            writer.write_batch(pa.record_batch([column, pa.array(errors, pa.string())], schema))
            if on_progress is not None:
                on_progress(batch.stop, len(paths))


def _read(file: Path, first: int, cache: TokenCache) -> None:
    """Add a file's images, the first of which is row `first`, to the cache."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
        shape = json.loads(reader.schema.metadata[b"shape"])
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            values = batch.column("tokens").values.to_numpy(zero_copy_only=True)
            errors = batch.column("error").to_pylist()
            for i, tokens in enumerate(values.reshape(-1, *shape)):
                if errors[i] is None:
                    cache.rows.append(first + i)
                    cache.tokens.append(tokens)
                else:
                    cache.skipped.append(errors[i])
            first += batch.num_rows


def _encoded(encode: Callable[[Tensor], Tensor], pixels: Float32) -> npt.NDArray[np.float16]:
    tokens = encode(torch.from_numpy(pixels)).to("cpu", torch.float16)
    if not tokens.isfinite().all():
        raise TokenOverflowError(
            "the encoder's tokens do not fit into float16 (training does without: data.views=0)"
        )
    array: npt.NDArray[np.float16] = tokens.numpy()
    return array


def _batches(total: int, size: int) -> Iterator[range]:
    for start in range(0, total, size):
        yield range(start, min(start + size, total))
