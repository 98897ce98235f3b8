"""A training step, ours against the same step written with transformers' `Blip2QFormerModel`.

    python -m blip2_search.benchmarks.train_step [--size mini|base] [--precision bf16]

Both have the same sizes and see the same random image tokens and captions; the encoder is frozen and
left out. The other step is written in the straightforward way: captions padded to 32 tokens, a pass for
each objective, vocabulary logits at every position. Steps alternate and the ratio is taken pair by
pair, because machines are noisy; memory is the peak of a process that runs one of the two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..retrieval.config import EncoderConfig, ModelConfig, QFormerConfig
from ..retrieval.loading import pick_device
from ..retrieval.model import Precision, RetrievalModel, autocast
from ..retrieval.names import DEFAULT_MODEL
from ..retrieval.optimizer import freeze_unused
from ..retrieval.own_format import EMBEDDED, load_tokenizer
from ..retrieval.recipe import TrainConfig
from ..retrieval.text_batch import TextBatch
from ..retrieval.trainer import Objectives, attention_kernel

MINI = QFormerConfig(num_layers=6, hidden_size=384, ffn_size=1536, image_token_size=1280)
SIZES = {"mini": (MINI, 25), "base": (QFormerConfig(), 257)}  # and image tokens
CAPTIONS = (
    "a dog runs through tall grass",
    "two men in red shirts are playing football on a muddy field in the rain",
    "a child on a swing",
    "people are standing in front of a white building with a clock tower",
)
TEXT_TOKENS = 32
Step = Callable[[], Tensor]


def our_step(size: str, batch: int, device: torch.device) -> Step:
    """Return our step: all three losses of one batch, not yet backwards."""
    qformer, patches = SIZES[size]
    config = ModelConfig(
        name=size,
        encoder=EncoderConfig(kind="timm", name="test_efficientnet"),
        qformer=qformer,
    )
    model = RetrievalModel(config, load_tokenizer(EMBEDDED / DEFAULT_MODEL, config)).to(device)
    train = TrainConfig(steps=1, batch_size=batch)
    freeze_unused(model, train)
    objectives = Objectives(model, train, encoded=True).train()
    tokens, captions = _inputs(batch, patches, qformer.image_token_size)
    groups = torch.arange(batch, device=device)

    def step() -> Tensor:
        model.zero_grad()
        losses = objectives(tokens.to(device), model.tokenize(captions), groups, 1.0, 0)
        return sum(losses.values(), torch.zeros((), device=device))

    return step


def their_step(size: str, batch: int, device: torch.device) -> Step:
    """Return the step with transformers' Q-Former."""
    qformer, patches = SIZES[size]
    theirs = TransformersStage1(qformer).to(device).train()
    tokens, captions = _inputs(batch, patches, qformer.image_token_size)
    config = ModelConfig(name=size, encoder=EncoderConfig(kind="timm", name="x"), qformer=qformer)
    tokenizer = load_tokenizer(EMBEDDED / DEFAULT_MODEL, config)
    text = TextBatch.of(tokenizer(captions)).padded(TEXT_TOKENS)

    def step() -> Tensor:
        theirs.zero_grad()
        loss: Tensor = theirs(
            tokens.to(device), text.token_ids.to(device), text.mask.to(device).long()
        )
        return loss

    return step


