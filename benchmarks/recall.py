"""The retrieval table of the paper: models side by side, and the published rows under them.

    python -m blip2_search.benchmarks.recall --dataset flickr30k --model blip2-itm-vit-g-coco

Each model's result goes to `results/MODEL_DATASET_SPLIT.json`, with the command, the model's
fingerprint and the day; `tables.py` makes the README's tables of them. The protocol is BLIP-2's, see
`retrieval/evaluation.py`; `blip2-search evaluate` has more options for one model.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from ..cli import render, report
from ..cli.evaluate import ROOT_VARIABLE, say_skipped, write_result
from ..cli.options import default_cache
from ..cli.progress import Stages
from ..indexes.errors import Blip2SearchError
from ..retrieval.data import read_split
from ..retrieval.datasets import BENCHMARKS
from ..retrieval.evaluation import evaluate
from ..retrieval.loading import load_embedder
from ..retrieval.names import DEFAULT_MODEL

RESULTS = Path(__file__).parent / "results"


def result_name(model: str, dataset: str, split: str) -> str:
    """Return the name of a result's file.

    >>> result_name("open_clip:ViT-L-14/openai", "coco", "test")
    'open_clip_vit-l-14_openai_coco_test.json'
    """
    return f"{re.sub(r'[^a-z0-9-]+', '_', model.lower())}_{dataset}_{split}.json"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", choices=sorted(BENCHMARKS), required=True)
    parser.add_argument("--root", type=Path, default=Path(os.environ.get(ROOT_VARIABLE, "data")))
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", action="append", help=f"several may be given [{DEFAULT_MODEL}]")
    parser.add_argument("--rerank", type=int, default=128)
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    args = parser.parse_args()

    file, folder = BENCHMARKS[args.dataset].find(args.root)
    photos = read_split(file, folder, args.split)
    results = []
    for name in args.model or [DEFAULT_MODEL]:
        model = load_embedder(name, device=args.device, dtype="float32")
        with Stages() as stages:
            result = evaluate(
                model,
                photos,
                rerank=args.rerank if model.reranks else 0,
                precision=args.precision,
                cache=default_cache(),
                prepare=stages.prepare,
            )
        results.append(result)
        say_skipped(result.skipped)
        described = {"dataset": args.dataset, "split": args.split, **result.to_dict()}
        command = ["python", "-m", "blip2_search.benchmarks.recall", *sys.argv[1:]]
        write_result(
            described,
            args.results / result_name(name, args.dataset, args.split),
            shlex.join(command),
        )
    render.print_title(f"{args.dataset} {args.split}: {len(photos):,} images")
    report.print_recalls(results, args.dataset, args.split)


if __name__ == "__main__":
    try:
        main()
    except Blip2SearchError as error:
        raise SystemExit(f"error: {error}") from None
