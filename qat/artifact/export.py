"""Weights -> file -> weights: written, then read back from the disk before anyone scores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.artifact.bundle import count_code_bytes
from qat.artifact.container import Artifact, pack, read_artifact, write_artifact
from qat.errors import TrainingError
from qat.quantize.plan import NONE_LEARNED, Plan, Steps

ARTIFACT = "artifact.qat"  # the name of a run's file
OVERSIZE_SUFFIX = ".oversize"


@dataclass(frozen=True)
class Export:
    """A written file and what it gives back. Over the limit its name ends in ``.oversize``."""

    path: Path
    artifact: Artifact
    artifact_bytes: int
    code_bytes: int
    limit_bytes: int

    @property
    def is_oversize(self) -> bool:
        return self.artifact_bytes + self.code_bytes > self.limit_bytes


def export(
    weights: Mapping[str, Tensor],
    plan: Plan,
    meta: Mapping[str, Any],
    coder: str,
    path: Path,
    limit_bytes: int,
    learned_steps: Steps = NONE_LEARNED,
) -> Export:
    """Encode, write atomically, read back. TrainingError names a tensor that cannot be
    stored: its weights diverged, or its step overflows."""
    try:
        data = pack(plan.encode(weights, learned_steps), plan, meta, coder)
    except ValueError as error:
        raise TrainingError(
            f"cannot store {path.name}: {error}; if training diverged, lower the learning rates"
        ) from None
    code_bytes = count_code_bytes()
    if len(data) + code_bytes > limit_bytes:
        path = path.with_name(path.name + OVERSIZE_SUFFIX)
    write_artifact(path, data)
    artifact = read_artifact(path)
    return Export(path, artifact, path.stat().st_size, code_bytes, limit_bytes)
