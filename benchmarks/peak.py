"""How near to the device's peak encoding and reranking come.

    python -m blip2_search.benchmarks.peak [--device cuda] [--dtype float16] [--model NAME]

Images a second and pairs a second, everything resident on the device, at the published size (BERT-base
under ViT-g, random weights) or of a model that loads here. The FLOPs are those that PyTorch counts in a
pass; the peak beside them is what one large matrix product reaches in the same run, in turns.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..retrieval.config import EncoderConfig, ModelConfig, QFormerConfig
from ..retrieval.loading import load_model, pick_device
from ..retrieval.model import RetrievalModel
from ..retrieval.names import DEFAULT_MODEL
from ..retrieval.own_format import EMBEDDED, load_tokenizer
from .inference import TEXT, Job, alternate
from .tables import PEAK, peak_table

PUBLISHED_SIZE = "vit-g"
SIDE = 4096  # of the matrices
LASTING = 0.5  # s, of a measurement at least


def published_size(vision_layers: int) -> RetrievalModel:
    """Return a BERT-base Q-Former under ViT-g with random weights."""
    torch.manual_seed(0)
    config = ModelConfig(
        name=PUBLISHED_SIZE,
        encoder=EncoderConfig(
            kind="blip2_vision", vision_config={"num_hidden_layers": vision_layers}
        ),
        qformer=QFormerConfig(),
    )
    return RetrievalModel(config, load_tokenizer(EMBEDDED / DEFAULT_MODEL, config))


def works(model: RetrievalModel, images: int, pairs: int) -> dict[str, tuple[Job, int]]:
    """Return what is measured, each with the images or pairs of one call."""
    side = model.config.preprocess.image_size
    pixels = torch.randn(images, 3, side, side, device=model.device, dtype=model.dtype)
    one_image = model.encode_pixels(pixels[:1])
    candidates = torch.randn(pairs, *one_image.shape[1:], device=model.device, dtype=model.dtype)
    kept = model.image_keys_values(candidates)
    text = model.tokenize([TEXT])
    texts = model.tokenize([f"{TEXT} {i}" for i in range(pairs)])
    same = torch.zeros(pairs, dtype=torch.int64, device=model.device)

    def rerank(tokens: torch.Tensor, **of: Any) -> torch.Tensor:
        return model.match_logits(model.normalise_tokens(tokens), **of)

    matrix = torch.randn(SIDE, SIDE, device=model.device, dtype=model.dtype)
    return {
        PEAK: (partial(torch.mm, matrix, matrix), 1),
        "images to ITC features": (
            lambda: model.features_from_encoder(model.encode_pixels(pixels)), images,
        ),
        "a text, candidates": (partial(rerank, candidates, text=text, text_of=same), pairs),
        "a text, candidates, keys and values kept": (
            partial(model.match_logits, kept, text, text_of=same), pairs,
        ),
        "an image, texts": (partial(rerank, one_image, text=texts, image_of=same), pairs),
    }  # fmt: skip


def flops(job: Job) -> int:
    """Return the floating-point operations of a call, two a multiplication and addition."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        job()
    total: int = counter.get_total_flops()
    return total


def lasting(job: Job, units: int, device: torch.device) -> tuple[Job, int]:
    """Return a job that repeats one until it can be timed, and waits for the device; with its units."""

    def repeat(times: int) -> None:
        for _ in range(times):
            job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    repeat(1)  # warm
    start = time.perf_counter()
    repeat(1)
    times = max(1, round(LASTING / (time.perf_counter() - start)))
    return partial(repeat, times), units * times


def measure(model: RetrievalModel, images: int, pairs: int) -> dict[str, dict[str, Any]]:
    """Return of each work the FLOPs of an image or pair, and the seconds it took in each round."""
    model.requires_grad_(False)  # the counter stumbles over parameters that want gradients
    with torch.inference_mode():
        jobs = works(model, images, pairs)
    counted = {name: flops(job) / units for name, (job, units) in jobs.items()}
    with torch.inference_mode():
        seconds = alternate(
            {name: lasting(job, units, model.device) for name, (job, units) in jobs.items()}
        )
    return {name: {"flops": counted[name], "seconds": seconds[name]} for name in jobs}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a model to load; by default the published size, at random")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", help="default: float16 on a GPU, float32 elsewhere")
    parser.add_argument("--vision-layers", type=int, default=39, help="of the published size")
    parser.add_argument("--images", type=int, help="in a batch; default: 128 on a GPU, else 2")
    parser.add_argument(
        "--pairs", type=int, help="in a batch; default: what the model reranks at once"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = pick_device(args.device)
    on_gpu = device.type == "cuda"
    dtype = args.dtype or ("float16" if on_gpu else "float32")
    if args.model:
        model = load_model(args.model, str(device), dtype)
    else:
        model = published_size(args.vision_layers).to(device, getattr(torch, dtype)).eval()
    report = {
        "model": args.model or PUBLISHED_SIZE,
        "device": torch.cuda.get_device_name(device) if on_gpu else "processor",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "works": measure(
            model, args.images or (128 if on_gpu else 2), args.pairs or model.pairs_at_once
        ),
    }
    print(peak_table(report))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
