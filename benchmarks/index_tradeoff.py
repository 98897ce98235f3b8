"""What an index costs and loses: ours, FAISS's kinds, and other libraries, side by side.

    python -m blip2_search.benchmarks.index_tradeoff --index DIR --images 50000 --plot trade.png

The features are those of an index; where it has fewer images, each further one is a mixture of two
real ones. Everything runs in one process, each measurement in turn, so that the ratios hold on a noisy
machine too. FAISS, usearch and Qdrant (the extra `bench`) take part where they are installed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..indexes.base import Float16, Float32, Int64, SearchResult
from ..indexes.bounded import DEPTH, BoundedIndex, index_in_memory
from ..indexes.ranking import to_float32
from ..indexes.recall import measure as measure_recall
from ..indexes.recall import recall
from ..retrieval.engine import SearchEngine
from ..retrieval.loading import load_embedder
from ..retrieval.prompts import PROMPTS

Search = Callable[[Float32, int], Int64]  # queries (B, E), k -> images (B, k)

OVER_FETCH = 8  # vectors fetched for each image wanted, by the usual use of FAISS
POOLED, RESCORED = 8, 4096  # mean vectors an image, and images rescored, of the pooled index
BASELINE = "FAISS Flat, over-fetched until exact"
# None of them is among the prompts with which ours measures itself.
_WHO = (
    "a boy",
    "a woman in a hat",
    "two dogs",
    "a bird",
    "a boat",
    "a bicycle",
    "a crowd",
    "a horse",
)
_WHERE = (
    "in the mountains", "by the sea", "at a market", "in front of a house", "under a tree",
    "on a wooden table", "jumping", "seen from far away",
)  # fmt: skip
QUERIES = tuple(f"{who} {where}" for who in _WHO for where in _WHERE)  # 64


@dataclass(frozen=True)
class Contender:
    """A way to search, built of features."""

    search: Search
    in_memory: float  # bytes
    on_disk: float  # bytes, with the features that it looks at again
    queries: int = len(QUERIES)  # a slow one is asked fewer


def widened(features: Float16, images: int, seed: int = 0) -> Float16:
    """Return so many images' features (N, Q, E): the real ones, and mixtures of two of them."""
    rng = np.random.default_rng(seed)
    wide = np.empty((images, *features.shape[1:]), np.float16)
    wide[: len(features)] = features[:images]
    for start in range(len(features), images, 1024):
        part = slice(start, min(start + 1024, images))
        one, other = rng.integers(0, len(features), (2, part.stop - part.start))
        share = rng.uniform(0.5, 1, (len(one), features.shape[1], 1)).astype(np.float32)
        mixed = share * to_float32(features[one]) + (1 - share) * to_float32(features[other])
        wide[part] = mixed / np.linalg.norm(mixed, axis=-1, keepdims=True)
    return wide


def exact(features: Float16) -> Contender:
    """Ours, exact."""
    return _ours(index_in_memory(features), features)


def compact(features: Float16, calibration: Float32) -> Contender:
    """Ours, compact, with as many candidates as it chooses itself."""
    index = index_in_memory(features)
    candidates = measure_recall(index, calibration, len(index.directions)).candidates
    if candidates is None:
        raise SystemExit("compact misses its target on these features")
    return _ours(index.compact(candidates), features)


def _ours(index: BoundedIndex, features: Float16) -> Contender:
    d = len(index.directions)
    shortcuts = 4 * len(features) * (features.shape[1] * (d + 1) + d)
    return Contender(_images_only(index.search), index.nbytes, features.nbytes + shortcuts)


def on_a_gpu(features: Float16) -> Contender:
    """Ours, exact, with all vectors in a GPU's memory."""
    import torch

    from ..retrieval.gpu_index import GpuIndex

    if not torch.cuda.is_available():
        raise ImportError("there is no GPU")
    index = GpuIndex(features)
    return Contender(_images_only(index.search), features.nbytes, features.nbytes)


