"""`load_model`: a model by name, from whatever format it is in.

Three formats are understood: our own (`checkpoints.py`), transformers' `Blip2ForImageTextRetrieval`
from a folder or the hub (`hub.py`), and a LAVIS stage-1 `.pth` (`lavis.py`). Whatever the format,
loading is strict: a missing or unexpected key, or a tensor of another shape, is an error that names it.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .checkpoints import load_own
from .dual_encoder import DualEncoder
from .errors import CheckpointError, first_line
from .hub import load_hub
from .lavis import load_lavis
from .model import RetrievalModel
from .names import DEFAULT_MODEL, NAMES, OPEN_CLIP, SHORT_NAMES, canonical
from .own_format import EMBEDDED, is_own_format


def load_embedder(
    name_or_path: str | os.PathLike[str] = DEFAULT_MODEL, device: str = "auto", dtype: str = "auto"
) -> RetrievalModel | DualEncoder:
    """Load what `load_model` loads, or by `open_clip:NAME` a dual encoder; see `dual_encoder.py`.

    Raises:
        CheckpointError: as `load_model`.
    """
    if not str(name_or_path).startswith(OPEN_CLIP):
        return load_model(name_or_path, device, dtype)
    target = pick_device(device)
    return DualEncoder(str(name_or_path)).to(target, _dtype(dtype, target)).eval()


def load_model(
    name_or_path: str | os.PathLike[str] = DEFAULT_MODEL, device: str = "auto", dtype: str = "auto"
) -> RetrievalModel:
    """Load a BLIP-2 model for inference.

    Args:
        name_or_path: "mini" (embedded), a hub name or its short name, a checkpoint folder, or a
            LAVIS `.pth` file.
        device: "auto" takes a GPU where there is one; otherwise what torch understands.
        dtype: "float32", "float16", "bfloat16"; "auto" is float16 on CUDA and float32 elsewhere.

    Raises:
        CheckpointError: nothing is there, or what is there does not fit; the message names it.
    """
    target = pick_device(device)
    number_type = _dtype(dtype, target)
    name = str(name_or_path)
    model = _load(name).to(target, number_type).eval()
    model.origin = canonical(name)
    return model


def _load(name: str) -> RetrievalModel:
    if name in SHORT_NAMES:
        return load_hub(SHORT_NAMES[name])
    path = EMBEDDED / name if name == DEFAULT_MODEL else Path(name)
    if path.suffix == ".pth":
        return load_lavis(path)
    if (path / "config.json").exists() and is_own_format(path):
        return load_own(path)
    on_the_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if path.is_dir() or on_the_hub:
        return load_hub(name)
    raise CheckpointError(
        f"no model {name!r}: it is neither a folder, a .pth file, nor one of {', '.join(NAMES)}"
    )


def pick_device(device: str) -> torch.device:
    """Return the device of a name; "auto" is a GPU where there is one.

    Raises:
        CheckpointError: it cannot be used.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise CheckpointError(f"device {device!r} cannot be used: {reason}") from error
    return chosen


def _dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise CheckpointError(f"unknown dtype {dtype!r}: choose from auto, {', '.join(known)}")
    return known[dtype]