class TransformersStage1(nn.Module):
    """BLIP-2's stage 1 over `Blip2QFormerModel`, as one would write it down."""

    def __init__(self, config: QFormerConfig) -> None:
        """Build with the sizes of a configuration of ours."""
        from transformers import Blip2QFormerConfig, Blip2QFormerModel
        from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

        super().__init__()
        theirs = Blip2QFormerConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.ffn_size,
            cross_attention_frequency=config.cross_attention_every,
            encoder_hidden_size=config.image_token_size,
            use_qformer_text_input=True,
        )
        self.qformer: Any = Blip2QFormerModel(theirs)
        self.embeddings: Any = Blip2TextEmbeddings(theirs)  # type: ignore[no-untyped-call]
        self.query_tokens = nn.Parameter(
            0.02 * torch.randn(1, config.num_queries, config.hidden_size)
        )
        self.ln_vision = nn.LayerNorm(config.image_token_size)
        self.vision_proj = nn.Linear(config.hidden_size, 256)
        self.text_proj = nn.Linear(config.hidden_size, 256)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.lm_transform = nn.Sequential(
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.GELU(),
            nn.LayerNorm(config.hidden_size),
        )
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.dec_id = config.vocab_size - 1

    def forward(self, image_tokens: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return ITC + ITM + ITG of (B, P, D), (B, 32) and (B, 32)."""
        image_tokens = self.ln_vision(image_tokens)
        batch = len(ids)
        queries = self.query_tokens.expand(batch, -1, -1)
        query_out = self.qformer(query_embeds=queries, encoder_hidden_states=image_tokens)[0]
        text_out = self.qformer(
            query_embeds=self.embeddings(input_ids=ids), query_length=0, attention_mask=mask
        )[0]
        images = F.normalize(self.vision_proj(query_out).float(), dim=-1)
        texts = F.normalize(self.text_proj(text_out[:, 0]).float(), dim=-1)
        logits = torch.einsum("nqe,be->nbq", images, texts).amax(dim=-1) / self.temperature
        own = torch.arange(batch, device=ids.device)
        itc = F.cross_entropy(logits, own, label_smoothing=0.1)
        itc = (itc + F.cross_entropy(logits.T, own, label_smoothing=0.1)) / 2

        with torch.no_grad():
            weights = logits.masked_fill(torch.eye(batch, device=ids.device) > 0, -torch.inf)
            texts_of = torch.multinomial(weights.softmax(1), 1).squeeze(1)
            images_of = torch.multinomial(weights.T.softmax(1), 1).squeeze(1)
        pairs = torch.cat((own, images_of, own))
        pair_ids, pair_mask = (torch.cat((x, x, x[texts_of])) for x in (ids, mask))
        out = self._joint(image_tokens[pairs], pair_ids, pair_mask)
        match = self.itm_head(out[:, : queries.shape[1]]).mean(dim=1)
        labels = torch.cat((torch.ones(batch), torch.zeros(2 * batch))).long().to(ids.device)
        itm = F.cross_entropy(match.float(), labels)

        decoder_ids = ids.clone()
        decoder_ids[:, 0] = self.dec_id
        out = self._joint(image_tokens, decoder_ids, mask, causal=True)[:, queries.shape[1] :]
        words = self.lm_transform(out) @ self.embeddings.word_embeddings.weight.T
        targets = ids.masked_fill(mask == 0, -100)[:, 1:]
        itg = F.cross_entropy(
            words[:, :-1].float().flatten(0, 1), targets.flatten(), label_smoothing=0.1
        )
        return itc + itm + itg

    def _joint(self, images: Tensor, ids: Tensor, mask: Tensor, causal: bool = False) -> Tensor:
        queries = self.query_tokens.expand(len(ids), -1, -1)
        embeds = self.embeddings(input_ids=ids, query_embeds=queries)
        count, length = queries.shape[1], embeds.shape[1]
        seen = torch.cat((mask.new_ones(len(ids), count), mask), dim=1)
        if causal:
            allowed = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
            allowed[:count, :count] = True
            seen = (allowed & (seen[:, None] > 0))[:, None]
        out: Tensor = self.qformer(
            query_embeds=embeds,
            query_length=count,
            attention_mask=seen,
            encoder_hidden_states=images,
        )[0]
        return out


def _inputs(batch: int, patches: int, channels: int) -> tuple[Tensor, list[str]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, patches, channels, generator=generator)
    return tokens, [CAPTIONS[i % len(CAPTIONS)] for i in range(batch)]


def seconds(step: Step, device: torch.device, precision: Precision, ours: bool) -> float:
    """Time one step, forwards and backwards."""
    start = time.perf_counter()
    with attention_kernel(device) if ours else nullcontext():
        with autocast(device, precision):
            loss = step()
        loss.backward()  # type: ignore[no-untyped-call]
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(side: str, arguments: list[str]) -> int:
    """Return the peak memory of a process that runs one side, bytes."""
    command = [sys.executable, "-m", "blip2_search.benchmarks.train_step", *arguments]
    done = subprocess.run([*command, "--only", side], check=True, capture_output=True, text=True)
    return int(done.stdout)


def main() -> None:
    """Run the benchmark and print its table; JSON goes to `--out`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="mini")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=7, help="of steps, ours and theirs in turn")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = pick_device(args.device)
    sides = {"ours": our_step, "theirs": their_step}
    if args.only:
        step = sides[args.only](args.size, args.batch_size, device)
        for _ in range(2):
            seconds(step, device, args.precision, args.only == "ours")
        on_gpu = device.type == "cuda"
        print(torch.cuda.max_memory_allocated() if on_gpu else _peak_of_this_process())
        return

    steps = {name: build(args.size, args.batch_size, device) for name, build in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(args.pairs + 1):
        for name, step in steps.items():
            spent = seconds(step, device, args.precision, name == "ours")
            if pair:  # the first warms up
                times[name].append(spent)
    settings = ["--size", args.size, "--batch-size", str(args.batch_size)]
    settings += ["--precision", args.precision, "--device", args.device]
    memory = {name: peak_memory(name, settings) for name in sides}
    ratios = [t / o for o, t in zip(times["ours"], times["theirs"], strict=True)]
    report: dict[str, Any] = {
        "command": f"python -m blip2_search.benchmarks.train_step {' '.join(settings)}",
        "pairs_per_second": {n: args.batch_size / statistics.median(t) for n, t in times.items()},
        "speed_ratio": {
            "median": statistics.median(ratios), "min": min(ratios), "max": max(ratios),
        },
        "peak_memory_bytes": memory,
        "memory_ratio": memory["theirs"] / memory["ours"],
        "versions": {"torch": torch.__version__, "transformers": _version("transformers")},
    }  # fmt: skip
    table = Table("", "pairs/s", "peak memory", title=f"one step of stage 1, {args.size}")
    for name in sides:
        rate = report["pairs_per_second"][name]
        table.add_row(name, f"{rate:.1f}", f"{memory[name] / 1e9:.2f} GB")
    Console().print(table)
    Console().print(
        f"ours is {report['speed_ratio']['median']:.2f} times as fast "
        f"({min(ratios):.2f} to {max(ratios):.2f}) in 1/{report['memory_ratio']:.2f} of the memory"
    )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


def _peak_of_this_process() -> int:
    """Return the peak of resident memory, bytes; getrusage would count the parent's before the exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the peak of memory on a CPU is known on Linux only")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
