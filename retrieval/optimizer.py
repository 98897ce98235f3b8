"""The schedule and the parameter groups of training, as functions of the configuration alone."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .encoders import layers_above
from .model import RetrievalModel
from .recipe import TrainConfig

# Layers that start from random numbers where the Q-Former starts from a BERT.
NEW = ("query_tokens", "cross_attention", "ln_vision", "image_positions", "_proj.", "itm_head")
# What captions pass through; the self-attention serves the queries too (BLIP-2, section 3.1).
TEXT_HALF = (
    "word_embeddings", "position_embeddings", "embedding_norm", "self_attention", "text_ffn",
)  # fmt: skip
NOT_DECAYED = (
    "query_tokens", "image_positions", "cls_token", "class_embedding",
    "pos_embed", "position_embedding", "positional_embedding",
)  # fmt: skip


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of an update: linear warm-up from `warmup_lr`, then cosine to `min_lr`.

    >>> config = TrainConfig(steps=100, lr=1.0, min_lr=0.0, warmup_lr=0.0, warmup_steps=10)
    >>> [round(learning_rate(step, config), 3) for step in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if step < config.warmup_steps:
        progress = step / config.warmup_steps
        return config.warmup_lr + (config.lr - config.warmup_lr) * progress
    assert config.steps is not None
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.min_lr + (config.lr - config.min_lr) * cosine


def hardness(step: int, config: TrainConfig) -> float:
    """Return how hard the negatives of ITM are at an update: 0 uniform, 1 by ITC similarity.

    >>> config = TrainConfig(steps=100, hard_negatives_from=10, hard_negatives_full=20)
    >>> [hardness(step, config) for step in (0, 10, 15, 20, 99)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    start, full = config.hard_negatives_from, config.hard_negatives_full
    if step < start:
        return 0.0
    return 1.0 if step >= full else (step - start) / (full - start)


def freeze_unused(model: RetrievalModel, config: TrainConfig) -> None:
    """Decide what is trained: no frozen half, nor the head of an objective without weight."""
    model.requires_grad_(True)
    model.image_encoder.freeze(not config.train_encoder)
    if config.train_encoder and config.encoder_layers is not None:
        above = layers_above([name for name, _ in model.image_encoder.named_parameters()])
        for name, parameter in model.image_encoder.named_parameters():
            parameter.requires_grad_(above[name] <= config.encoder_layers)
    if config.freeze_text:
        for name, parameter in model.qformer.named_parameters():
            parameter.requires_grad_(not any(part in name for part in TEXT_HALF))
    for itc_only in (model.vision_proj, model.text_proj, model.temperature):
        itc_only.requires_grad_(config.itc_weight > 0)
    for head, weight in ((model.itm_head, config.itm_weight), (model.lm_head, config.itg_weight)):
        if head is not None:
            head.requires_grad_(weight > 0)


def parameter_groups(model: RetrievalModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Group the trained parameters by their share of the rate and by decay.

    Biases, norms, query tokens, positions and the temperature do not decay. A layer of the encoder
    has `encoder_lr_scale * layer_decay ** (layers above it)` of the rate; new layers have
    `new_lr_scale` of it.
    """
    above = layers_above([name for name, _ in model.image_encoder.named_parameters()])
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if name.startswith("image_encoder."):
            layers = above[name.removeprefix("image_encoder.")]
            scale = config.encoder_lr_scale * config.layer_decay**layers
        elif any(part in name for part in NEW):
            scale = config.new_lr_scale
        decayed = parameter.ndim >= 2 and not any(part in name for part in NOT_DECAYED)
        groups.setdefault((scale, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_scale": scale,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (scale, decayed), parameters in groups.items()
    ]
