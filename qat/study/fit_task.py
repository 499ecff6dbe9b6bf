"""``eval.py task=fit run=RUN limit_bytes=N``: a finished run stored again, filling another limit.

The run's own file stays as it is; the new one is read back and scored.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from qat.artifact.export import OVERSIZE_SUFFIX, export
from qat.errors import UserError
from qat.evaluation import score_task
from qat.evaluation.open_model import artifact_meta
from qat.language.shards import TokenStream
from qat.language.source import from_settings
from qat.language.tokenizer import Tokenizer
from qat.settings.schema import from_yaml
from qat.study import run_folder
from qat.study.budget_fit import TrainedModel, fit_artifact
from qat.study.export_baseline import stored_tensors
from qat.study.result import Result
from qat.training.build import plan_of, shape_of
from qat.training.sensitivity import calibration_batches

if TYPE_CHECKING:
    from qat.settings.schema import EvalTaskSettings

OVERSIZE_EXIT_CODE = 3


def run(s: EvalTaskSettings) -> int:
    assert s.run is not None  # asked for by the checks of the settings
    folder = Path(s.run)
    yaml, _ = run_folder.read_config(folder, "run")
    trained = from_yaml(yaml, f"run={folder}")
    result = Result.read(folder)
    if result is None or result.steps is None:
        raise UserError(f"run={folder}: the run did not finish")
    out = Path(s.out or folder / run_folder.EXPORTS / f"fit_{s.limit_bytes}.qat")
    for path in (out, Path(f"{out}{OVERSIZE_SUFFIX}")):
        if path.exists():
            raise UserError(f"out={path}: it is there already; give another name")
    shape = shape_of(trained.model)
    plan = plan_of(shape, trained.grid, trained.plan)
    weights, steps = stored_tensors(folder / run_folder.CHECKPOINT)
    source = from_settings(trained.data, shape.vocab_size)
    tokenizer = Tokenizer(source.tokenizer)
    stream = TokenStream(source.train_files, "data.train_files")
    meta = artifact_meta(shape, trained.seq_len, tokenizer.sha256, source.identity)
    batches = calibration_batches(
        stream, trained.artifact.fit_tokens, trained.micro_batch_tokens, trained.seq_len
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TrainedModel(
        shape,
        {name: w.to(device) for name, w in weights.items()},
        plan,
        {name: step.to(device) for name, step in steps.items()},
        result.qat_last_step == result.steps,
    )
    log = logging.getLogger("qat")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    out.parent.mkdir(parents=True, exist_ok=True)
    model = fit_artifact(
        model, batches, trained.precision, trained.artifact, s.limit_bytes, meta,
        out.with_suffix(".png"), Console(stderr=True),
    )  # fmt: skip
    coder = trained.artifact.coder
    done = export(model.weights, model.plan, meta, coder, out, s.limit_bytes, model.steps)
    code = score_task.run(replace(s, run=None, artifact=str(done.path)))
    return OVERSIZE_EXIT_CODE if done.is_oversize else code
