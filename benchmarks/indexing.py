"""Indexing photographs: ours against a plain loop over the same model in PyTorch.

    python -m blip2_search.benchmarks.indexing --images DIR [--count 512]

The loop reads, prepares and encodes a batch of 32 after the other, in eager fp32, and keeps the features;
ours does all that `blip2-search index` does: hashes, records, image tokens in int8, a store on disk.
Rounds alternate, and a ratio is the median of ratios of neighbours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ..retrieval.backends import Backend, open_embedder
from ..retrieval.embedder import Embedder, EncodedImages
from ..retrieval.engine import SearchEngine
from ..retrieval.loading import load_model
from ..retrieval.names import DEFAULT_MODEL
from .crops import photographs
from .tables import times_as_fast


class _Clocked:
    """An embedder that adds up the time it is busy."""

    def __init__(self, model: Embedder) -> None:
        self._model = model
        self.busy = 0.0

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def encode(self, pixels: np.ndarray, *, keep_tokens: bool = True) -> EncodedImages:
        start = time.perf_counter()
        try:
            return self._model.encode(pixels, keep_tokens=keep_tokens)
        finally:
            self.busy += time.perf_counter() - start


def plain_loop(files: Sequence[Path]) -> float:
    """Return the seconds of a plain loop."""
    model = load_model(DEFAULT_MODEL, device="cpu")
    start = time.perf_counter()
    model.encode_images(files)
    return time.perf_counter() - start


def indexed(files: Sequence[Path], backend: Backend) -> tuple[float, float]:
    """Return the seconds of our indexer, and the share of them in which the encoder was busy."""
    model = _Clocked(open_embedder(DEFAULT_MODEL, "cpu", backend))
    with tempfile.TemporaryDirectory() as folder:
        engine = SearchEngine(Path(folder) / "index", model)  # type: ignore[arg-type]
        start = time.perf_counter()
        report = engine.add(files)
        seconds = time.perf_counter() - start
    if report.added != len(files):
        raise SystemExit(f"{len(files) - report.added} photographs were not indexed")
    return seconds, model.busy / seconds


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    files = photographs([args.images])[: args.count]
    seconds: dict[str, list[float]] = {}
    busy: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        seconds.setdefault("a plain loop, PyTorch", []).append(plain_loop(files))
        for name, backend in (("ours, PyTorch", "torch"), ("ours, ONNX Runtime", "onnx")):
            took, share = indexed(files, backend)  # type: ignore[arg-type]
            seconds.setdefault(name, []).append(took)
            busy.setdefault(name, []).append(share)
    table = Table("", "images a second", "times as fast", "encoder busy")
    loop = next(iter(seconds.values()))
    for name, times in seconds.items():
        shown = f"{statistics.median(busy[name]):.0%}" if name in busy else ""
        ratio = times_as_fast(loop, times)
        table.add_row(name, f"{len(files) / statistics.median(times):.1f}", f"{ratio:.2f}", shown)
    Console().print(table)
    if args.out:
        report = {"images": len(files), "seconds": seconds, "busy": busy}
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
