"""A training run from a recipe and files: everything that is around the loop."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from .calibration import calibrate_itm
from .curves import draw_curves
from .data import CaptionedImage
from .distributed import any_says, check_agreement, joined_world
from .errors import TrainingError
from .frozen_parts import FrozenTexts
from .loading import load_model, pick_device
from .model import RetrievalModel
from .preprocess import TextTransform
from .progress import Prepare
from .recipe import Recipe, with_total_steps
from .run_folder import RunFolder
from .start import starting_model
from .trainer import Observer, Trainer, pick_precision
from .training_data import CaptionFile, training_data
from .validation import Validator


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
            folder.check(recipe, [part.file for part in data], resume=resume)
        any_says(False)  # the others wait for the checks of the first
        torch.manual_seed(recipe.train.seed)
        own_gpu = on_gpu and world.size > 1
        model = starting_model(recipe)
        model.to(pick_device(f"cuda:{world.local_rank}" if own_gpu else device))
        config = recipe.train
        precision = pick_precision(config.precision, model.device)
        prepared = training_data(
            recipe, model, data, cache,
            precision=precision,
            world=world,
            prepare=prepare if world.is_first else None,
        )  # fmt: skip
        validate = None
        if prepared.held_out:
            validate = Validator(prepared.held_out, prepared.held_out_tokens, precision)
        observers = [folder.log, *observers]
        if tensorboard and world.is_first:
            observers.append(stack.enter_context(_tensorboard(out / "tensorboard")))
        text_transform, texts = _training_text(model, recipe.data.text_tokens), None
        if config.freeze_text and (captions := prepared.source.captions) is not None:
            announce = prepare if world.is_first else None
            texts = FrozenTexts(model, captions, text_transform, announce)
        trainer = Trainer(
            model,
            prepared.source,
            with_total_steps(config, prepared.source.images),
            text_transform=text_transform,
            frozen_texts=texts,
            folder=folder,
            world=world,
            validate=validate,
            observers=observers,
        )
        if resume:
            folder.restore(trainer.state)
            check_agreement(trainer.state.step)
        resumed_at = trainer.state.step
        if world.is_first:
            folder.begin(recipe, [part.file for part in data])
            stack.callback(_draw, folder)
            if prepared.skipped:
                trainer.tell({"step": resumed_at, "skipped": prepared.skipped})
        history = trainer.run()
        if not world.is_first:
            return None
        if not prepared.held_out:
            folder.save_best(model)
        elif config.calibration_images and not folder.is_calibrated():
            images = prepared.held_out[: config.calibration_images]
            trainer.tell({"step": trainer.state.step, **_calibrate(folder, images, device)})
    return RunReport(
        steps=len(history),
        resumed_at=resumed_at,
        seconds=time.perf_counter() - start,
        best_recall=trainer.state.best if prepared.held_out else None,
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
            if isinstance(value, float):
                writer.add_scalar(name, value, event["step"])

    with SummaryWriter(folder) as writer:
        yield observe


def _calibrate(
    folder: RunFolder, images: Sequence[CaptionedImage], device: str
) -> dict[str, float | dict[str, float]]:
    """Scale the ITM head of the best model; return the scale, and the gains of all that were tried."""
    model = load_model(folder.best, device, "float32")
    precision = pick_precision("auto", model.device)
    scale, gains = calibrate_itm(model, images, precision=precision)
    folder.save_best(model)
    return {"itm_scale": scale, "gains": {str(tried): gain for tried, gain in gains.items()}}


def _training_text(model: RetrievalModel, tokens: int) -> TextTransform:
    """Return the model's tokenizer, cutting captions at the length of training."""
    tokenizer = Tokenizer.from_str(model.text_transform.tokenizer.to_str())
    return TextTransform(tokenizer, replace(model.config.preprocess, max_text_tokens=tokens))
