"""Recall of a model on captioned photographs, by ITC alone and reranked by ITM.

    python -m blip2_search.benchmarks.recall --data dataset_flickr8k.json --images DIR --split val

The protocol is BLIP-2's, see `retrieval/evaluation.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..retrieval.data import captions_and_owners, read_karpathy
from ..retrieval.evaluation import evaluate
from ..retrieval.loading import DEFAULT_MODEL, load_model


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
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reranking")
        report = evaluate(
            model, paths, captions, owner, args.rerank, args.precision,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
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
