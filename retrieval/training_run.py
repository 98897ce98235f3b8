"""A training run from a recipe and files: everything that is around the loop."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from .batches import BatchSource, CachedTokens, DrawnImages, Shards
from .calibration import calibrate_itm
from .curves import draw_curves
from .data import CaptionedImage, read_captioned
from .distributed import World, any_says, joined_world
from .errors import EmptySplitError, TrainingError
from .feature_cache import OnProgress, TokenCache, encoder_tokens
from .loading import load_model, pick_device
from .model import RetrievalModel
from .preprocess import TextTransform
from .recipe import Recipe, with_total_steps
from .run_folder import RunFolder
from .start import starting_model
from .trainer import Observer, Trainer, pick_precision
from .validation import Validator

Prepare = Callable[[str], OnProgress]  # announces a piece of work, and how far it is


@dataclass(frozen=True, kw_only=True)
class CaptionFile:
    """A file of captions (or webdataset shards), and the folder that its paths are relative to."""

    file: Path
    images: Path

    @property
    def is_shards(self) -> bool:
        """Whether this names webdataset shards."""
        return self.file.suffix == ".tar"


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a run came to."""

    steps: int  # of this call
    resumed_at: int  # updates that were done before
    seconds: float
    best_recall: float | None  # mean of the six recalls in validation, percent
    model: Path  # the best model; the last one where there was no validation
    curves: Path


def run_recipe(
    recipe: Recipe,
    data: Sequence[CaptionFile],
    out: Path,
    *,
    cache: Path,
    resume: bool = False,
    device: str = "auto",
    tensorboard: bool = False,
    observers: Sequence[Observer] = (),
    prepare: Prepare | None = None,
) -> RunReport | None:
    """Train what a recipe says.

    Under `torchrun` every process calls this; the first one writes and observes.

    Args:
        recipe: see `recipe.read_recipe`.
        data: where the captions are; several are trained on together.
        out: the folder of the run, see `run_folder.py`.
        cache: the folder of encoded images, for recipes with `data.views`.
        resume: go on from the last checkpoint in `out`, if there is one.
        device: see `loading.pick_device`; under torchrun "auto" is each process's own GPU.
        tensorboard: log for TensorBoard too, in `out`/tensorboard.
        observers: see `Trainer`.
        prepare: called with the name of a long piece of preparation, gives its progress callback.

    Returns:
        What the run came to, in the first process; None in the others.

    Raises:
        DatasetError, CheckpointError, RecipeError, TrainingError: what is wrong, in words.
        KeyboardInterrupt: interrupted; a checkpoint was written if training had begun.
    """
    _require("matplotlib", "draws its curves with")
    if tensorboard:
        _require("tensorboard", "logs for TensorBoard with")
    start = time.perf_counter()
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    folder = RunFolder(out)
    with joined_world(on_gpu) as world, ExitStack() as stack:
        if world.is_first:
            folder.check(recipe, resume=resume)
        any_says(False)  # the others wait for the checks of the first
        torch.manual_seed(recipe.train.seed)
        own_gpu = on_gpu and world.size > 1
        model = starting_model(recipe)
        model.to(pick_device(f"cuda:{world.local_rank}" if own_gpu else device))
        source, validate = _sources(recipe, model, data, cache, prepare, world)
        observers = [folder.log, *observers]
        if tensorboard and world.is_first:
            observers.append(stack.enter_context(_tensorboard(out / "tensorboard")))
        trainer = Trainer(
            model,
            source,
            with_total_steps(recipe.train, source.images),
            text_transform=_training_text(model, recipe.data.text_tokens),
            folder=folder,
            world=world,
            validate=validate,
            observers=observers,
        )
        if resume:
            folder.restore(trainer.state)
        resumed_at = trainer.state.step
        if world.is_first:
            folder.begin(recipe)
            stack.callback(_draw, folder)
        history = trainer.run()
        if not world.is_first:
            return None
        if validate is None:
            folder.save_best(model)
        if recipe.train.calibration_images and not folder.is_calibrated():
            held_out = _read(data, recipe.data.validation_splits)
            event = _calibrate(folder, held_out[: recipe.train.calibration_images], device)
            for observer in observers:
                observer({"step": trainer.state.step, **event})
    return RunReport(
        steps=len(history),
        resumed_at=resumed_at,
        seconds=time.perf_counter() - start,
        best_recall=None if validate is None else trainer.state.best,
        model=folder.best,
        curves=folder.curves,
    )


def _draw(folder: RunFolder) -> None:
    if folder.log_file.exists():
        draw_curves(folder.log_file, folder.curves)


def _require(package: str, purpose: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise TrainingError(f"training {purpose} {package}: pip install 'blip2-search[train]'")


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Observer]:
    """Give an observer that logs for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    def observe(event: Mapping[str, Any]) -> None:
        for name, value in {**event, **event.get("validation", {})}.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(name, value, event["step"])

    with SummaryWriter(folder) as writer:
        yield observe


def _read(data: Sequence[CaptionFile], splits: Sequence[str]) -> list[CaptionedImage]:
    """Read what lies in these splits, of all files that are no shards; perhaps nothing."""
    found: list[CaptionedImage] = []
    for part in data:
        if not part.is_shards:
            with suppress(EmptySplitError):
                found += read_captioned(part.file, part.images, splits)
    return found


def _sources(
    recipe: Recipe,
    model: RetrievalModel,
    data: Sequence[CaptionFile],
    cache: Path,
    prepare: Prepare | None,
    world: World,
) -> tuple[BatchSource, Validator | None]:
    """Return what to train on and what to validate with."""
    config = recipe.data
    train, held_out = _read(data, config.splits), _read(data, config.validation_splits)
    precision = pick_precision(recipe.train.precision, model.device)

    def tokens(images: Sequence[CaptionedImage], views: int, what: str) -> TokenCache:
        return encoder_tokens(
            model,
            [image.path for image in images],
            cache,
            config,
            views=views,
            seed=recipe.train.seed,
            precision=precision,
            on_progress=prepare(f"Encoding {what}") if prepare else None,
        )

    shards = [part.file for part in data if part.is_shards]
    if config.views and not shards:
        if world.is_first:
            tokens(train, config.views, "training images")
        any_says(False)  # the others find the cache filled
        source: BatchSource = CachedTokens(train, tokens(train, config.views, "training images"))
    elif shards:
        source = Shards([str(file) for file in shards], model.image_transform, config)
    else:
        source = DrawnImages(train, model.image_transform, config)
    if not held_out or not world.is_first:
        return source, None
    frozen = not recipe.train.train_encoder
    cached = tokens(held_out, 1, "validation images") if frozen else None
    return source, Validator(held_out, cached, precision)


def _calibrate(
    folder: RunFolder, images: Sequence[CaptionedImage], device: str
) -> dict[str, float | dict[str, float]]:
    """Scale the ITM head of the best model; return the scale, and R@1 of all that were tried."""
    if not images:
        raise TrainingError("train.calibration_images needs validation images: there are none")
    model = load_model(folder.best, device, "float32")
    precision = pick_precision("auto", model.device)
    scale, recall = calibrate_itm(model, images, precision=precision)
    folder.save_best(model)
    return {"itm_scale": scale, "recall": {str(tried): value for tried, value in recall.items()}}


def _training_text(model: RetrievalModel, tokens: int) -> TextTransform:
    """Return the model's tokenizer, cutting captions at the length of training."""
    tokenizer = Tokenizer.from_str(model.text_transform.tokenizer.to_str())
    return TextTransform(tokenizer, replace(model.config.preprocess, max_text_tokens=tokens))
