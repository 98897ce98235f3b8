"""Our own checkpoint format: a folder with `config.json`, `model.safetensors`, `tokenizer.json`.

And the strict filling of a model with tensors, which the readers of other formats share.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..indexes.files import replace_file
from .errors import CheckpointError
from .model import RetrievalModel
from .own_format import WEIGHTS, load_tokenizer, read_config


def load_own(path: Path) -> RetrievalModel:
    """Read a folder of our format, in float32 on the CPU.

    Raises:
        CheckpointError: a file is missing or broken, or they do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(path)
    try:
        tensors = load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    model = RetrievalModel(config, load_tokenizer(path, config))
    load_tensors(model, tensors, str(path))
    return model


def save_model(
    model: RetrievalModel, path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Write a model in our format; a reader sees the old files or the new ones, never half of one.

    Args:
        model: the model.
        path: the folder, made if need be.
        dtype: store matrices in this type (float16 halves the file); None keeps them as they are.
            Biases, norms and statistics keep full precision either way.
    """
    from safetensors.torch import save

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach()
        .to("cpu", dtype if dtype and tensor.ndim >= 2 and tensor.is_floating_point() else None)
        .contiguous()
        for name, tensor in model.state_dict().items()
    }
    tokenizer = model.text_transform.tokenizer.to_str()
    config = json.dumps(model.config.to_dict(), indent=2) + "\n"
    replace_file(folder / WEIGHTS, save(tensors))
    replace_file(folder / "tokenizer.json", tokenizer.encode())
    replace_file(folder / "config.json", config.encode())


def load_tensors(
    model: RetrievalModel,
    tensors: Mapping[str, Tensor],
    source: str,
    optional: tuple[str, ...] = (),
    names: Mapping[str, str] | None = None,
) -> None:
    """Fill a model with tensors, strictly.

    Args:
        model: filled in place, and its fingerprint refreshed.
        tensors: by the checkpoint's own names; cast to the model's dtype.
        source: what to call the checkpoint in an error.
        optional: prefixes of names that may be missing.
        names: the checkpoint's names -> those of `model.state_dict()`, where the two differ.

    Raises:
        CheckpointError: a key is missing or unexpected, or a shape differs.
    """
    names = names or {}
    theirs = {ours: name for name, ours in names.items()}
    expected = {theirs.get(ours, ours): tensor for ours, tensor in model.state_dict().items()}
    missing = [k for k in expected if k not in tensors and not k.startswith(optional or ("\0",))]
    unexpected = [key for key in tensors if key not in expected]
    shapes = [
        f"{key} is {tuple(tensors[key].shape)}, not {tuple(expected[key].shape)}"
        for key in tensors
        if key in expected and tensors[key].shape != expected[key].shape
    ]
    for complaint, keys in (("lacks", missing), ("has unexpected", unexpected), ("shapes", shapes)):
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise CheckpointError(f"{source} does not fit: {complaint} {', '.join(keys[:5])}{more}")
    model.load_state_dict({names.get(k, k): tensor for k, tensor in tensors.items()}, strict=False)
    model.refresh_fingerprint()
