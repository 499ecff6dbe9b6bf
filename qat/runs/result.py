"""One run, one row: the keys of ``result.json``, and what two runs must share to be compared.

Every started run has a row. ``status`` is finished, oversize or failed; a failed run's numbers are
null and ``error`` says why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
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
    hardware: str  # of a run that went on elsewhere: a, then b
    commit: str  # in the same way
    data: dict[str, str] | None  # hashes: see CheckpointIdentity
    limit_bytes: int  # for artifact and code together, decimal
    steps: int | None = None  # optimizer updates
    forked_from: str | None = None  # the run that its first updates were made in ...
    forked_steps: int | None = None  # ... and how many they are
    tokens: int | None = None  # trained on, repeats counted
    epochs: float | None = None  # tokens / tokens of the training split
    tokens_per_parameter_byte: float | None = None  # tokens / bytes of the plan's codes and scales
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
    artifact_is_snapped: bool | None = None  # bit for bit; then both have one score, made once
    val_tokens: int | None = None  # that were scored (eval.max_tokens) ...
    val_tokens_there: int | None = None  # ... of so many
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
    storing_code: str | None = None  # provenance.storing_code of what wrote the artifact
    settings: dict[str, Any] = field(default_factory=dict)  # resolved

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """All that a run was made under, by dotted name; data by content, not by path."""
        return conditions(self.settings | {"data": self.data, "hardware": self.hardware})

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
            raise UserError(
                f"{folder / FILE}: damaged, or of another version ({error}); without the file, "
                f"resume={folder} writes it anew"
            ) from None


# What tells a QAT run from its baseline. Float weights have no learned scales.
QUANTIZATION = (
    "qat", "grid", "plan", "artifact", "limit_bytes", "optimizer.learned_scale_lr",
    "schedule.update_price", "schedule.qat_update_price",
)  # fmt: skip
# Where a run goes and what is made of it: of no effect on it.
SEEDS = ("seed", "data_seed")  # of the runs of one arm
BOOKKEEPING = (
    "run_name", "sweep_name", "runs_dir", "logger", "resume", "checkpoint", "fork", "study",
    "ledger",
)  # fmt: skip


def conditions(
    settings: dict[str, Any], bookkeeping: Iterable[str] = BOOKKEEPING
) -> dict[str, Any]:
    """Settings by dotted name, without bookkeeping."""
    found = _flat({key: value for key, value in settings.items() if key not in bookkeeping})
    if rules := settings.get("plan", {}).get("rules"):
        found["plan.rules"] = list(rules)  # of which the first that fits counts
    return found


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = prefix + key
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def differing(
    one: dict[str, Any], other: dict[str, Any], apart_from: Iterable[str] = ()
) -> list[str]:
    """Dotted names of the conditions that two runs do not share, [] if the runs are comparable.

    ``apart_from``: names of settings, or of groups of them, that may differ.
    """
    may_differ = tuple(f"{name}." for name in apart_from)
    return sorted(
        name
        for name in one.keys() | other.keys()
        if one.get(name) != other.get(name) and not f"{name}.".startswith(may_differ)
    )


def is_baseline(result: Result) -> bool:
    return not result.settings["qat"]["enabled"]


def arm_label(qat: str, grid: str, settings: dict[str, Any]) -> str:
    """What tells runs outside a study apart in a table."""
    averaging = settings["averaging"]
    if averaging["kind"] == "none":
        return f"{qat} on {grid}"
    return f"{qat} on {grid}, {averaging['kind']} of {averaging['of']}"


def row_of(result: Result) -> dict[str, Any]:
    """A run's row of the table, not yet compared."""
    row = {key: value for key, value in asdict(result).items() if key != "settings"}
    row["arm"] = result.arm or arm_label(result.qat, result.grid, result.settings)
    row["gradient"] = result.settings["qat"]["gradient"]
    row["exported"] = False
    row["delta_bpb"] = None
    if result.artifact_bytes is not None and result.code_bytes is not None:
        row["total_bytes"] = result.artifact_bytes + result.code_bytes
    notes = [] if result.status == "finished" else [result.status.upper()]
    notes += ["QAT NEVER STARTED"] if result.qat_never_started else []
    notes += [result.error] if result.error else []
    if result.forked_from is not None:
        notes.append(f"first {result.forked_steps} updates made by {result.forked_from}")
    scored, there = result.val_tokens, result.val_tokens_there
    if scored is not None and there is not None and scored < there:
        notes.append(f"scored on {scored:,} of {there:,} tokens")
    row["note"] = "; ".join(notes)
    return row


def row_without_result(folder: Path, status: str, note: str) -> dict[str, Any]:
    """The row of a run that has none of its own."""
    return {"arm": "?", "run_name": folder.name, "status": status, "exported": False, "note": note}
