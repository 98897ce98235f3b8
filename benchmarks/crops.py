"""Many photographs of few: random crops, every other one mirrored, to try an index at size.

    python -m blip2_search.benchmarks.crops --images DIR [--images DIR] --count 41000 --out crops
    blip2-search index DIR crops --index DIR --rerank-features none

Neighbours among them are closer than among as many photographs of their own, so that an index has a
harder task; what crops cannot show is what has never been photographed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import track

from ..retrieval.augment import random_crop
from ..retrieval.indexer import EXTENSIONS
from ..retrieval.preprocess import load_image

SIDE = 320  # pixels
SCALE = (0.2, 0.8)  # share of the area that a crop keeps


def photographs(folders: Iterable[Path]) -> list[Path]:
    """Return the photographs below some folders, sorted."""
    found = {file for folder in folders for file in folder.rglob("*")}
    return sorted(file for file in found if file.suffix.lower() in EXTENSIONS)


def write_crop(number: int, files: list[Path], out: Path) -> None:
    """Write the crop of this number; the same number gives the same crop."""
    generator = np.random.default_rng(number)
    image = load_image(files[number % len(files)])
    crop = random_crop(image, (SIDE, SIDE), generator, scale=SCALE)
    folder = out / f"{number // 1000:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    crop.save(folder / f"{number:06d}.jpg", quality=90)


def main() -> None:
    """Write the crops."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, action="append", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    files = photographs(args.images)
    if not files:
        raise SystemExit(f"there are no photographs in {', '.join(map(str, args.images))}")
    with ProcessPoolExecutor() as pool:
        job = partial(write_crop, files=files, out=args.out)
        done = pool.map(job, range(args.count), chunksize=64)
        for _ in track(done, description="crops", total=args.count):
            pass


if __name__ == "__main__":
    main()
