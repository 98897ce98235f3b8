"""The benchmarks of the field: what their files are called, and where people have them.

Each lies in a folder of its own name under a common root; captions are Karpathy's split files
(Karpathy and Fei-Fei, CVPR 2015).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .errors import DatasetError

_CAPTIONS = "cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The layouts of one benchmark under the root, the usual one first."""

    name: str
    captions: tuple[str, ...]
    images: tuple[str, ...]  # folders that the file names in the captions are relative to
    holds: str  # what must be in the folder of images; "" is any
    source: str  # where the photographs come from

    def find(self, root: Path) -> tuple[Path, Path]:
        """Return the file of captions, and the folder of photographs.

        Raises:
            DatasetError: one of them is missing; the message says what to put where.
        """
        folder = root / self.name
        file = next((folder / name for name in self.captions if (folder / name).is_file()), None)
        images = next((folder / n for n in self.images if (folder / n / self.holds).is_dir()), None)
        missing = []
        if file is None:
            missing.append(f"{folder / self.captions[0]} (from {_CAPTIONS})")
        if images is None:
            place = folder / self.images[0] / self.holds
            missing.append(f"the photographs in {place} ({self.source})")
        if file is None or images is None:
            raise DatasetError(
                f"{self.name} is not complete: put {' and '.join(missing)}, or name the files with "
                "--data and --images"
            )
        return file, images


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="flickr30k",
            captions=("dataset_flickr30k.json", "annotations/dataset_flickr30k.json"),
            images=("flickr30k-images", "flickr30k_images", "images", "Images"),
            holds="",
            source="shannon.cs.illinois.edu/DenotationGraph, on request",
        ),
        Benchmark(
            name="coco",
            captions=("dataset_coco.json", "annotations/dataset_coco.json"),
            images=(".", "images"),
            holds="val2014",
            source="images.cocodataset.org/zips/val2014.zip",
        ),
        Benchmark(
            name="flickr8k",
            captions=("dataset_flickr8k.json", "annotations/dataset_flickr8k.json"),
            images=("images", "Flicker8k_Dataset", "Flickr8k_Dataset", "Images"),
            holds="",
            source="Hodosh, Young and Hockenmaier, JAIR 2013, on request",
        ),
    )
}
