"""``eval.py task=convert out=FILE.ptz``: an int8_golf artifact as the challenge's own file.

The codes and steps of the artifact are stored as they are; the file is read back and compared bit
for bit before it gets its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qat.artifact.container import Artifact, write_whole
from qat.errors import UserError
from qat.evaluation.open_model import artifact_path, open_artifact
from qat.golf.ptz_file import GOLF_GRID, pack_golf, unpack_golf
from qat.model.spec import BASELINE

if TYPE_CHECKING:
    from qat.budget.budget import Budget
    from qat.settings.schema import EvalTaskSettings


def as_golf_file(artifact: Artifact) -> bytes:
    """The .ptz file that gives back these weights, bit for bit. ValueError if there is none."""
    if any(entry.grid != GOLF_GRID for entry in artifact.plan.on_grid):
        raise ValueError(f"it is on the grid {artifact.plan.label}; only int8_golf is such a file")
    data = pack_golf(artifact.encoded)
    for name, w in unpack_golf(data).weights.items():
        if not torch.equal(w.view(torch.int32), artifact.weights[name].view(torch.int32)):
            raise ValueError(f"tensor {name} does not survive the conversion")
    return data


def run(s: EvalTaskSettings, budget: Budget) -> int:
    assert s.out is not None  # asked for by the checks of the settings
    path, out = artifact_path(s), Path(s.out)
    if out.exists():
        raise UserError(f"out={out}: it is there already; give another name")
    opened = open_artifact(path)
    if opened.spec.name != BASELINE:
        raise UserError(
            f"artifact={path}: its model is a {opened.spec.name}; the challenge's file is read as "
            f"its own baseline, model.name={BASELINE}"
        )
    try:
        data = as_golf_file(opened.artifact)
    except ValueError as error:
        raise UserError(f"artifact={path}: cannot become a .ptz file: {error}") from None
    try:
        write_whole(out, data)
    except OSError as error:
        raise UserError(f"out={out}: {error.strerror or error}") from None
    print(f"artifact       {out}")
    print(f"artifact_bytes {len(data)}")
    return 0
