"""One run, one row: the keys of ``result.json``, and what two runs must share to be compared.

Every started run has a row. ``status`` is finished, oversize or failed; a failed run's numbers are
null and ``error`` says why.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.runs.run_folder import write_atomically

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


QUANTIZATION_SETTINGS = ("qat", "grid", "plan", "artifact", "limit_bytes")
QAT_OPTIMIZER_SETTINGS = ("optimizer.learned_scale_lr",)  # float weights have no learned scales
BOOKKEEPING_SETTINGS = (
    "run_name",
    "sweep_name",
    "runs_dir",
    "logger",
    "resume",
    "checkpoint",
    "study",
    "ledger",
)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = prefix + key
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def identity(result: Result) -> dict[str, Any]:
    """What two runs must share to be compared; data by content, not by path."""
    left_out = (*QUANTIZATION_SETTINGS, *BOOKKEEPING_SETTINGS, "data")
    shared = {key: value for key, value in result.settings.items() if key not in left_out}
    found = flat(shared | {"data": result.data, "hardware": result.hardware})
    return {key: value for key, value in found.items() if key not in QAT_OPTIMIZER_SETTINGS}


def is_baseline(result: Result) -> bool:
    return not result.settings["qat"]["enabled"]


def _arm(qat: str, grid: str, settings: dict[str, Any]) -> str:
    averaging = settings["averaging"]
    if averaging["kind"] == "none":
        return f"{qat} on {grid}"
    return f"{qat} on {grid}, {averaging['kind']} of {averaging['of']}"


def _design(result: Result) -> str:
    """What runs share that differ in their seed alone."""
    chosen = {key: result.settings[key] for key in QUANTIZATION_SETTINGS}
    shared = identity(result) | {"seed": None}
    text = json.dumps([shared, chosen], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_of(result: Result) -> dict[str, Any]:
    """A run's row of the table, not yet compared."""
    row = {key: value for key, value in asdict(result).items() if key != "settings"}
    row["arm"] = result.arm or _arm(result.qat, result.grid, result.settings)
    row["design"] = _design(result)
    row["exported"] = False
    row["delta_bpb"] = None
    if result.artifact_bytes is not None and result.code_bytes is not None:
        row["total_bytes"] = result.artifact_bytes + result.code_bytes
    notes = [] if result.status == "finished" else [result.status.upper()]
    notes += ["QAT NEVER STARTED"] if result.qat_never_started else []
    notes += [result.error] if result.error else []
    row["note"] = "; ".join(notes)
    return row


def row_without_result(folder: Path, status: str, note: str) -> dict[str, Any]:
    """The row of a run that has none of its own."""
    return {"arm": "?", "run_name": folder.name, "status": status, "exported": False, "note": note}
