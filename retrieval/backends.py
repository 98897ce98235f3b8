"""What computes: PyTorch, or on processors without a GPU ONNX Runtime, which starts at once."""

from __future__ import annotations

import ctypes.util
import os
from typing import Literal, get_args

from .embedder import Embedder
from .errors import BackendError
from .names import DEFAULT_MODEL, OPEN_CLIP

Backend = Literal["auto", "torch", "onnx"]
_GPU_FILES = (  # Linux: NVIDIA, Jetson, WSL, AMD
    "/dev/nvidiactl", "/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvmap", "/dev/dxg", "/dev/kfd",
)  # fmt: skip


def open_embedder(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    device: str = "auto",
    backend: Backend = "auto",
    dtype: str = "auto",
) -> Embedder:
    """Load what `load_embedder` loads, for indexing and searching.

    Args:
        name: as for `load_embedder`.
        device: as for `load_embedder`.
        backend: "torch"; "onnx" runs on the CPU and needs no PyTorch where the model has been
            exported, as `mini` is, and exports it to the user's cache where not; "auto" takes an
            exported model where there is one and no GPU to use.
        dtype: as for `load_embedder`; ONNX Runtime computes in float32.

    Raises:
        CheckpointError: as `load_embedder`.
        BackendError: the model or device is nothing for ONNX Runtime, or something is not installed.
    """
    name = str(name)
    if backend not in get_args(Backend):
        raise BackendError(f"unknown backend {backend!r}: {', '.join(get_args(Backend))}")
    if backend == "onnx":
        return _open_onnx(name, device)
    if backend == "auto" and not _wants_gpu(device):
        from .onnx_exports import find_export
        from .onnx_model import OnnxModel

        if folder := find_export(name):
            return OnnxModel(folder)
    from .loading import load_embedder

    return load_embedder(name, device, dtype)


def _open_onnx(name: str, device: str) -> Embedder:
    if name.startswith(OPEN_CLIP):
        raise BackendError(f"{name} runs on PyTorch only: --backend torch")
    if device not in ("auto", "cpu"):
        raise BackendError(f"the onnx backend runs on the CPU, not on {device!r}: --backend torch")
    from .onnx_exports import find_export
    from .onnx_model import OnnxModel

    folder = find_export(name)
    if folder is None:
        from .onnx_export import export

        folder = export(name)
    return OnnxModel(folder)


def _wants_gpu(device: str) -> bool:
    """Tell whether a model belongs on a GPU; asks PyTorch, which is slow to load, only if need be."""
    if device != "auto":
        return device != "cpu"
    windows = os.name == "nt" and ctypes.util.find_library("nvcuda")  # elsewhere it runs a compiler
    if not windows and not any(map(os.path.exists, _GPU_FILES)):
        return False
    from .loading import pick_device

    return pick_device(device).type != "cpu"
