"""Recall of a model on captioned photographs, by ITC alone and reranked by ITM.

    python -m blip2_search.benchmarks.recall --data dataset_flickr8k.json --images DIR --split val

The protocol is BLIP-2's: ITC similarity is the max over queries, without temperature; the best
`--rerank` candidates of each query, in each direction, are scored by ITM logit + ITC.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..retrieval.data import captions_and_owners, read_karpathy
from ..retrieval.loading import DEFAULT_MODEL, load_model
from ..retrieval.metrics import recall_table
from ..retrieval.model import (
    Precision,
    RetrievalModel,
    autocast,
    image_features,
    itc_similarities,
)

Scores = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
CHUNK = 512  # pairs whose image tokens are gathered at once


def candidates(itc: Scores, k: int) -> tuple[Int64, Int64]:
    """Return (image, text) numbers of every pair to rerank: each text's best k images and back.

    Args:
        itc: (N images, B texts).
        k: candidates a query; more than there are means all.
    """
    best_images = np.argsort(-itc, axis=0, kind="stable")[:k]  # (k, B)
    best_texts = np.argsort(-itc, axis=1, kind="stable")[:, :k]  # (N, k)
    wanted = np.zeros(itc.shape, bool)
    np.put_along_axis(wanted, best_images, True, axis=0)
    np.put_along_axis(wanted, best_texts, True, axis=1)
    images, texts = np.nonzero(wanted)
    return images, texts


def match_all(
    model: RetrievalModel,
    image_tokens: torch.Tensor,
    captions: Sequence[str],
    pairs: tuple[Int64, Int64],
) -> Scores:
    """Return the ITM logit of every pair; pairs of like length go together, to waste no padding."""
    images, texts = pairs
    lengths = model.tokenize(captions).mask.sum(dim=1).cpu().numpy()
    order = np.argsort(lengths[texts], kind="stable")
    scores = np.empty(len(order), np.float32)
    starts = range(0, len(order), CHUNK)
    for start in track(starts, description="reranking", console=Console(stderr=True)):
        rows = order[start : start + CHUNK]
        tokens = image_tokens[torch.from_numpy(images[rows])]
        scores[rows] = model.match(tokens, [captions[text] for text in texts[rows]])
    return scores


def reranked(itc: Scores, itm: Scores, pairs: tuple[Int64, Int64], k: int, axis: int) -> Scores:
    """Return ITM + ITC for the best k along an axis (0: images of a text), -inf for the rest."""
    full = np.full(itc.shape, -np.inf, np.float32)
    full[pairs] = itm + itc[pairs]
    best = np.take(
        np.argsort(-itc, axis=axis, kind="stable"), np.arange(min(k, itc.shape[axis])), axis
    )
    kept = np.full(itc.shape, -np.inf, np.float32)
    np.put_along_axis(kept, best, np.take_along_axis(full, best, axis), axis)
    return kept


def rerank_table(
    itc: Scores, itm: Scores, pairs: tuple[Int64, Int64], k: int, owner: Int64
) -> dict[str, float]:
    """Return the recall of ITM + ITC over the best k of each query, in each direction."""
    by_text = recall_table(reranked(itc, itm, pairs, k, axis=0), owner)
    by_image = recall_table(reranked(itc, itm, pairs, k, axis=1), owner)
    return {name: (by_image if name.startswith("tr") else by_text)[name] for name in by_text}


def mean_query_cosine(image_features: torch.Tensor) -> float:
    """Return how alike an image's query vectors (N, Q, E) are: mean cosine of two different ones."""
    queries = image_features.shape[1]
    total = (image_features @ image_features.mT).mean().item() * queries
    return (total - 1) / (queries - 1)


def evaluate(
    model: RetrievalModel,
    paths: Sequence[Path],
    captions: Sequence[str],
    owner: Int64,
    k: int,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """Return {"itc": {"tr@1": ...}, "itc+itm": {...}, "seconds": {...}}.

    Args:
        model: the model.
        paths: N images.
        captions: B captions.
        owner: (B,), the image of each caption.
        k: candidates to rerank; 0 is ITC alone.
        precision: of the rerank; ITC is computed in full.
    """
    start = time.perf_counter()
    tokens = model.image_tokens(paths)
    features = image_features(model, tokens)
    itc = itc_similarities(model, features, captions)
    report: dict[str, Any] = {
        "itc": recall_table(itc, owner),
        "mean_query_cosine": mean_query_cosine(features),
    }
    report["seconds"] = {"itc": time.perf_counter() - start}
    if k:
        start = time.perf_counter()
        pairs = candidates(itc, k)
        with autocast(model, precision):
            itm = match_all(model, tokens, captions, pairs)
        report["itc+itm"] = rerank_table(itc, itm, pairs, k, owner)
        report["seconds"]["rerank"] = time.perf_counter() - start
    return report


def main() -> None:
    """Run the benchmark and print its table; JSON goes to `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="Karpathy JSON")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rerank", type=int, default=128)
    parser.add_argument("--limit", type=int, help="the first so many images only")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the rerank"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    model = load_model(args.model)
    photos = read_karpathy(args.data, args.images, [args.split])[: args.limit]
    captions, owner = captions_and_owners(photos)
    paths = [photo.path for photo in photos]
    report = evaluate(model, paths, captions, owner, args.rerank, args.precision)
    report |= {
        "model": model.config.name,
        "fingerprint": model.fingerprint,
        "images": len(photos),
        "captions": len(captions),
        "split": args.split,
        "rerank": args.rerank,
        "precision": args.precision,
    }
    table = Table("", *report["itc"], title=f"{args.data.stem} {args.split}, {len(photos)} images")
    for name in ("itc", "itc+itm"):
        if name in report:
            table.add_row(name, *(f"{value:.1f}" for value in report[name].values()))
    Console().print(table)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
