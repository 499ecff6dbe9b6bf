"""The ranks that torchrun started, for the programs that score without Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from qat.settings import machine


@contextmanager
def joined_ranks() -> Iterator[torch.device]:
    """This rank's device; torchrun's ranks, if there are several, are one group inside."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", machine.local_rank())
        torch.cuda.set_device(device)
    if machine.world_size() == 1:
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank_and_ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_over_ranks(sums: Tensor) -> None:
    """In place; nothing without other ranks."""
    if dist.is_initialized():
        dist.all_reduce(sums)
