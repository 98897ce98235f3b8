"""Our own checkpoint format: a folder with `config.json`, `model.safetensors`, `tokenizer.json`.

What of it can be read without PyTorch; `checkpoints.py` reads and writes the rest.
"""

from __future__ import annotations

import json
from pathlib import Path

from .config import ModelConfig
from .errors import CheckpointError
from .preprocess import TextTransform

EMBEDDED = Path(__file__).parent / "models"
WEIGHTS = "model.safetensors"
FILES = ("config.json", WEIGHTS, "tokenizer.json")


def is_own_format(path: Path) -> bool:
    """Tell our `config.json` from transformers' (which names an architecture)."""
    config = read_json(path / "config.json")
    return "qformer" in config and "architectures" not in config


def read_config(path: Path) -> ModelConfig:
    """Read `config.json` of a checkpoint folder.

    Raises:
        CheckpointError: it is missing or broken, or has an unknown or missing field.
    """
    try:
        return ModelConfig.from_dict(read_json(path / "config.json"))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_tokenizer(path: Path, config: ModelConfig) -> TextTransform:
    """Read `tokenizer.json` of a checkpoint folder.

    Raises:
        CheckpointError: it is missing or broken.
    """
    file = path / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(f"{path} has no tokenizer.json")
    try:
        return TextTransform.from_file(file, config.preprocess)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{file}: {error}") from error


def read_json(file: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, no JSON, or no object.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return data
