"""Weights -> the file of a run: rounded by its plan, by GPTQ, or made to fill the limit.

The file is written, then read back from the disk before anyone scores it. With the solver's scales
GPTQ needs fewer bits for the same error, so all of them are made finer (or, if bits were saved,
until the file fills the limit again).

All of it happens off the clock; GPTQ and the solver read training text, as many runs do inside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from qat.artifact.container import OVERSIZE_SUFFIX, Artifact, pack, read_artifact, write_whole
from qat.budget.budget import Budget
from qat.budget.fill import TrainedModel, fill_budget
from qat.budget.search import Trial, fill
from qat.errors import TrainingError
from qat.ptq.calibration import MAX_TOKENS, calibration_batches, read_inputs, training_sequences
from qat.ptq.methods import encoded_by, gptq
from qat.quantize.plan import Encoded, Plan
from qat.text.shards import TokenStream

if TYPE_CHECKING:
    from qat.settings.schema import ArtifactSettings


@dataclass(frozen=True)
class Export:
    """A written file and what it gives back. Over the limit its name ends in ``.oversize``."""

    path: Path
    artifact: Artifact
    artifact_bytes: int
    budget: Budget

    @property
    def is_oversize(self) -> bool:
        return not self.budget.holds(self.artifact_bytes)


def export(
    encoded: list[Encoded], meta: Mapping[str, Any], coder: str, path: Path, budget: Budget
) -> Export:
    """Write atomically, read back."""
    data = pack(encoded, Plan([item.entry for item in encoded]), meta, coder)
    if not budget.holds(len(data)):
        path = path.with_name(path.name + OVERSIZE_SUFFIX)
    write_whole(path, data)
    artifact = read_artifact(path)
    return Export(path, artifact, path.stat().st_size, budget)


class CalibrationText(NamedTuple):
    """Training text, and how a run reads it."""

    stream: TokenStream
    micro_batch_tokens: int
    seq_len: int
    precision: str


def store(
    model: TrainedModel,
    artifact: ArtifactSettings,
    text: CalibrationText | None,
    budget: Budget,
    meta: Mapping[str, Any],
    path: Path,
    plot: Path,
    console: Console,
) -> tuple[Export, dict[str, Tensor]]:
    """Write the file and read it back; beside it the weights that it should give, from memory.

    ``text`` may be None if neither the solver nor GPTQ is asked for. ``plot`` is where the solver
    draws its curve. TrainingError names a tensor that cannot be stored: its weights diverged, or
    its step overflows.
    """
    try:
        if artifact.fill:
            assert text is not None
            batches = calibration_batches(
                text.stream, artifact.sensitivity_tokens, text.micro_batch_tokens, text.seq_len
            )
            model = fill_budget(
                model, batches, text.precision, artifact, budget, meta, plot, console
            )
        if artifact.method == "gptq":
            assert text is not None
            encoded = _by_gptq(model, text, artifact, budget, meta)
            snapped = {item.entry.name: item.decode() for item in encoded}
        else:
            encoded = model.plan.encode(model.weights, model.scales)
            snapped = model.plan.snap(model.weights, model.scales)
    except ValueError as error:
        raise TrainingError(
            f"cannot store {path.name}: {error}; if training diverged, lower the learning rates"
        ) from None
    return export(encoded, meta, artifact.coder, path, budget), snapped


def _by_gptq(
    model: TrainedModel,
    text: CalibrationText,
    artifact: ArtifactSettings,
    budget: Budget,
    meta: Mapping[str, Any],
) -> list[Encoded]:
    """What matrices read is measured with the weights that training saw: snapped ones after QAT."""
    weights = dict(model.weights)
    seen = model.plan.snap(weights, model.scales) if model.is_on_grid else weights
    sequences = training_sequences(text.stream, min(text.seq_len, MAX_TOKENS))
    method = gptq(read_inputs(model.shape, seen, sequences), bit_price=artifact.gptq_bit_price)
    encoded = encoded_by(model.plan, weights, method, model.scales)
    if not artifact.fill or not model.scales:
        return encoded

    def trial_at(log2_zoom: float) -> Trial[list[Encoded]]:
        found = encoded_by(model.plan, weights, method, _zoomed(model, 2.0**log2_zoom))
        return Trial(log2_zoom, len(pack(found, model.plan, meta, artifact.coder)), found)

    num_weights = sum(model.plan.entries[name].num_elements for name in model.scales)
    return fill(trial_at, trial_at(0.0), num_weights / 8, budget.artifact_bytes).made


def _zoomed(model: TrainedModel, zoom: float) -> dict[str, Tensor]:
    """Given scales, products of rows and columns or one kind alone, ``zoom`` times as large."""
    found = {}
    for name, scales in model.scales.items():
        entry = model.plan.entries[name]
        assert entry.grid is not None
        rows = entry.num_rows if entry.grid.column_scales else len(scales)
        found[name] = torch.cat([zoom * scales[:rows], scales[rows:]])
    return found
