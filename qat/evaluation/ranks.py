"""The ranks that torchrun started, made one group before Lightning does, or without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from qat.settings import machine


def join_ranks() -> torch.device:
    """This rank's device; torchrun's ranks, if there are several, are one group from now on.

    UserError if they do not meet. They wait half an hour for each other, also on GPUs: one stores.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", machine.local_rank())
        torch.cuda.set_device(device)
    if machine.world_size() > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        with machine.ranks_meet():
            dist.init_process_group(backend, timeout=default_pg_timeout)
    return device


@contextmanager
def joined_ranks() -> Iterator[torch.device]:
    try:
        yield join_ranks()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank_and_ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_over_ranks(sums: Tensor) -> None:
    """In place; nothing without other ranks."""
    if dist.is_initialized():
        dist.all_reduce(sums)
