"""``eval.py task=convert out=FILE.ptz``: an int8_golf artifact as the challenge's own file.

An artifact is read as decoded weights; the codes are found again from them, exactly. In a row of
this grid either the largest code is 127, so the step is max|w| / 127, or the floor binds and the
step is the floor. ``encode`` is given the first and applies the second. A weight is a product of 7
and 11 bits, so neither its float32 nor the division loses any; the file is read back and compared
bit for bit before it gets its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qat.artifact.container import Artifact, write_artifact
from qat.artifact.golf_file import GOLF_GRID, pack_golf, unpack_golf
from qat.errors import UserError
from qat.evaluation.open_model import artifact_path, open_artifact

if TYPE_CHECKING:
    from qat.settings.schema import EvalTaskSettings

LARGEST_CODE = 127


def as_golf_file(artifact: Artifact) -> bytes:
    """The .ptz file that gives back these weights, bit for bit. ValueError if there is none."""
    if any(entry.grid != GOLF_GRID for entry in artifact.plan.on_grid):
        raise ValueError(f"it is on the grid {artifact.plan.label}; only int8_golf is such a file")
    steps = {
        entry.name: artifact.weights[entry.name].abs().amax(1, keepdim=True) / LARGEST_CODE
        for entry in artifact.plan.on_grid
        if len(entry.shape) == 2  # others are refused, by name, when packed
    }
    data = pack_golf(artifact.plan.encode(artifact.weights, steps))
    for name, w in unpack_golf(data).weights.items():
        if not torch.equal(w.view(torch.int32), artifact.weights[name].view(torch.int32)):
            raise ValueError(f"tensor {name} has a row that int8_golf would not have made")
    return data


def run(s: EvalTaskSettings) -> int:
    assert s.out is not None  # asked for by the checks of the settings
    path, out = artifact_path(s), Path(s.out)
    if out.exists():
        raise UserError(f"out={out}: it is there already; give another name")
    try:
        data = as_golf_file(open_artifact(path).artifact)
    except ValueError as error:
        raise UserError(f"artifact={path}: cannot become a .ptz file: {error}") from None
    try:
        write_artifact(out, data)
    except OSError as error:
        raise UserError(f"out={out}: {error.strerror or error}") from None
    print(f"artifact       {out}")
    print(f"artifact_bytes {len(data)}")
    return 0
