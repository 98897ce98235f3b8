"""Reranking and encoding: ours against `Blip2ForImageTextRetrieval` on the same random weights.

    python -m blip2_search.benchmarks.inference [--vision-layers 39] [--candidates 128]

At the published size (BERT-base, ViT-g, 257 image tokens of 1,408 numbers) on this machine's processor:

- a text against candidates: transformers as its documentation uses it, which encodes the image of every
  pair; the same with the vision model's output kept by hand; ours, in PyTorch, also with the keys and
  values of candidates of an earlier query kept (`SearchEngine(keys_values_memory=...)`), and in ONNX Runtime;
- an image against texts: the same;
- images to ITC features.

Measurements alternate, and a ratio is the median of ratios of neighbours.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..retrieval.checkpoints import save_model
from ..retrieval.hub import load_hub
from ..retrieval.keys_values import KeptKeysValues
from ..retrieval.model import RetrievalModel
from ..retrieval.names import DEFAULT_MODEL
from ..retrieval.onnx_export import write_graphs
from ..retrieval.onnx_model import OnnxModel
from ..retrieval.own_format import EMBEDDED
from .tables import KEPT, times_as_fast

TEXT = "two men in red shirts are playing football on a muddy field"
ROUNDS = 3
Job = Callable[[], Any]


class _Kept(nn.Module):
    """Stands in for the vision model: gives what it gave before."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        tokens = self.tokens[: len(pixel_values)]
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens[:, 0])


def their_model(vision_layers: int, folder: Path) -> Any:
    """Return transformers' model with random weights, also written to a folder."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Blip2Config(
        vision_config={"num_hidden_layers": vision_layers},
        qformer_config={"vocab_size": 30523, "use_qformer_text_input": True},
        text_config={"model_type": "opt", "num_hidden_layers": 1, "hidden_size": 8,
                     "num_attention_heads": 1, "ffn_dim": 8, "word_embed_proj_dim": 8},
        image_text_hidden_size=256, image_token_index=None,
    )  # fmt: skip
    model: Any = transformers.Blip2ForImageTextRetrieval(config)
    model.eval()
    model.save_pretrained(folder)
    shutil.copy(EMBEDDED / DEFAULT_MODEL / "tokenizer.json", folder)
    settings = {"size": {"height": 224, "width": 224}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return model


def in_onnx(model: RetrievalModel, folder: Path) -> OnnxModel:
    """Return the model on ONNX Runtime, its encoder cut to one layer: it takes no part."""
    vision: Any = model.image_encoder.vision_model
    vision.encoder.layers = vision.encoder.layers[:1]
    settings = {**model.config.encoder.vision_config, "num_hidden_layers": 1}
    model.reconfigure(
        replace(model.config, encoder=replace(model.config.encoder, vision_config=settings))
    )
    save_model(model, folder)
    write_graphs(model, folder, {})
    return OnnxModel(folder)


def alternate(jobs: dict[str, tuple[Job, int]]) -> dict[str, list[float]]:
    """Return the seconds a unit of every job, in each round; a job comes with its units."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(ROUNDS):
        for name, (job, units) in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append((time.perf_counter() - start) / units)
    return seconds


@torch.inference_mode()
def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vision-layers", type=int, default=39)
    parser.add_argument("--candidates", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        theirs = their_model(args.vision_layers, Path(folder) / "hub")
        ours = load_hub(str(Path(folder) / "hub"))
        shutil.rmtree(Path(folder) / "hub")
        seconds = _measure(theirs, ours, args.candidates, Path(folder) / "onnx")
    report = {
        "vision_layers": args.vision_layers, "candidates": args.candidates,
        "threads": torch.get_num_threads(), "seconds": seconds,
    }  # fmt: skip
    _print(seconds)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _measure(
    theirs: Any, ours: RetrievalModel, candidates: int, folder: Path
) -> dict[str, dict[str, list[float]]]:
    text = ours.tokenize([TEXT])
    inputs = {"input_ids": text.token_ids, "attention_mask": text.mask.long()}
    pixels = torch.randn(2, 3, 224, 224)

    def ask(images: Tensor, itm: bool) -> Any:
        many = {name: value.expand(len(images), -1) for name, value in inputs.items()}
        return theirs(pixel_values=images, use_image_text_matching_head=itm, **many)

    encoding = alternate({
        "transformers": (lambda: ask(pixels, itm=False), len(pixels)),
        "ours": (lambda: ours.encode(pixels.numpy(), keep_tokens=False), len(pixels)),
    })  # fmt: skip
    naive = alternate({"transformers, every pair encoded": (lambda: ask(pixels, itm=True), 2)})

    tokens = torch.randn(candidates, 257, 1408)
    theirs.vision_model = _Kept(tokens)
    blank = torch.zeros(candidates, 3, 1, 1)  # the stand-in looks at their number alone
    compiled = in_onnx(ours, folder)
    array = tokens.numpy()
    # Theirs normalises the tokens in the vision model, ours behind it.
    texts = [f"{TEXT} {i}" for i in range(candidates)]
    words = ours.tokenize(texts)
    everything = {"input_ids": words.token_ids, "attention_mask": words.mask.long()}

    def ask_texts() -> Any:
        return theirs(pixel_values=blank, use_image_text_matching_head=True, **everything)

    def tokens_of(rows: list[int]) -> dict[int, Any]:
        return {row: array[row] for row in rows}

    names = [f"image {row}" for row in range(candidates)]
    kept = KeptKeysValues(ours, memory=10**11)
    kept.match("another text", names, tokens_of)  # the candidates of an earlier query
    to_images = naive | alternate({
        KEPT: (lambda: ask(blank, itm=True), candidates),
        "ours, PyTorch": (lambda: ours.match(array, [TEXT] * candidates), candidates),
        "ours, PyTorch, keys and values kept": (
            lambda: kept.match(TEXT, names, tokens_of), candidates,
        ),
        "ours, ONNX Runtime": (lambda: compiled.match(array, [TEXT] * candidates), candidates),
    })  # fmt: skip
    to_texts = naive | alternate({
        KEPT: (ask_texts, candidates),
        "ours, PyTorch": (lambda: ours.match(array[:1], texts), candidates),
        "ours, ONNX Runtime": (lambda: compiled.match(array[:1], texts), candidates),
    })  # fmt: skip
    return {
        "a text, candidates": to_images,
        "an image, texts": to_texts,
        "images to ITC features": encoding,
    }


def _print(seconds: dict[str, dict[str, list[float]]]) -> None:
    table = Table("", "", "a second", "times as fast as transformers", "... its images kept")
    for work, contenders in seconds.items():
        rows = list(contenders.items())
        for i, (name, times) in enumerate(rows):
            kept = contenders.get(KEPT)
            table.add_row(
                "" if i else work, name, f"{1 / statistics.median(times):.2f}",
                f"{times_as_fast(rows[0][1], times):.2f}",
                f"{times_as_fast(kept, times):.2f}" if kept else "",
            )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
