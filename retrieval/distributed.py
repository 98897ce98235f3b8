"""Training over several processes, as `torchrun` starts them; one process needs no group at all."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import TrainingError

TIMEOUT = timedelta(days=1)  # the others wait while the first process encodes and validates


@dataclass(frozen=True, kw_only=True)
class World:
    """Which process this is, and of how many."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine: the number of its GPU

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def own(self, total: int) -> slice:
        """Return which of `total`, a multiple of `size`, are this process's."""
        share = total // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


@contextmanager
def joined_world(use_gpu: bool) -> Iterator[World]:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs) and leave them again.

    Without torchrun's environment variables this is a world of one.
    """
    if "WORLD_SIZE" not in os.environ:
        yield World()
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if use_gpu:
        torch.cuda.set_device(local_rank)  # what "cuda" means from here on
    dist.init_process_group("nccl" if use_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank)
        dist.barrier()  # nobody leaves while another still talks to it
    finally:
        # A DDP module that is still there would keep the group's threads until the interpreter ends,
        # which now and then ends in an abort.
        gc.collect()
        dist.destroy_process_group()


def gather(local: Tensor) -> Tensor:
    """Concatenate the tensors of all processes along the first dimension, in the order of ranks.

    The gradient of what every process computes from the result flows back to the process that the
    rows came from. With the mean over processes that DDP takes, it is the gradient of one process
    with the whole batch.

    Args:
        local: (b, ...), of the same shape everywhere.

    Returns:
        (b * size, ...); `local` itself without a process group.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    gathered: Tensor = _Gather.apply(local)
    return gathered


def own_rows(everything: Tensor) -> Tensor:
    """Return this process's rows of what `gather` concatenated: its inverse."""
    if not dist.is_initialized():
        return everything
    return everything.chunk(dist.get_world_size())[dist.get_rank()]


def any_says(flag: bool) -> bool:
    """Tell whether any process says yes, so that all take the same decision."""
    if not dist.is_initialized():
        return flag
    on_gpu = dist.get_backend() == "nccl"
    answer = torch.tensor(int(flag), device="cuda" if on_gpu else "cpu")
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)


def check_agreement(step: int) -> None:
    """Check that all processes resume at one update.

    Raises:
        TrainingError: they found different checkpoints.
    """
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    steps = gather(torch.tensor([step], device="cuda" if on_gpu else "cpu")).tolist()
    if len(set(steps)) > 1:
        raise TrainingError(
            f"the processes found checkpoints of different updates, {steps}: "
            "all of them must see the same --out"
        )


def gather_reasons(reasons: list[str]) -> list[str]:
    """Return the reasons of all processes."""
    if not dist.is_initialized():
        return reasons
    of_all: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_all, reasons)
    return [reason for part in of_all for reason in part]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        ctx.rows = len(local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()  # not ours to change
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]
