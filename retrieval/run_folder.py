"""The folder of a training run: its recipe, its log, its checkpoints, its best model.

recipe.json              what is trained, resolved
log.jsonl                the numbers of every update and validation
curves.png               the same, drawn
best/                    the model with the best recall in validation; half-precision
checkpoints/step-000200/ a model in full precision, and `state.pt` with all that a resumption needs
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel

from ..indexes.files import replace_file, sync_folder
from .checkpoints import save_model
from .errors import TrainingError
from .model import RetrievalModel
from .recipe import Recipe

PARTIAL = ".partial"


@dataclass(kw_only=True)
class TrainingState:
    """All that changes in training."""

    model: RetrievalModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None = None
    step: int = 0  # updates done
    best: float = -math.inf  # recall in validation

    @property
    def averaged_model(self) -> RetrievalModel:
        """The moving average of the weights, where there is one; else the model."""
        return self.model if self.average is None else cast(RetrievalModel, self.average.module)


class RunFolder:
    """Writes and reads the folder; every file and every checkpoint appears whole or not at all."""

    def __init__(self, path: Path) -> None:
        """Take the folder; nothing is made yet."""
        self.path = path
        self.log_file = path / "log.jsonl"
        self.curves = path / "curves.png"
        self.best = path / "best"
        self._recipe = path / "recipe.json"
        self._checkpoints = path / "checkpoints"

    def check(self, recipe: Recipe, files: Sequence[str], *, resume: bool) -> None:
        """Check that a run may begin here, or that the run that is here can be gone on with.

        Raises:
            TrainingError: there is a run and `resume` is false; or it followed another recipe.
        """
        if not self._recipe.exists():
            return
        if not resume:
            raise TrainingError(
                f"{self.path} holds a run already: --resume goes on with it, --out chooses another"
            )
        old = json.loads(self._recipe.read_text(encoding="utf-8"))
        difference = _first_difference(old, _plain(recipe, files))
        if difference:
            raise TrainingError(f"{self.path} followed another recipe: {difference}")

    def begin(self, recipe: Recipe, files: Sequence[str]) -> None:
        """Make the folder, and write down what is trained, and on which files."""
        self.path.mkdir(parents=True, exist_ok=True)
        replace_file(self._recipe, (json.dumps(_plain(recipe, files), indent=2) + "\n").encode())

    def is_calibrated(self) -> bool:
        """Tell whether the best model's ITM head was scaled already."""
        return self.log_file.exists() and "itm_scale" in self.log_file.read_text(encoding="utf-8")

    def checkpoints(self) -> list[Path]:
        """Return the whole checkpoints, the oldest first."""
        whole = [p for p in self._checkpoints.glob("step-*") if p.suffix != PARTIAL]
        return sorted(whole, key=lambda path: int(path.name.removeprefix("step-")))

    def save(self, state: TrainingState, *, keep: int) -> Path:
        """Write a checkpoint, then delete all but the last `keep`."""
        final = self._checkpoints / f"step-{state.step:06d}"
        partial = final.with_suffix(PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        save_model(state.model, partial)
        content = {
            "step": state.step,
            "best": state.best,
            "optimizer": state.optimizer.state_dict(),
            "scaler": state.scaler.state_dict(),
            "average": None if state.average is None else state.average.state_dict(),
        }
        with open(partial / "state.pt", "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        sync_folder(self._checkpoints)
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)
        return final

    def save_best(self, model: RetrievalModel) -> None:
        """Write the best model so far."""
        save_model(model, self.best, dtype=torch.float16)

    def restore(self, state: TrainingState) -> bool:
        """Fill the state from the last checkpoint; return whether there is one.

        Raises:
            TrainingError: it does not fit the model.
        """
        from safetensors.torch import load_file

        checkpoints = self.checkpoints()
        if not checkpoints:
            return False
        last = checkpoints[-1]
        try:
            content = torch.load(last / "state.pt", weights_only=True, map_location="cpu")
            state.model.load_state_dict(load_file(last / "model.safetensors"))
            state.optimizer.load_state_dict(content["optimizer"])
            state.scaler.load_state_dict(content["scaler"])
            if state.average is not None:
                state.average.load_state_dict(content["average"])
        except Exception as error:  # torch's unpickler raises whatever a torn file leads it to
            raise TrainingError(f"{last} cannot be resumed: {error}") from error
        state.step, state.best = content["step"], content["best"]
        return True

    def log(self, event: Mapping[str, Any]) -> None:
        """Append to the log; an observer of the trainer."""
        with self.log_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({key: _finite(value) for key, value in event.items()}) + "\n")


def _plain(recipe: Recipe, files: Sequence[str]) -> Any:
    """Return what JSON makes of a recipe: lists for tuples."""
    return json.loads(json.dumps({**recipe.to_dict(), "files": list(files)}))


def _finite(value: Any) -> Any:
    """Return null for what JSON has no number for, such as the norm of overflown gradients."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _first_difference(old: Any, new: Any, where: str = "") -> str | None:
    """Name the first field in which two recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = _first_difference(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
            if found:
                return found
        return None
    return None if old == new else f"{where} was {old}, not {new}"