def flat(features: Float16) -> Contender:
    """FAISS's exact index over all vectors, over-fetched until there are enough images."""
    import faiss

    per_image, dim = features.shape[1:]
    index = faiss.IndexFlatIP(dim)
    index.add(features.astype(np.float32).reshape(-1, dim))

    def search(queries: Float32, k: int) -> Int64:
        fetched = 2 * OVER_FETCH * k
        while True:
            _, found = index.search(queries, min(fetched, index.ntotal))
            images = _grouped(found // per_image, k)  # in the order of their best vectors: exact
            if (images >= 0).all():
                return images
            fetched *= 4

    return Contender(search, 2 * features.nbytes, 2 * features.nbytes)


def brute_force(features: Float16) -> Contender:
    """One matrix product over all vectors, as rclip does."""
    vectors = features.astype(np.float32).reshape(-1, features.shape[2])

    def search(queries: Float32, k: int) -> Int64:
        scores = (vectors @ queries.T).reshape(len(features), -1, len(queries)).max(axis=1).T
        return _best(scores, k)

    return Contender(search, vectors.nbytes, vectors.nbytes)


def faiss_kind(features: Float16, name: str) -> Contender:
    """One of FAISS's kinds over all vectors, over-fetched and grouped to images."""
    import faiss

    per_image, dim = features.shape[1:]
    vectors = features.astype(np.float32).reshape(-1, dim)
    index = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:: max(1, len(vectors) // 100_000)])
    index.add(vectors)

    def search(queries: Float32, k: int) -> Int64:
        _, found = index.search(queries, OVER_FETCH * k)
        return _grouped(found // per_image, k)

    size = len(faiss.serialize_index(index))
    return Contender(search, size, size)


def faiss_pooled(features: Float16) -> Contender:
    """FAISS's PQ fast-scan over a few mean vectors an image, then all vectors of 4,096 images."""
    import faiss

    images, per_image, dim = features.shape
    group = per_image // POOLED
    vectors = np.concatenate(
        [
            to_float32(features[start : start + 1024]).reshape(-1, POOLED, group, dim).mean(axis=2)
            for start in range(0, images, 1024)
        ]
    ).reshape(-1, dim)
    index = faiss.index_factory(dim, f"PQ{dim // 2}x4fs", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:: max(1, len(vectors) // 100_000)])
    index.add(vectors)

    def search(queries: Float32, k: int) -> Int64:
        _, found = index.search(queries, RESCORED)
        best = np.empty((len(queries), k), np.int64)
        for row, query in enumerate(queries):
            near = np.unique(found[row] // POOLED)
            scores = np.concatenate(
                [
                    (to_float32(features[near[i : i + 32]]) @ query).max(axis=1)
                    for i in range(0, len(near), 32)
                ]
            )
            best[row] = near[_best(scores[None], k)[0]]
        return best

    size = len(faiss.serialize_index(index))
    return Contender(search, size, size + features.nbytes)


def usearch(features: Float16) -> Contender:
    """Usearch's HNSW over all vectors in float16, over-fetched and grouped to images."""
    from usearch.index import Index  # type: ignore[import-not-found,unused-ignore]

    per_image, dim = features.shape[1:]
    index = Index(ndim=dim, metric="ip", dtype="f16")
    index.add(np.arange(len(features) * per_image), features.reshape(-1, dim))

    def search(queries: Float32, k: int) -> Int64:
        found = np.atleast_2d(index.search(queries, OVER_FETCH * k).keys)
        return _grouped(found.astype(np.int64) // per_image, k)

    return Contender(search, index.memory_usage, index.serialized_length)


def qdrant(features: Float16) -> Contender:
    """Qdrant's local mode with its own multi-vectors (MaxSim); asked four times: it is slow."""
    from qdrant_client import (  # type: ignore[import-not-found,unused-ignore]
        QdrantClient,
        models,
    )

    client = QdrantClient(":memory:")
    largest = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    settings = models.VectorParams(
        size=features.shape[2], distance=models.Distance.DOT, multivector_config=largest
    )
    client.create_collection("photos", vectors_config=settings)
    for start in range(0, len(features), 1024):
        points = [
            models.PointStruct(id=start + i, vector=vectors.tolist())
            for i, vectors in enumerate(features[start : start + 1024])
        ]
        client.upsert("photos", points)

    def search(queries: Float32, k: int) -> Int64:
        found = [
            client.query_points("photos", query=[query.tolist()], limit=k).points
            for query in queries
        ]
        return np.array([[point.id for point in points] for points in found])

    return Contender(search, 2 * features.nbytes, 2 * features.nbytes, queries=4)


def _images_only(search: Callable[[Float32, int], SearchResult]) -> Search:
    return lambda queries, k: search(queries, k).images


def _best(scores: Float32, k: int) -> Int64:
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
    return np.take_along_axis(best, order, 1)


def _grouped(found: Int64, k: int) -> Int64:
    """Return the first k different images of each row, -1 where there are fewer."""
    images = np.full((len(found), k), -1, np.int64)
    for row, hits in enumerate(found):
        unique = list(dict.fromkeys(hits.tolist()))[:k]
        images[row, : len(unique)] = unique
    return images


def measure(contender: Contender, queries: Float32, truth: Int64) -> dict[str, float]:
    """Return latencies in milliseconds, and the recall of the exact answer."""
    search, asked = contender.search, contender.queries
    queries, truth = queries[:asked], truth[:asked]
    times = []
    for query in queries:
        start = time.perf_counter()
        search(query[None], DEPTH)
        times.append(1000 * (time.perf_counter() - start))
    start = time.perf_counter()
    found = search(queries, DEPTH)
    return {
        "p50_ms": float(np.percentile(times, 50)),
        "p95_ms": float(np.percentile(times, 95)),
        "batch_ms_a_query": 1000 * (time.perf_counter() - start) / len(queries),
        "recall@10": recall(found, truth, 10),
        f"recall@{DEPTH}": recall(found, truth, DEPTH),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--index", type=Path, required=True, help="of `blip2-search index`")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--faiss", nargs="*", default=["SQ8", "IVF256,PQ32", "HNSW16"])
    parser.add_argument("--only", nargs="*", help="contenders whose names hold one of these")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG of recall against latency")
    args = parser.parse_args()

    engine = SearchEngine(args.index)
    model = load_embedder(engine.info().model_name)
    queries, calibration = model.encode_texts(QUERIES), model.encode_texts(PROMPTS)
    real = engine.features()
    features = widened(real, args.images)
    builders: dict[str, Callable[[], Contender]] = {
        BASELINE: lambda: flat(features),
        "ours, exact": lambda: exact(features),
        "ours, compact": lambda: compact(features, calibration),
        "ours, exact, on a GPU": lambda: on_a_gpu(features),
        "numpy, all vectors": lambda: brute_force(features),
        f"FAISS PQ of {POOLED} means, {RESCORED:,} rescored": lambda: faiss_pooled(features),
        **{f"FAISS {name}": lambda name=name: faiss_kind(features, name) for name in args.faiss},  # type: ignore[misc]
        "usearch HNSW": lambda: usearch(features),
        "Qdrant, local": lambda: qdrant(features),
    }
    truth = index_in_memory(features).search(queries, DEPTH).images
    results: dict[str, dict[str, float]] = {}
    for name, build in builders.items():
        if args.only and not any(part in name for part in args.only):
            continue
        start = time.perf_counter()
        try:
            contender = build()
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        results[name] = {
            "build_s": time.perf_counter() - start,
            "bytes_an_image": contender.in_memory / len(features),
            "disk_bytes_an_image": contender.on_disk / len(features),
        }
        results[name] |= measure(contender, queries, truth)
        print(f"{name}: {results[name]['p50_ms']:.1f} ms", flush=True)
        del contender
        if args.out:  # after each: some take many minutes to build
            report: dict[str, Any] = {
                "images": args.images, "real_images": min(len(real), args.images),
                "queries": len(queries), "k": DEPTH, "results": results,
            }  # fmt: skip
            args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _print(results, f"{args.images:,} images, {len(queries)} queries, k = {DEPTH}")
    if args.plot:
        _draw(results, f"{args.images:,} images, k = {DEPTH}", args.plot)


def _print(results: dict[str, dict[str, float]], title: str) -> None:
    first = next(iter(results.values()))
    columns = (
        "p50 ms", "p95 ms", "of 64, ms each", "times as fast", "bytes in memory", "on disk", "build s",
    )  # fmt: skip
    table = Table("", *columns, "r@10", f"r@{DEPTH}", title=title)
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['p50_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            f"{row['batch_ms_a_query']:.1f}",
            f"{first['p50_ms'] / row['p50_ms']:.2f}",
            f"{row['bytes_an_image']:,.0f}",
            f"{row['disk_bytes_an_image']:,.0f}",
            f"{row['build_s']:.1f}",
            f"{row['recall@10']:.4f}",
            f"{row[f'recall@{DEPTH}']:.4f}",
        )
    Console(width=160).print(table)


def _draw(results: dict[str, dict[str, float]], title: str, picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for name, row in results.items():
        label = f"{name} ({row['bytes_an_image']:,.0f} bytes an image)"
        axes.plot(row["p50_ms"], row[f"recall@{DEPTH}"], "o", label=label)
    axes.set(xscale="log", xlabel="ms a query (p50)", ylabel=f"recall@{DEPTH} of exact")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
