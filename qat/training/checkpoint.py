"""A run's state on disk: what another process needs to go on with the same bits.

Tensors and plain values only, read with ``weights_only``; written under another name, synced and
renamed, so that a crash at any moment leaves the last complete one.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from qat.artifact.container import write_whole
from qat.errors import TrainingError

log = logging.getLogger("qat")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """TrainingError if the disk does not take it or weights are not finite; the last one stays."""
    for name, weight in state["weights"].items():
        if not bool(weight.isfinite().all()):
            step = state["progress"]["step"]
            raise TrainingError(f"{name} is not finite after step {step}; try lower learning rates")
    raw = io.BytesIO()
    torch.save(state, raw)
    try:
        write_whole(path, raw.getbuffer())
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror}; the run stops here") from None


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state; None where there is none, and, with a warning, where it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, RuntimeError, ValueError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:160]
        log.warning("%s is damaged (%s)", path, reason)
        return None
