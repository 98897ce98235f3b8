"""Photographs as cameras take them: decoded at a fraction of their size, against in full.

    python -m blip2_search.benchmarks.decoding --images DIR [--count 12]

Photographs of DIR are enlarged to 12 megapixels, with noise, and written as JPEGs; each is read and
squashed to `mini`'s pixels both ways, in turns. The difference is that of the pixels, in their
normalised units.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ..indexes.base import Float32
from ..retrieval.names import DEFAULT_MODEL
from ..retrieval.own_format import EMBEDDED, read_config
from ..retrieval.preprocess import ImageTransform, load_for, load_image
from .crops import photographs
from .tables import times_as_fast

SIZE = (4000, 3000)
ROUNDS = 3


def enlarged(file: Path) -> bytes:
    """Return a photograph as a camera's JPEG."""
    pixels = np.asarray(load_image(file).resize(SIZE, Image.Resampling.BICUBIC), np.int16)
    noise = np.random.default_rng(0).integers(-6, 7, pixels.shape, np.int16)
    stream = io.BytesIO()
    camera = Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
    camera.save(stream, "JPEG", quality=92)
    return stream.getvalue()


def timed(decode: Callable[[BinaryIO], Float32], data: bytes) -> tuple[Float32, float]:
    """Return what a JPEG is decoded to, and the seconds that it took."""
    start = time.perf_counter()
    return decode(io.BytesIO(data)), time.perf_counter() - start


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=12)
    args = parser.parse_args()
    transform = ImageTransform(read_config(EMBEDDED / DEFAULT_MODEL).preprocess)
    full: list[float] = []
    reduced: list[float] = []
    differences = []
    for file in photographs([args.images])[: args.count]:
        data = enlarged(file)
        for _ in range(ROUNDS):
            whole, seconds = timed(lambda file: transform.to_pixels(load_image(file)), data)
            full.append(seconds)
            ours, seconds = timed(
                lambda file: transform.to_pixels(load_for(file, transform.size).image), data
            )
            reduced.append(seconds)
        differences.append(float(np.abs(whole - ours).mean()))
    print(f"in full: {1000 * statistics.median(full):.0f} ms a photograph")
    print(f"at a fraction: {1000 * statistics.median(reduced):.0f} ms")
    print(f"times as fast: {times_as_fast(full, reduced):.1f}")
    print(f"mean difference of a pixel: {statistics.mean(differences):.4f}")


if __name__ == "__main__":
    main()
