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
from qat.errors import TrainingError, UserError
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
    """Write atomically, read back. UserError if the disk does not take it."""
    data = pack(encoded, Plan([item.entry for item in encoded]), meta, coder)
    if not budget.holds(len(data)):
        path = path.with_name(path.name + OVERSIZE_SUFFIX)
    try:
        write_whole(path, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room and go on") from None
    return Export(path, read_artifact(path), path.stat().st_size, budget)


class CalibrationText(NamedTuple):
    """Training text, and how a run reads it."""

    stream: TokenStream
    micro_batch_tokens: int
    seq_len: int
    precision: str


@dataclass(frozen=True)
class Storage:
    """How weights become a file, decided once and handed down.

    ``meta``: what the header says beside the plan. ``text`` may be None if neither the solver nor
    GPTQ is asked for.
    """

    artifact: ArtifactSettings
    budget: Budget
    meta: Mapping[str, Any]
    text: CalibrationText | None

    def store(
        self, model: TrainedModel, path: Path, plot: Path, console: Console
    ) -> tuple[Export, dict[str, Tensor]]:
        """Write the file and read it back; beside it the weights that it should give, from memory.

        ``plot`` is where the solver draws its curve. TrainingError names a tensor that cannot be
        stored: its weights diverged, or its scale overflows.
        """
        try:
            if self.artifact.fill:
                model = self._filled(model, plot, console)
            if self.artifact.method == "gptq":
                encoded = self._by_gptq(model)
                snapped = {item.entry.name: item.decode() for item in encoded}
            else:
                encoded = model.plan.encode(model.weights, model.scales)
                snapped = model.plan.snap(model.weights, model.scales)
        except ValueError as error:
            raise TrainingError(
                f"cannot store {path.name}: {error}; if training diverged, lower the learning rates"
            ) from None
        return export(encoded, self.meta, self.artifact.coder, path, self.budget), snapped

    def _filled(self, model: TrainedModel, plot: Path, console: Console) -> TrainedModel:
        assert self.text is not None
        batches = calibration_batches(
            self.text.stream, self.artifact.sensitivity_tokens, self.text.micro_batch_tokens,
            self.text.seq_len,
        )  # fmt: skip
        return fill_budget(
            model, batches, self.text.precision, self.artifact.coder, self.budget, self.meta, plot,
            console,
        )  # fmt: skip

    def _by_gptq(self, model: TrainedModel) -> list[Encoded]:
        """What matrices read is measured with the weights that training saw: snapped ones after
        QAT."""
        assert self.text is not None
        weights = dict(model.weights)
        seen = model.plan.snap(weights, model.scales) if model.is_on_grid else weights
        sequences = training_sequences(self.text.stream, min(self.text.seq_len, MAX_TOKENS))
        inputs = read_inputs(model.spec, seen, sequences)
        method = gptq(inputs, bit_price=self.artifact.gptq_bit_price)
        encoded = encoded_by(model.plan, weights, method, model.scales)
        if not self.artifact.fill or not model.scales:
            return encoded

        def trial_at(log2_zoom: float) -> Trial[list[Encoded]]:
            found = encoded_by(model.plan, weights, method, _zoomed(model, 2.0**log2_zoom))
            size = len(pack(found, model.plan, self.meta, self.artifact.coder))
            return Trial(log2_zoom, size, found)

        num_weights = sum(model.plan.entries[name].num_elements for name in model.scales)
        most = self.budget.artifact_bytes
        return fill(trial_at, trial_at(0.0), num_weights / 8, most).made


def _zoomed(model: TrainedModel, zoom: float) -> dict[str, Tensor]:
    """Given scales, products of rows and columns or one kind alone, ``zoom`` times as large."""
    found = {}
    for name, scales in model.scales.items():
        entry = model.plan.entries[name]
        assert entry.grid is not None
        rows = entry.num_rows if entry.grid.column_scales else len(scales)
        found[name] = torch.cat([zoom * scales[:rows], scales[rows:]])
    return found
