"""Recipes: what is trained, on what, and how, as small TOML files.

A recipe has four tables, one for each dataclass here: `[model]` (a `ModelConfig`, for a new model),
`[start]` (where the weights come from), `[data]` and `[train]`. The package ships the paper's recipes
and those of `mini`; `read_recipe` takes a name or a file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from .config import ModelConfig, build_dataclass
from .errors import RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"
TrainPrecision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Where the weights come from: a whole checkpoint, or an encoder and a language model.

    `checkpoint` is what `load_model` takes. Without one, a new model is built of `[model]`: its
    Q-Former and tokenizer start from `bert` (a folder or hub name of a BERT, or `pip:PACKAGE`), its
    encoder from `model.encoder.pretrained` or from `encoder` (`pip:PACKAGE`).
    """

    checkpoint: str = ""
    bert: str = ""
    encoder: str = ""
    # Forget a checkpoint's query half: it starts again as that of a new model does.
    renew_queries: bool = False
    # Query tokens start as a sentence, [CLS] ... [SEP], of these num_queries - 2 words; without words
    # they are random, as in the paper.
    query_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for a contradiction."""
        object.__setattr__(self, "query_words", tuple(self.query_words))
        if bool(self.checkpoint) == bool(self.bert):
            raise ValueError("[start] names either a checkpoint or a bert")
        if self.checkpoint and self.query_words and not self.renew_queries:
            raise ValueError("query_words are for a new query half: renew_queries = true")
        if self.bert and self.renew_queries:
            raise ValueError("renew_queries is for a checkpoint: with a bert all queries are new")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What becomes of the photographs and captions in training."""

    splits: tuple[str, ...] = ("train",)
    validation_splits: tuple[str, ...] = ("val",)
    validation_share: float = (
        0.05  # of the training images, held out where no file has such a split
    )
    # What an epoch is made of: "images", captions of each drawn at random, or "captions", each
    # with its image; then captions of one image may meet in a batch.
    rows: Literal["images", "captions"] = "images"
    # Captions of an image that ITC takes as its positives at once, drawn at random; those of an image
    # with fewer are repeated. ITM and ITG take the first.
    captions_per_image: int = 1
    augment: bool = True  # random resized crop and flip
    crop_scale: tuple[float, float] = (0.5, 1.0)  # share of the area that a random crop keeps
    flip: bool = True
    text_tokens: int = 32  # T, longest caption
    image_size: int | None = None  # pixels; None is the checkpoint's
    # Pixels of an image in training; None is `image_size`. Smaller ones cost less, and as a crop shows
    # things larger than the whole image does, they are as large in both (FixRes, Touvron et al. 2019).
    crop_size: int | None = None
    # Views of an image that are drawn and encoded beforehand, where the encoder is frozen: an epoch
    # then costs the Q-Former only. 0 draws and encodes a new one each time (without augmentation
    # there is only one, which is always encoded beforehand).
    views: int = 0
    workers: int = 4  # decoding processes

    def __post_init__(self) -> None:
        """Make tuples of lists; raise ValueError for impossible values."""
        for name in ("splits", "validation_splits", "crop_scale"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError("crop_scale is two shares of the area, 0 < low <= high <= 1")
        if self.text_tokens < 3 or self.views < 0 or self.workers < 0:
            raise ValueError("text_tokens is at least 3, views and workers at least 0")
        if self.captions_per_image < 1:
            raise ValueError("captions_per_image is at least 1")
        if self.captions_per_image > 1 and self.rows == "captions":
            raise ValueError("data.rows = 'captions' is one caption an image already")
        for name in ("image_size", "crop_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1")
        if not 0 <= self.validation_share < 1:
            raise ValueError("validation_share is in [0, 1)")
        if self.rows == "captions" and self.views:
            raise ValueError("data.views caches images: it excludes data.rows = 'captions'")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. One of `steps` and `epochs` says how long."""

    steps: int | None = None  # updates
    epochs: float | None = None
    batch_size: int = 128  # pairs that ITC contrasts, over all processes
    # Batches whose gradients are added up for an update. It saves no memory of ITC's and gives it no
    # more negatives: those come from one batch.
    accumulate: int = 1
    # Objectives, weighed in the sum; 0 leaves one out.
    itc_weight: float = 1.0
    itm_weight: float = 1.0
    itg_weight: float = 1.0
    # Pairs of a batch that ITM starts from, over all processes; None is all, as published.
    itm_anchors: int | None = None
    # ITM's negatives are drawn uniformly up to here, by ITC similarity from there on, and in between
    # ever harder (updates). Hard ones from the first update are the paper's way; on small data ITM
    # then never leaves the prior.
    hard_negatives_from: int = 0
    hard_negatives_full: int = 0
    # Rates
    lr: float = 1e-4  # of layers that start from a language model
    min_lr: float = 0.0
    warmup_lr: float = 0.0
    warmup_steps: int = 0
    new_lr_scale: float = 1.0  # times `lr`: query tokens, cross-attention, projections, ITM head
    encoder_lr_scale: float = 1.0
    layer_decay: float = 1.0  # of the encoder's rates, a layer
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float | None = None
    # Leave what captions pass through as it is (self-attention, text feed-forward, embeddings) and
    # train the query half to match: locked-text tuning. A caption is then encoded once in a run; one
    # from shards each time.
    freeze_text: bool = False
    # The encoder
    train_encoder: bool = False
    encoder_layers: int | None = None  # train the uppermost so many only; None is all
    gradient_checkpointing: bool = False
    # Regularisation and averages
    attention_dropout: float | None = None  # None is the model's dropout
    ema_decay: float = 0.0  # 0: no moving average of the weights
    # Choose the scale of the ITM head on so many validation images at the end (`calibration.py`);
    # 0 leaves it as trained, as published.
    calibration_images: int = 0
    # Running
    seed: int = 0
    precision: TrainPrecision = "auto"
    validate_every: int = 1000  # updates
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        """Raise ValueError for settings that cannot train."""
        object.__setattr__(self, "betas", tuple(self.betas))
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("[train] needs steps or epochs, and not both")
        for name in (
            "steps", "epochs", "batch_size", "accumulate", "itm_anchors", "encoder_layers",
            "validate_every", "checkpoint_every", "keep_checkpoints",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (value <= 0 if name == "epochs" else value < 1):
                raise ValueError(f"{name} must be at least 1")
        for name in ("lr", "min_lr", "warmup_lr", "warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if not (self.itc_weight or self.itm_weight or self.itg_weight):
            raise ValueError("at least one of itc_weight, itm_weight and itg_weight is positive")
        if self.hard_negatives_full < self.hard_negatives_from:
            raise ValueError("hard_negatives_full is not before hard_negatives_from")
        if not 0 <= self.ema_decay < 1:
            raise ValueError("ema_decay is in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe, whole."""

    name: str
    start: StartConfig
    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig | None = None  # of a new model

    def __post_init__(self) -> None:
        """Raise ValueError for a contradiction."""
        if (self.model is None) == (not self.start.checkpoint):
            raise ValueError("[model] describes a new model: give it with [start] bert, only")
        if self.data.views and self.train.train_encoder:
            raise ValueError("data.views caches a frozen encoder: it excludes train.train_encoder")
        if self.views and self.data.crop_size is not None:
            raise ValueError(
                "what is encoded beforehand (data.views, or everything without data.augment) is of "
                "data.image_size: it excludes data.crop_size"
            )

    @property
    def views(self) -> int:
        """Views of an image that are encoded beforehand; 0 is none."""
        frozen = not self.train.train_encoder
        return self.data.views or int(frozen and not self.data.augment)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `Recipe.from_dict` is the inverse."""
        data = {"start": asdict(self.start), "data": asdict(self.data), "train": asdict(self.train)}
        return data if self.model is None else {"model": self.model.to_dict(), **data}

    @classmethod
    def from_dict(cls, name: str, data: Mapping[str, Any]) -> Recipe:
        """Build a recipe from its tables.

        Raises:
            RecipeError: an unknown table or field, or a value that makes no sense; named.
        """
        unknown = sorted(set(data) - {f.name for f in fields(cls)} | set(data) & {"name"})
        if unknown:
            raise RecipeError(f"recipe {name}: unknown table(s) {', '.join(unknown)}")
        try:
            return cls(
                name=name,
                start=build_dataclass(StartConfig, data.get("start", {}), "start"),
                data=build_dataclass(DataConfig, data.get("data", {}), "data"),
                train=build_dataclass(TrainConfig, data.get("train", {}), "train"),
                model=ModelConfig.from_dict(data["model"]) if "model" in data else None,
            )
        except (ValueError, TypeError) as error:
            raise RecipeError(f"recipe {name}: {error}") from error


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(file.stem for file in RECIPES.glob("*.toml"))


def read_recipe(name_or_file: str | os.PathLike[str], changes: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a file.

    Args:
        name_or_file: such as "mini", or a path that ends in `.toml`.
        changes: `table.key=value`, the value as in TOML; a bare word is a string.

    Raises:
        RecipeError: there is none, or it is wrong; the message says where.
    """
    name = os.fspath(name_or_file)
    file = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(recipe_names())
        raise RecipeError(f"no recipe {name!r}: give a .toml file or one of {known}") from error
    except OSError as error:
        raise RecipeError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise RecipeError(f"{file}: {error}") from error
    for change in changes:
        _apply(data, change)
    return Recipe.from_dict(file.stem, data)


def _apply(data: dict[str, Any], change: str) -> None:
    dotted, equals, text = change.partition("=")
    *tables, key = dotted.strip().split(".")
    if not equals or not tables or not key:
        raise RecipeError(f"{change!r} is not table.key=value, such as train.lr=1e-4")
    table = data
    for part in tables:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{dotted}: {part} is no table")
    if text.strip() == "none":
        table.pop(key, None)
        return
    try:
        table[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[key] = text  # where a string is wanted; elsewhere its type is refused


def check_length(config: TrainConfig, images: int) -> None:
    """Check that an epoch of so many images holds a batch.

    Raises:
        RecipeError: it does not.
    """
    if images < config.batch_size:
        raise RecipeError(
            f"{images} images are fewer than a batch of {config.batch_size}: "
            f"--set train.batch_size={images}"
        )


def with_total_steps(config: TrainConfig, images: int | None) -> TrainConfig:
    """Return the configuration with `epochs` counted out as `steps`.

    Args:
        config: the configuration.
        images: in an epoch; None where nobody knows (a stream).

    Raises:
        RecipeError: epochs are asked of a stream, or there are too few images for a batch.
    """
    if images is not None:
        check_length(config, images)
    if config.epochs is None:
        return config
    if images is None:
        raise RecipeError(
            "the length of a stream is unknown: --set train.epochs=none --set train.steps=N"
        )
    batches = config.epochs * (images // config.batch_size)
    return replace(config, steps=max(1, round(batches / config.accumulate)), epochs=None)
