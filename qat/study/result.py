"""One run, one row: the keys of ``result.json``, with units and meaning.

Every started run has a row. ``status`` is finished, oversize or failed; a failed run's numbers are
null and ``error`` says why.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.study.run_folder import write_atomically

FILE = "result.json"


@dataclass
class Result:
    run_name: str
    status: str  # finished | oversize | failed
    exit_code: int  # 0, 3 (oversize), 2 (a mistake in settings or data), 130 (interrupted), 1
    error: str | None
    arm: str | None  # of the study, None outside of one
    seed: int
    profile: str
    qat: str  # the option typed: none, int6, ...
    grid: str  # the grid of the artifact, as its label
    hardware: str
    commit: str
    data: dict[str, str] | None  # fingerprints of train and val tokens, hash of the tokenizer
    limit_bytes: int  # for artifact and code together, decimal
    steps: int | None = None  # optimizer updates
    tokens: int | None = None  # trained on, repeats counted
    epochs: float | None = None  # tokens / tokens of the training split
    train_seconds: float | None = None  # on the training clock
    overshoot_seconds: float | None = None  # beyond budget_seconds: the rest of the last step
    ms_per_step: float | None = None
    peak_memory_bytes: int | None = None  # of rank 0: allocated on its GPU, or resident on a CPU
    train_loss: float | None = None  # nats per token, last step
    val_loss_float: float | None = None  # nats per token, masters
    val_loss_artifact: float | None = None
    val_bpb_float: float | None = None  # bits per UTF-8 byte, masters
    val_bpb_snapped: float | None = None  # the plan applied to the masters in memory
    val_bpb_artifact: float | None = None  # weights read back from the file
    val_bpb_last_float: float | None = None  # with averaging: the last masters instead
    val_bpb_last_snapped: float | None = None  # ... and what a file of them would score
    quant_gap_bpb: float | None = None  # artifact - float
    artifact_bytes: int | None = None
    code_bytes: int | None = None
    qat_first_step: int | None = None  # number (from 1) of the first update on snapped weights
    qat_last_step: int | None = None
    qat_steps: int | None = None
    qat_never_started: bool = False  # QAT was asked for and the run ended before it
    on_grid_share: float | None = None  # of grid-planned elements, as the last QAT update saw them
    nonzero_gradient_share: float | None = None  # of grid-planned masters, for one micro-batch
    movable_share: float | None = None  # of groups (rows): their largest weight has a gradient
    val_xz_bits_per_byte: float | None = None  # what xz needs for the validation text
    settings: dict[str, Any] = field(default_factory=dict)  # resolved

    def write(self, folder: Path) -> None:
        write_atomically(folder / FILE, json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Result | None:
        """The row of a run's folder; None if it wrote none (it died or still runs).

        UserError if the file is damaged or was written by another version.
        """
        try:
            return Result(**json.loads((folder / FILE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder / FILE}: not a result of this version ({error})") from None
