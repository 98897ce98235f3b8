"""How long a query takes: typed at a prompt, and asked of a program that stays.

    python -m blip2_search.benchmarks.queries --index DIR [--grown N --work DIR] [--rclip-python FILE]

Cold: a process of its own for each query, one after another in turns, with the time of its stages. Of
rclip, whose model needs a download, the imports of its program are timed, with the Python given.
Warm: the 64 texts of `index_tradeoff`, at several depths of rerank, in one process; with `--grown` also
through N images, mixtures of those of the index, each with the image tokens of one of its photographs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..indexes.store import Store
from ..indexes.token_files import TOKENS
from ..retrieval.engine import SearchEngine
from .index_growth import grow_index
from .index_tradeoff import QUERIES

DEPTHS = (0, 16, 32, 128)
_PROGRAM = [sys.executable, "-m", "blip2_search.cli.app"]

# Stage by stage what `blip2-search query` does; the seconds since the process began to import.
_STAGES = """
import json, sys, time
start, marks = time.perf_counter(), {}
def mark(name):
    marks[name] = time.perf_counter() - start
import blip2_search.cli.app
mark("command line")
from blip2_search.retrieval.engine import SearchEngine
from blip2_search.indexes.token_files import TokenFiles
from blip2_search.retrieval.candidates import reranked
mark("modules")
engine = SearchEngine(sys.argv[1])
opened, model = engine._ready()
mark("model's description, index opened")
vectors = model.encode_texts([sys.argv[2]])
mark("text graph loaded and run")
images, itc = engine._nearest(opened, vectors, 10)
mark("search")
reranked(model, TokenFiles(engine.path, model.fingerprint), sys.argv[2], images, itc)
mark("tokens read, ITM graph loaded and run")
print(json.dumps(marks))
"""


def cold(index: Path, rclip: str | None, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every command, in turns; the first round warms the caches."""
    ask = [*_PROGRAM, "query", "a dog in the snow", "--index", str(index), "--paths"]
    commands = {
        "python, nothing": [sys.executable, "-c", ""],
        "--help": [*_PROGRAM, "--help"],
        "query, rerank 0": [*ask, "--rerank", "0"],
        "query, rerank 10": [*ask, "--rerank", "10"],
        "query, rerank 10, PyTorch": [*ask, "--rerank", "10", "--backend", "torch"],
    }
    if rclip:
        commands["rclip, imports alone"] = [rclip, "-c", "import rclip.main"]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def stages(index: Path, rounds: int) -> dict[str, float]:
    """Return the median seconds of each stage of a cold query."""
    command = [sys.executable, "-c", _STAGES, str(index), "a dog in the snow"]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        for _ in range(rounds)
    ]
    ends = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    names = list(ends)
    return {name: ends[name] - (ends[names[i - 1]] if i else 0) for i, name in enumerate(names)}


def enlarge(index: Path, images: int, folder: Path) -> None:
    """Make an index of so many images out of one that keeps image tokens."""
    store = Store.open(index)
    if not store.settings.keeps_tokens:
        raise SystemExit(f"{index} keeps no image tokens")
    large = Store.create(folder, store.manifest, settings=store.settings)
    hashes = [record.content_hash for record in store.records]
    grow_index(large, store.features(), images, hashes)
    (folder / TOKENS).symlink_to((index / TOKENS).resolve(), target_is_directory=True)


def warm(index: Path) -> dict[str, Any]:
    """Return milliseconds a query, p50 and p95, at every depth of rerank."""
    engine = SearchEngine(index)
    info = engine.info()
    found: dict[str, Any] = {"images": info.images, "rerank_features": info.rerank_features}
    for depth in DEPTHS if info.rerank_features != "none" else DEPTHS[:1]:
        engine.search(QUERIES[0], rerank=depth)
        times = []
        for query in QUERIES:
            start = time.perf_counter()
            engine.search(query, rerank=depth)
            times.append(1000 * (time.perf_counter() - start))
        found[str(depth)] = {
            "p50_ms": float(np.percentile(times, 50)), "p95_ms": float(np.percentile(times, 95)),
        }  # fmt: skip
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--grown", type=int, metavar="N", help="search a larger index, too")
    parser.add_argument("--work", type=Path, help="where it lies for a while")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rclip-python", help="a Python that has rclip")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {
        "images": SearchEngine(args.index).info().images,
        "cold_s": cold(args.index, args.rclip_python, args.rounds),
        "stages_s": stages(args.index, args.rounds),
        "warm": [warm(args.index)],
    }
    if args.grown:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            large = Path(folder) / "index"
            enlarge(args.index, args.grown, large)
            report["warm"].append(warm(large))
    _print(report)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _print(report: dict[str, Any]) -> None:
    console = Console(width=120)
    table = Table(f"{report['images']:,} images, a process a command", "median s", "least", "most")
    for name, times in report["cold_s"].items():
        numbers = (statistics.median(times), min(times), max(times))
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    console.print(table)
    table = Table("a query with rerank 10", "s")
    for name, seconds in report["stages_s"].items():
        table.add_row(name, f"{seconds:.3f}")
    console.print(table)
    table = Table("in one process: images", *(f"rerank {depth}: p50, p95 ms" for depth in DEPTHS))
    for found in report["warm"]:
        cells = [found.get(str(depth)) for depth in DEPTHS]
        table.add_row(
            f"{found['images']:,}",
            *(f"{c['p50_ms']:.0f}, {c['p95_ms']:.0f}" if c else "" for c in cells),
        )
    console.print(table)


if __name__ == "__main__":
    main()
