"""How an index grows: time to open, to search and to add, and its size, from 10,000 images to a million.

    python -m blip2_search.benchmarks.index_growth --index DIR --work FOLDER --images 10000 100000 1000000

The images are those of an index and mixtures of them (see `index_tradeoff`), written into a store in
FOLDER as the indexer writes them: about 23 GB for a million of `mini`'s.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..indexes.base import Float16, Float32
from ..indexes.manifest import Kind, Manifest, Settings
from ..indexes.store import SEGMENT_ROWS, ImageRecord, Store
from ..indexes.stored import StoredIndex
from ..retrieval.engine import SearchEngine
from ..retrieval.loading import load_embedder
from ..retrieval.prompts import PROMPTS
from .index_tradeoff import QUERIES, widened

ADDED = 1000  # images, for the time of an addition


def grow(store: Store, real: Float16, images: int, hashes: Sequence[str] = ()) -> None:
    """Bring a store to so many images; their content is that of the photographs named, in turns."""
    while len(store) < images:
        first = len(store)
        count = min(SEGMENT_ROWS, images - first)
        features = widened(real, len(real) + count, seed=first)[len(real) :]
        store.append([_record(first + i, hashes) for i in range(count)], features)


def grow_index(store: Store, real: Float16, images: int, hashes: Sequence[str] = ()) -> None:
    """Bring an index to so many images, and to what the indexer leaves."""
    with store.writing():
        grow(store, real, images, hashes)
        store.compact(0.2)
        StoredIndex(store).refresh()


def _record(number: int, hashes: Sequence[str]) -> ImageRecord:
    return ImageRecord(
        path=f"/photos/{number // 1000:04d}/{number:08d}.jpg",
        size=100_000,
        mtime_ns=0,
        content_hash=hashes[number % len(hashes)] if hashes else f"{number:032x}",
        width=640,
        height=480,
    )


def seconds(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(store: Store, real: Float16, queries: Float32, calibration: Float32) -> dict[str, Any]:
    """Return what a store costs at its present size, exact and compact."""
    found: dict[str, Any] = {"images": len(store)}
    kinds: tuple[Kind, ...] = ("exact", "compact")
    for kind in kinds:
        with store.writing():
            store.change_settings(Settings(kind=kind))
            stored = StoredIndex(store)
            if stored.needs_measuring:
                start = time.perf_counter()
                stored.measure(calibration)
                found["measuring_s"] = time.perf_counter() - start
        start = time.perf_counter()
        index = StoredIndex(Store.open(store.directory)).open()
        hits = index.search(queries[:1], 10).images[0]
        store.records_at(hits)
        found[f"{kind}_open_and_first_hit_s"] = time.perf_counter() - start
        found[f"{kind}_open_s"] = seconds(lambda: StoredIndex(Store.open(store.directory)).open())
        times = []
        for query in queries if kind == "compact" else queries[:16]:
            start = time.perf_counter()
            index.search(query[None], 128)
            times.append(1000 * (time.perf_counter() - start))
        found[f"{kind}_p50_ms"] = float(np.percentile(times, 50))
        found[f"{kind}_p95_ms"] = float(np.percentile(times, 95))
        found[f"{kind}_bytes_an_image"] = index.nbytes / len(store)
    measured = StoredIndex(store).measured
    if measured is None:
        raise SystemExit(f"{len(store)} images are too few for a compact index")
    found |= {"candidates": measured.candidates, "recall@128": measured.recall_at_128}
    found["disk_bytes_an_image"] = store.size_on_disk() / len(store)

    def add() -> None:
        fresh = Store.open(store.directory)
        grow_index(fresh, real, len(fresh) + ADDED)

    found[f"add_{ADDED}_s"] = seconds(add)
    return found


def exponent(rows: list[dict[str, Any]], name: str) -> float:
    """Return e of a * images ** e, fitted to the logarithms."""
    sizes, values = np.array([[row["images"], row[name]] for row in rows], np.float64).T
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--index", type=Path, required=True, help="of `blip2-search index`")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder; left empty")
    parser.add_argument(
        "--images", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000, 1_000_000]
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    engine = SearchEngine(args.index)
    model = load_embedder(engine.info().model_name)
    queries, calibration = model.encode_texts(QUERIES), model.encode_texts(PROMPTS)
    real = engine.features()
    manifest = Manifest(
        model_name=model.name, model_fingerprint=model.fingerprint, preprocessing={},
        num_vectors=real.shape[1], dim=real.shape[2],
    )  # fmt: skip
    store = Store.create(args.work / "index", manifest)
    rows = []
    try:
        for images in sorted(args.images):
            with store.writing():
                building = seconds(lambda images=images: grow(store, real, images))  # type: ignore[misc]
                building += seconds(lambda: store.compact(0.2))
                shortcuts = seconds(lambda: StoredIndex(store).refresh())
            rows.append(measure(store, real, queries, calibration))
            rows[-1] |= {"append_s": building, "shortcuts_s": shortcuts}
            print(json.dumps(rows[-1]), flush=True)
    finally:
        shutil.rmtree(args.work / "index")
    names = [name for name in rows[0] if name.endswith(("_s", "_ms"))]
    exponents = {name: exponent(rows, name) for name in names} if len(rows) > 1 else {}
    _print(rows, exponents)
    if args.out:
        report = {"real_images": len(real), "rows": rows, "exponents": exponents}
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _print(rows: list[dict[str, Any]], exponents: dict[str, float]) -> None:
    table = Table("", *(f"{row['images']:,}" for row in rows), "exponent")
    for name in rows[0]:
        if name != "images":
            values = ["" if row.get(name) is None else f"{row[name]:,.4g}" for row in rows]
            table.add_row(name, *values, f"{exponents[name]:.2f}" if name in exponents else "")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
