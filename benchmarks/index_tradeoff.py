"""What an index costs and loses: ours, FAISS's kinds used the usual way, and numpy, side by side.

    python -m blip2_search.benchmarks.index_tradeoff --index DIR --images 50000

The features are those of an index, widened: each further image is a mixture of two real ones. Text
queries are the captions' prompts below, encoded by the index's model. Everything runs in one process,
each measurement in turn, so that the ratios hold on a noisy machine too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from ..indexes.base import SearchResult
from ..indexes.bounded import index_in_memory
from ..indexes.flat import FaissIndex
from ..retrieval.engine import SearchEngine
from ..retrieval.loading import load_embedder

Float32 = npt.NDArray[np.float32]
Search = Callable[[Float32, int], npt.NDArray[np.int64]]  # queries (B, E), k -> images (B, k)

K = 128
OVER_FETCH = 8  # vectors fetched for each image wanted, by the usual use of FAISS
SUBJECTS = (
    "a dog",
    "two children",
    "a man",
    "a red car",
    "people",
    "a clock tower",
    "a cat",
    "food",
)
PLACES = (
    "on the beach",
    "in the snow",
    "in a street",
    "on grass",
    "indoors",
    "at night",
    "in water",
)


def widened(
    features: npt.NDArray[np.float16], images: int, seed: int = 0
) -> npt.NDArray[np.float16]:
    """Return so many images' features (N, Q, E): the real ones, and mixtures of two of them."""
    rng = np.random.default_rng(seed)
    wide = np.empty((images, *features.shape[1:]), np.float16)
    wide[: len(features)] = features[:images]
    for start in range(len(features), images, 1024):
        part = slice(start, min(start + 1024, images))
        one, other = rng.integers(0, len(features), (2, part.stop - part.start))
        share = rng.uniform(0.5, 1, (len(one), features.shape[1], 1))
        mixed = share * features[one] + (1 - share) * features[other]
        wide[part] = mixed / np.linalg.norm(mixed, axis=-1, keepdims=True)
    return wide


def images_only(search: Callable[[Float32, int], SearchResult]) -> Search:
    """Return the image numbers of what an index of ours finds."""
    return lambda queries, k: search(queries, k).images


def brute_force(features: npt.NDArray[np.float16]) -> tuple[Search, int]:
    """Search by one matrix product, as rclip does; and the bytes it holds."""
    vectors = features.astype(np.float32).reshape(-1, features.shape[2])

    def search(queries: Float32, k: int) -> npt.NDArray[np.int64]:
        scores = (vectors @ queries.T).reshape(len(features), -1, len(queries)).max(axis=1).T
        best = np.argpartition(-scores, k - 1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
        return np.take_along_axis(best, order, 1)

    return search, vectors.nbytes


def faiss_kind(features: npt.NDArray[np.float16], name: str) -> tuple[Search, int]:
    """Search by one of FAISS's kinds over all vectors, over-fetched and grouped; and its bytes."""
    import faiss

    per_image, dim = features.shape[1:]
    vectors = features.astype(np.float32).reshape(-1, dim)
    index = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:: max(1, len(vectors) // 100_000)])
    index.add(vectors)

    def search(queries: Float32, k: int) -> npt.NDArray[np.int64]:
        _, found = index.search(queries, OVER_FETCH * k)
        images = np.full((len(queries), k), -1, np.int64)
        for row, hits in enumerate(found // per_image):
            unique = list(dict.fromkeys(hits.tolist()))[:k]
            images[row, : len(unique)] = unique
        return images

    return search, len(faiss.serialize_index(index))


def measure(search: Search, queries: Float32, exact: npt.NDArray[np.int64]) -> dict[str, float]:
    """Return latencies in milliseconds, and the recall of the exact answer."""
    times = []
    for query in queries:
        start = time.perf_counter()
        search(query[None], K)
        times.append(1000 * (time.perf_counter() - start))
    start = time.perf_counter()
    found = search(queries, K)
    together = 1000 * (time.perf_counter() - start)
    hits = [
        [
            len(set(a[:k]) & set(b[:k])) / k
            for a, b in zip(found.tolist(), exact.tolist(), strict=True)
        ]
        for k in (10, K)
    ]
    return {
        "p50_ms": float(np.percentile(times, 50)),
        "p95_ms": float(np.percentile(times, 95)),
        "all_ms": together,
        "recall@10": float(np.mean(hits[0])),
        f"recall@{K}": float(np.mean(hits[1])),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--index", type=Path, required=True, help="of `blip2-search index`")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--faiss", nargs="*", default=["SQ8", "IVF256,PQ32", "HNSW16"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    engine = SearchEngine(args.index)
    model = load_embedder(engine.info().model_name)
    queries = model.encode_texts([f"{subject} {place}" for subject in SUBJECTS for place in PLACES])
    features = widened(engine.features(), args.images)
    builders: dict[str, Callable[[], tuple[Search, int]]] = {
        "IndexFlatIP, over-fetched until exact": lambda: _flat(features),
        "ours, exact": lambda: _bounded(features),
        "numpy": lambda: brute_force(features),
        **{f"FAISS {name}": lambda name=name: faiss_kind(features, name) for name in args.faiss},  # type: ignore[misc]
    }
    exact = index_in_memory(features).search(queries, K).images
    results: dict[str, dict[str, float]] = {}
    for name, build in builders.items():
        start = time.perf_counter()
        search, held = build()
        built = time.perf_counter() - start
        results[name] = {"build_s": built, "bytes_an_image": held / len(features)}
        results[name] |= measure(search, queries, exact)
        del search
    report: dict[str, Any] = {"images": args.images, "queries": len(queries), "results": results}
    _print(results, f"{args.images:,} images, {len(queries)} queries, k = {K}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _flat(features: npt.NDArray[np.float16]) -> tuple[Search, int]:
    index = FaissIndex(features)
    return images_only(index.search), 2 * features.nbytes


def _bounded(features: npt.NDArray[np.float16]) -> tuple[Search, int]:
    index = index_in_memory(features)
    return images_only(index.search), index.nbytes


def _print(results: dict[str, dict[str, float]], title: str) -> None:
    first = next(iter(results.values()))
    columns = ("p50 ms", "p95 ms", "all at once, ms", "times as fast", "bytes an image", "build s")
    table = Table("", *columns, "r@10", f"r@{K}", title=title)
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['p50_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            f"{row['all_ms']:.0f}",
            f"{first['p50_ms'] / row['p50_ms']:.2f}",
            f"{row['bytes_an_image']:,.0f}",
            f"{row['build_s']:.1f}",
            f"{row['recall@10']:.3f}",
            f"{row[f'recall@{K}']:.3f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
