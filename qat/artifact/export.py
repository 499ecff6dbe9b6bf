"""Codes -> file -> weights: written, then read back from the disk before anyone scores it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.artifact.bundle import count_code_bytes
from qat.artifact.container import Artifact, pack, read_artifact, write_artifact
from qat.quantize.plan import Encoded, Plan

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
    encoded: list[Encoded], meta: Mapping[str, Any], coder: str, path: Path, limit_bytes: int
) -> Export:
    """Write atomically, read back."""
    data = pack(encoded, Plan([item.entry for item in encoded]), meta, coder)
    code_bytes = count_code_bytes()
    if len(data) + code_bytes > limit_bytes:
        path = path.with_name(path.name + OVERSIZE_SUFFIX)
    write_artifact(path, data)
    artifact = read_artifact(path)
    return Export(path, artifact, path.stat().st_size, code_bytes, limit_bytes)
