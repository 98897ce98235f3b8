"""Errors of the model half of the project.

The root of the tree is `indexes.errors.Blip2SearchError`:

    Blip2SearchError
    ├── ImageReadError       a file that is no readable image
    ├── CheckpointError      a checkpoint that is missing, incomplete or of another shape
    ├── BackendError         a backend that is not installed, or nothing for this model or device
    ├── DeviceMemoryError    a batch that does not fit into the GPU's memory
    ├── TokenOverflowError   image tokens that float16 cannot hold
    ├── ScoreError           scores that are no numbers
    ├── DatasetError         a caption file that cannot be used
    │   └── EmptySplitError  ... because it has nothing in the splits that were asked for
    ├── RecipeError          a recipe that says nothing, too much, or what cannot be trained
    └── TrainingError        a run that cannot start, go on, or be resumed
"""

from __future__ import annotations

import traceback

from ..indexes.errors import Blip2SearchError


class ImageReadError(Blip2SearchError):
    """The image cannot be decoded; the message names the file, where there is one, and says why."""

    def __init__(self, reason: str, path: str | None = None) -> None:
        """Keep the reason apart for whoever names the file in another way."""
        super().__init__(reason if path is None else f"{path}: {reason}")
        self.reason = reason


class CheckpointError(Blip2SearchError):
    """The checkpoint cannot be loaded; the message names the key, shape or file at fault."""


class BackendError(Blip2SearchError):
    """The backend is not installed, or cannot run this model or use this device."""


class DeviceMemoryError(Blip2SearchError):
    """A batch does not fit into the GPU's memory."""

    @classmethod
    def of(cls, images: int, error: Exception) -> DeviceMemoryError:
        """Say that so many images do not fit, and let go of what the failed attempt holds."""
        traceback.clear_frames(error.__traceback__)
        return cls(f"{images} images do not fit into the GPU's memory at once")


class TokenOverflowError(Blip2SearchError):
    """The encoder's tokens cannot be kept in float16."""


class ScoreError(Blip2SearchError):
    """A model's scores are no numbers, and cannot be ranked."""


class DatasetError(Blip2SearchError):
    """The caption file or a photograph that it names cannot be used."""


class EmptySplitError(DatasetError):
    """The caption file has no image in these splits."""


class RecipeError(Blip2SearchError):
    """The recipe cannot be used; the message names the field."""


class TrainingError(Blip2SearchError):
    """The training run cannot start, go on, or be resumed; the message says what to do."""


def first_line(error: Exception) -> str:
    """Return the first line of a foreign error's message, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
