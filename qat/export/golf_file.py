"""``out=FILE.ptz``: an int8_golf artifact as the challenge's own file.

The codes and scales of the artifact are stored as they are; the file is read back and compared bit
for bit before it gets its name.
"""

from __future__ import annotations

from pathlib import Path

import torch

from qat.artifact.container import Artifact, write_whole
from qat.evaluation.open_model import OpenedModel
from qat.golf.ptz_file import GOLF_GRID, pack_golf, unpack_golf
from qat.model.spec import BASELINE


def as_golf_file(artifact: Artifact) -> bytes:
    """The .ptz file that gives back these weights, bit for bit. ValueError if there is none."""
    if any(entry.grid != GOLF_GRID for entry in artifact.plan.on_grid):
        raise ValueError(f"it is on the grid {artifact.plan.label}; only int8_golf is such a file")
    data = pack_golf(artifact.encoded)
    for name, w in unpack_golf(data).weights.items():
        if not torch.equal(w.view(torch.int32), artifact.weights[name].view(torch.int32)):
            raise ValueError(f"tensor {name} does not survive the conversion")
    return data


def write_golf(out: Path, opened: OpenedModel) -> list[str]:
    if opened.spec.name != BASELINE:
        raise ValueError(
            f"its model is a {opened.spec.name}; the challenge's file is read as its own baseline, "
            f"model.name={BASELINE}"
        )
    data = as_golf_file(opened.artifact)
    write_whole(out, data)
    return [f"artifact_bytes {len(data)}"]
