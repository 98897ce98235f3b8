"""What tells one model's vectors from another's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def fingerprint(
    description: str, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> str:
    """Return 16 hex digits of a description and a sample of every tensor, rounded to a dtype.

    It is the same on every device that a model is moved to afterwards.
    """
    digest = hashlib.blake2b(description.encode(), digest_size=8)
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // 256)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(flat[::step].to(dtype).float().cpu().numpy().tobytes())
    return digest.hexdigest()
