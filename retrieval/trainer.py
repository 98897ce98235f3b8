"""Stage-1 training of the Q-Former on a frozen encoder's cached tokens (BLIP-2, section 3.1)."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .data import CaptionedImage
from .losses import itc_loss, itg_loss, itm_loss
from .model import Precision, RetrievalModel, autocast
from .preprocess import TextBatch

log = logging.getLogger(__name__)

Validate = Callable[[RetrievalModel], dict[str, float]]
TokenCache = npt.NDArray[np.float16]  # (images, views, P, D), of `feature_cache`


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. The optimiser's defaults are the paper's; the rest suits a small model."""

    steps: int
    batch_size: int = 128
    lr: float = 3e-4  # of layers that start from a language model
    new_lr_scale: float = 3.0  # times `lr`: query tokens, cross-attention, projections, heads
    min_lr_ratio: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    itg_weight: float = 1.0
    itm_weight: float = 1.0
    itm_anchors: int | None = (
        None  # pairs of a batch that ITM starts from; None is all, as published
    )
    # Negatives are drawn uniformly at first and by ITC similarity from here on: drawn hard from the
    # first step, ITM never leaves the prior on small data.
    hard_negatives_from: int = 0
    seed: int = 0
    precision: Precision = "fp32"
    validate_every: int = 200

    def __post_init__(self) -> None:
        """Raise ValueError for settings that cannot train."""
        if self.batch_size < 2:
            raise ValueError("batch_size must be at least 2: contrast needs a negative")
        if self.steps < 1:
            raise ValueError("steps must be positive")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the factor on the base rate at a step: linear warm-up, then cosine to the minimum."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine


def parameter_groups(model: RetrievalModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Group parameters by rate (new or pretrained) and decay (matrices only, never query tokens)."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        pretrained = name.startswith("qformer.") and not any(
            part in name for part in ("query_tokens", "cross_attention")
        )
        decayed = parameter.ndim >= 2 and not any(
            part in name for part in ("query_tokens", "image_positions")
        )
        groups.setdefault((pretrained, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "base_lr": config.lr * (1.0 if pretrained else config.new_lr_scale),
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (pretrained, decayed), parameters in groups.items()
    ]


def train(
    model: RetrievalModel,
    data: Sequence[CaptionedImage],
    cache: TokenCache,
    config: TrainConfig,
    *,
    log_file: Path | None = None,
    validate: Validate | None = None,
) -> list[dict[str, float]]:
    """Train in place; return the losses of every step.

    Args:
        model: its Q-Former and heads are trained, its encoder stays frozen.
        data: images with their captions; one caption is drawn a step.
        cache: (images, views, P, D), float16, row i for `data[i]`; one view is drawn a step.
        config: the recipe.
        log_file: JSON lines, one a step and one a validation.
        validate: called every `validate_every` steps and after the last; its table is logged.

    Raises:
        ValueError: fewer images than a batch.
    """
    if len(data) < config.batch_size:
        raise ValueError(f"{len(data)} images are fewer than a batch of {config.batch_size}")
    torch.manual_seed(config.seed)
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.98))
    batches = _batches(data, cache, config)
    history: list[dict[str, float]] = []
    start = time.perf_counter()
    for step in range(config.steps):
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["base_lr"]
        tokens, captions, group_ids = next(batches)
        tokens, group_ids = tokens.to(model.device), group_ids.to(model.device)
        with autocast(model, config.precision):
            losses = step_losses(model, tokens, model.tokenize(captions), group_ids, config, step)
        total = (
            losses["itc"]
            + config.itm_weight * losses.get("itm", 0.0)
            + config.itg_weight * losses.get("itg", 0.0)
        )
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        with torch.no_grad():
            model.temperature.clamp_(0.01, 0.5)
        entry = {name: float(loss.detach()) for name, loss in losses.items()}
        history.append(entry)
        extra = {"norm": float(norm), "temperature": float(model.temperature.detach())}
        _log(log_file, {"step": step, "seconds": time.perf_counter() - start, **entry, **extra})
        last = step + 1 == config.steps
        if validate is not None and (last or (step + 1) % config.validate_every == 0):
            model.eval()
            _log(log_file, {"step": step + 1, **validate(model)})
            model.train()
    model.eval()
    model.refresh_fingerprint()
    return history


def step_losses(
    model: RetrievalModel,
    encoder_tokens: Tensor,
    text: TextBatch,
    group_ids: Tensor,
    config: TrainConfig,
    step: int,
) -> dict[str, Tensor]:
    """Return the losses of one batch: ITC, and ITG and ITM where their weights are positive.

    The query pass made for ITC serves ITG too.
    """
    image_tokens = model.normalise_tokens(encoder_tokens)
    query_pass = model.query_pass(image_tokens)
    itc, logits = itc_loss(
        query_pass.image_features, model.text_features(text), model.temperature, group_ids
    )
    losses = {"itc": itc}
    if config.itg_weight:
        dec_id = model.config.qformer.vocab_size - 1
        losses["itg"] = itg_loss(model, text, query_pass.keys_values, dec_id)
    if config.itm_weight:
        hardness = float(step >= config.hard_negatives_from)
        losses["itm"] = itm_loss(
            model, image_tokens, text, logits, group_ids,
            hardness=hardness, anchors=config.itm_anchors,
        )  # fmt: skip
    return losses


def _batches(
    data: Sequence[CaptionedImage], cache: TokenCache, config: TrainConfig
) -> Iterator[tuple[Tensor, list[str], Tensor]]:
    """Shuffle and deal for ever; draw a view and a caption an image. The last odd part is dropped."""
    generator = np.random.default_rng(config.seed)
    numbers = {group: i for i, group in enumerate(sorted({image.group for image in data}))}
    groups = np.array([numbers[image.group] for image in data])
    views = cache.shape[1]
    while True:
        order = generator.permutation(len(data))
        for i in range(0, len(order) - config.batch_size + 1, config.batch_size):
            rows = order[i : i + config.batch_size]
            tokens = cache[rows, generator.integers(views, size=len(rows))]
            captions = [str(generator.choice(data[row].captions)) for row in rows]
            yield torch.from_numpy(tokens).float(), captions, torch.from_numpy(groups[rows])


def _log(file: Path | None, entry: dict[str, Any]) -> None:
    log.info("%s", entry)
    if file is not None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
