"""What computes: PyTorch, or on processors without a GPU ONNX Runtime, which starts at once."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
from typing import Literal, get_args

from .embedder import Embedder
from .errors import CheckpointError
from .names import DEFAULT_MODEL, OPEN_CLIP

Backend = Literal["auto", "torch", "onnx"]
_GPU_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")  # Linux, WSL, AMD


def open_embedder(
    name: str | os.PathLike[str] = DEFAULT_MODEL, device: str = "auto", backend: Backend = "auto"
) -> Embedder:
    """Load what `load_embedder` loads, for indexing and searching.

    Args:
        name: as for `load_embedder`.
        device: as for `load_embedder`.
        backend: "torch"; "onnx" runs on the CPU and needs no PyTorch where the model has been
            exported, as `mini` is, and exports it to the user's cache where not; "auto" takes an
            exported model where there is one and no GPU to use.

    Raises:
        CheckpointError: as `load_embedder`, or the model or device is nothing for ONNX Runtime.
    """
    name = str(name)
    if backend not in get_args(Backend):
        raise CheckpointError(f"unknown backend {backend!r}: {', '.join(get_args(Backend))}")
    if backend == "onnx":
        return _open_onnx(name, device)
    if backend == "auto" and not _wants_gpu(device):
        from .onnx_model import OnnxModel, find_export

        if importlib.util.find_spec("onnxruntime") and (folder := find_export(name)):
            return OnnxModel(folder)
    from .loading import load_embedder

    return load_embedder(name, device)


def _open_onnx(name: str, device: str) -> Embedder:
    if name.startswith(OPEN_CLIP):
        raise CheckpointError(f"{name} runs on PyTorch only: --backend torch")
    if device not in ("auto", "cpu"):
        raise CheckpointError(
            f"the onnx backend runs on the CPU, not on {device!r}: --backend torch"
        )
    from .onnx_model import OnnxModel, find_export

    folder = find_export(name)
    if folder is None:
        from .loading import load_model
        from .onnx_export import export

        folder = export(load_model(name, device="cpu"))
    return OnnxModel(folder)


def _wants_gpu(device: str) -> bool:
    """Tell whether a model belongs on a GPU; asks PyTorch, which is slow to load, only if need be."""
    if device != "auto":
        return device != "cpu"
    if not any(map(os.path.exists, _GPU_FILES)) and ctypes.util.find_library("nvcuda") is None:
        return False
    from .loading import pick_device

    return pick_device(device).type != "cpu"
