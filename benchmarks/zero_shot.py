"""Zero-shot classification of labelled photographs: top-1 and top-5 by ITC over all their labels.

    python -m blip2_search.benchmarks.zero_shot --data labels.json --images DIR [--split held-back]

A photograph's scores are its ITC similarities with every label, averaged over the templates. To measure
classes that a model never saw, hold them back from its training: `--hold-back FILE` writes the labels
again with every second class in the split "held-back", for `blip2-search train --data FILE`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console

from ..retrieval.data import TEMPLATES, read_labelled
from ..retrieval.loading import load_model
from ..retrieval.model import RetrievalModel
from ..retrieval.names import DEFAULT_MODEL

HELD_BACK = "held-back"


def hold_back(labels: Path, out: Path) -> int:
    """Write labels with every second class held back; return how many photographs are."""
    entries = json.loads(labels.read_text(encoding="utf-8"))
    classes = sorted({entry["label"] for entry in entries})
    held = set(classes[1::2])
    for entry in entries:
        entry["split"] = HELD_BACK if entry["label"] in held else "train"
    out.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return sum(entry["label"] in held for entry in entries)


def label_scores(
    model: RetrievalModel, images: Sequence[Path], labels: Sequence[str]
) -> npt.NDArray[np.float32]:
    """Return the scores (N images, L labels): ITC, averaged over the templates.

    Labels come with their article, "a laptop".
    """
    texts = [t.format(label) for label in labels for t in TEMPLATES]
    text_features = model.encode_texts(texts)
    scores = [
        (features @ text_features.T).max(axis=0).reshape(len(labels), -1).mean(axis=1)
        for features in model.encode_images(images)
    ]
    return np.stack(scores)


def accuracy(scores: npt.NDArray[np.float32], truth: npt.NDArray[np.int64], k: int) -> float:
    """Return the percentage of rows (N, L) whose true label (N,) is among the k best; ties lose."""
    own = scores[np.arange(len(truth)), truth]
    ranks = (scores >= own[:, None]).sum(axis=1) - 1
    return float(100 * np.mean(ranks < k))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="JSON list of filename, label")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--split", default="train", help="photographs of this split only")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--hold-back", type=Path, metavar="FILE", help="write a split and stop")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.hold_back:
        print(f"{hold_back(args.data, args.hold_back):,} photographs held back")
        return
    model = load_model(args.model)
    photos = read_labelled(args.data, args.images or args.data.parent, [args.split])
    names = {photo.path: photo.captions[0] for photo in photos}
    labels = sorted(set(names.values()))
    truth = np.array([labels.index(names[photo.path]) for photo in photos])
    scores = label_scores(model, [photo.path for photo in photos], labels)
    report = {
        "top-1": accuracy(scores, truth, 1),
        "top-5": accuracy(scores, truth, 5),
        "labels": len(labels),
        "images": len(photos),
        "split": args.split,
        "model": model.config.name,
        "fingerprint": model.fingerprint,
    }
    Console().print_json(data=report)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
