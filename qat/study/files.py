"""The runs of a study, and the files that it makes of them: alike, and of as many bytes.

Files are written once, read back and scored; what is there already is used again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from qat.budget.budget import Budget
from qat.errors import UserError
from qat.golf.bundle import count_code_bytes
from qat.runs.result import Result, identity, is_baseline
from qat.runs.run_folder import read_config
from qat.runs.store_again import export_again, storage_of
from qat.settings.schema import StoreSettings
from qat.study.pairing import Target, beside, fills_limit
from qat.study.study import Study, run_name


class Stored(NamedTuple):
    """A file: its score and size."""

    val_bpb: float
    val_loss: float
    total_bytes: int
    grid: str


@dataclass(frozen=True)
class ArmRun:
    """A started run of an arm; ``result`` is None if it has no readable row."""

    folder: Path
    arm: str
    seed: int
    result: Result | None
    problem: str | None  # why it has no score

    @property
    def is_scored(self) -> bool:
        return self.result is not None and self.result.val_bpb_artifact is not None

    @cached_property
    def identity(self) -> dict[str, Any] | None:
        """What its twin shares; compared with every other run."""
        return None if self.result is None else identity(self.result)


def find_runs(folder: Path, study: Study) -> list[ArmRun]:
    """Every started run of the study's arms, by arm and seed."""
    found = []
    for arm in study.arms:
        prefix = run_name(arm, 0).removesuffix("0")
        for path in folder.glob(f"{prefix}*"):
            seed = path.name.removeprefix(prefix)
            if seed.isdigit() and read_config(path, "study")[1].get("arm") == arm:
                found.append(_read_run(path, arm, int(seed)))
    return sorted(found, key=lambda run: (study.arms.index(run.arm), run.seed))


def _read_run(path: Path, arm: str, seed: int) -> ArmRun:
    try:
        result = Result.read(path)
    except UserError as error:
        return ArmRun(path, arm, seed, None, str(error))
    if result is None:
        return ArmRun(path, arm, seed, None, "no result; it died or is still running")
    return ArmRun(path, arm, seed, result, result.error if result.status == "failed" else None)


class StudyFiles:
    """The runs, and the files that their study makes of them."""

    def __init__(self, runs: Iterable[ArmRun], study: Study, console: Console) -> None:
        self.runs = list(runs)
        self.study, self.console = study, console

    def of(self, arm: str) -> dict[int, ArmRun]:
        """By seed, those that have a score."""
        return {run.seed: run for run in self.runs if run.arm == arm and run.is_scored}

    def stored(self, run: ArmRun, target: Target) -> Stored:
        """The run as ``target`` says: its own file, or one made of its checkpoint.

        UserError or TrainingError if it cannot be made.
        """
        result = run.result
        assert result is not None
        if target.is_file_of(result.settings):
            assert result.val_bpb_artifact is not None
            assert result.val_loss_artifact is not None
            total = (result.artifact_bytes or 0) + (result.code_bytes or 0)
            return Stored(result.val_bpb_artifact, result.val_loss_artifact, total, result.grid)
        budget = Budget(target.limit_bytes or result.limit_bytes, count_code_bytes())
        again = export_again(run.folder, result, target.settings, budget, self.console)
        total = again["artifact_bytes"] + again["code_bytes"]
        return Stored(again["val_bpb_artifact"], again["val_loss_artifact"], total, again["grid"])

    def reference(self, base: ArmRun, run: ArmRun, target: dict[str, Any]) -> Stored:
        """The baseline stored to be compared with ``run``, which is stored as ``target``."""
        assert run.result is not None
        return self.stored(base, beside(self.target(base, None), run.result.settings, target))

    def as_large(
        self, base: ArmRun, run: ArmRun, target: dict[str, Any], total_bytes: int
    ) -> Stored:
        """The baseline that the solver stores in as many bytes, or to the limit of ``run``."""
        assert run.result is not None
        if fills_limit(run.result.settings, target):
            total_bytes = run.result.limit_bytes
        return self.stored(base, Target(_filled(self.target(base, None)), total_bytes))

    def target(self, run: ArmRun, store: StoreSettings | None) -> dict[str, Any]:
        assert run.result is not None
        return storage_of(run.result.settings, self.study.settings, store or StoreSettings())

    def twin(self, run: ArmRun) -> ArmRun | None:
        """The run of the study that differs in its quantization alone; the baseline's first."""
        same = [
            other
            for other in self.runs
            if other.result is not None
            and other.is_scored
            and is_baseline(other.result)
            and other.identity == run.identity
        ]
        same.sort(key=lambda other: other.arm != self.study.settings.baseline)
        return same[0] if same else None


def _filled(target: dict[str, Any]) -> dict[str, Any]:
    rounded = {"fill": True, "method": "round", "gptq_bit_price": 0.0}
    return target | {"artifact": target["artifact"] | rounded}
