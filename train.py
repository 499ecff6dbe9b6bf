"""Train a small GPT under a clock, store it under a byte limit, read it back, score it.

    python train.py qat=int8 qat.start_step=6000
    torchrun --standalone --nproc_per_node=8 train.py qat=int6
    python train.py -m qat=none,int6 grid=int6 seed=1,2,3

Heavy imports wait until the settings are known to be good.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from qat.errors import PreemptedError, TrainingError, UserError, of_system
from qat.settings import checks, machine
from qat.settings.command_line import INTERRUPTED, Job, Program, Start, Sweep, main
from qat.settings.schema import TrainSettings

log = logging.getLogger("qat")
# Imported by name: what only a study needs is no part of train_gpt.py, which is one run.
STUDY, SWEEP_RUN = "qat.study.study", "qat.study.sweep_run"
REPORT_TASK = "qat.report.report_task"


def resolve(settings: TrainSettings, choices) -> TrainSettings:
    """Everything that can be refused before data is touched."""
    if settings.resume is not None:
        from qat.runs.resume import saved_settings

        settings, choices = saved_settings(settings)
    settings = checks.resolve_train(settings, choices)
    from qat.golf.bundle import count_code_bytes
    from qat.training.build import check_artifact, check_gradient, plan_of, spec_of

    check_artifact(settings, count_code_bytes())
    plan = plan_of(spec_of(settings.model), settings.grid, settings.plan)
    check_gradient(plan, settings.qat)
    return settings


def run(s: TrainSettings, job: Job) -> int:
    """One run to its row, or one of a sweep with all that belongs to it; the exit code."""
    if job.sweep_dir is not None:
        return import_module(SWEEP_RUN).run_in_sweep(s, job, run_one)
    if s.resume is not None:
        from qat.runs.resume import is_finished, saved_job

        job = saved_job(s.resume, job)
        if is_finished(s.resume):
            return 0
    elif s.study.clock == "priced" and job.choices.get("arm"):
        s = import_module(STUDY).priced_alone(s, job.choices["arm"])
    return run_one(s, job)


def run_one(s: TrainSettings, job: Job) -> int:
    """One run to its row, whatever happens; the exit code."""
    from qat.runs.training_run import TrainingRun

    training_run = TrainingRun(s, job)
    try:
        return train(s, training_run)
    except (UserError, TrainingError) as error:
        if not training_run.speaks:
            raise  # it is said if rank 0 does not say the same
        log.error("error: %s", error)
        return training_run.fail(str(error), error.exit_code)
    except PreemptedError as stopped:
        if job.sweep_dir is not None or training_run.folder is None:
            log.warning("%s", stopped)
            raise  # ends a sweep too
        name = Path(sys.argv[0]).name
        log.warning("%s; go on with: python %s resume=%s", stopped, name, training_run.folder)
        return stopped.exit_code
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        training_run.fail("interrupted", INTERRUPTED)
        raise KeyboardInterrupt from None  # ends a sweep too
    except OSError as error:  # the disk is full, or a folder is not ours
        if not training_run.speaks:
            raise
        log.error("error: %s", of_system(error))
        return training_run.fail(of_system(error), UserError.exit_code)
    except Exception as error:
        from torch._inductor.exc import InductorError

        if isinstance(error, InductorError):  # a compiler that is there and does not work
            reason = str(error).splitlines()[0]
            line = f"compile = true: nothing compiles here ({reason}); give compile=false"
            log.error("error: %s", line)
            return training_run.fail(line, UserError.exit_code)
        if not training_run.speaks:
            raise
        log.exception("the run failed")
        return training_run.fail(f"{type(error).__name__}: {error}", 1)
    finally:
        training_run.close()


def train(s: TrainSettings, training_run) -> int:
    import torch

    from qat.artifact.coder import check_coder
    from qat.artifact.container import ARTIFACT, pack
    from qat.budget.budget import Budget
    from qat.budget.fill import PLOT, TrainedModel
    from qat.evaluation.open_model import artifact_meta
    from qat.evaluation.ranks import join_ranks
    from qat.evaluation.score import Score, Scorer
    from qat.golf.bundle import count_code_bytes
    from qat.runs.fork import APART, CODE_BYTES
    from qat.runs.identity import INITIAL, KEY, TEACHER, CheckpointIdentity, check_resumed
    from qat.runs.storing import CalibrationText, Storage
    from qat.runs.teacher import open_teacher
    from qat.text.batches import BatchShape, drawn_token
    from qat.text.shards import TokenStream
    from qat.text.source import check_apart, check_length, from_settings
    from qat.text.tokenizer import Tokenizer
    from qat.training.averaging import Averaging
    from qat.training.build import build_model
    from qat.training.checkpoint import (
        Checkpoints,
        KeptCheckpoints,
        load_checkpoint,
        save_checkpoint,
        tensors_to_store,
    )
    from qat.training.fit import (
        Forecast,
        StopAtSignal,
        build_loop,
        build_trainer,
        fit,
        price_control,
    )
    from qat.training.liveness import LivenessProof
    from qat.training.progress_bar import ProgressBar
    from qat.training.to_bytes import TrainToBytes

    machine.check_cuda(torch.cuda.is_available())
    # Text, and what is scored on it.
    source = from_settings(s.data, s.model.vocab_size)
    tokenizer = Tokenizer(source.tokenizer)
    tokenizer.check_vocab_size(s.model.vocab_size)
    train_stream = TokenStream(source.train_files, "data.train_files")
    val_stream = TokenStream(source.val_files, "data.val_files")
    check_length(source, train_stream, s.batch_tokens)
    state = load_checkpoint(training_run.checkpoint) if s.resume is not None else None
    budget = Budget(s.limit_bytes, count_code_bytes())
    forked = training_run.forked_state(budget.code_bytes) if state is None else None
    # A checkpoint has all weights: what they came from may be gone.
    begins = replace(s.model, init_from=None) if state is not None else s.model
    module, teacher = build_model(begins, s.seed, tokenizer), open_teacher(s, tokenizer.sha256)
    given = {INITIAL: module.state_dict()} if begins.init_from is not None else {}
    if teacher is not None:
        given[TEACHER] = teacher.weights
    held: dict[str, Any] = {}
    data: dict[str, str] = {}
    choices = dict(training_run.job.choices)
    if machine.rank() == 0:  # reads every token
        for stream in (train_stream, val_stream):
            stream.check_ids(s.model.vocab_size)
        tokenizer.check_unknown(val_stream)
        check_apart(source, train_stream, val_stream)
        streams = {"train": train_stream, "val": val_stream}
        settings = training_run.row.settings
        identity = CheckpointIdentity.of(settings, source, tokenizer, streams, given)
        if state is not None:
            typed = f"resume={s.resume}"
            before = CheckpointIdentity.held_by(state)
            check_resumed(typed, before, identity)
            assert before is not None
            identity = replace(identity, data={**before.data, **identity.data})
            if state["choices"] != choices:
                raise UserError(f"{typed}: its choices.json was changed; bring that back")
            counted = state.get(CODE_BYTES)
            if s.qat.to_bytes and counted != budget.code_bytes:
                log.warning(
                    f"{typed}: the code had {counted} bytes and has {budget.code_bytes} now, so "
                    f"another part of limit_bytes is left: its bits are not those of one code"
                )
        elif forked is not None:
            check_resumed(s.fork.typed, CheckpointIdentity.held_by(forked), identity, APART)
        data = identity.data
        held = {KEY: vars(identity), "choices": choices, CODE_BYTES: budget.code_bytes}
    state = forked if state is None else state
    plan, spec = training_run.plan, training_run.spec
    device = join_ranks()
    scorer = Scorer(
        spec, val_stream, tokenizer.byte_table, s.seq_len, s.eval, device, training_run.console,
        bos_id=tokenizer.bos_id,
    )  # fmt: skip
    check_coder(s.artifact.coder)
    scored_tokens = scorer.windows.num_targets
    training_run.start(source, tokenizer, train_stream, val_stream, scored_tokens, data)

    # How the weights will be stored.
    meta = artifact_meta(spec, s.seq_len, tokenizer.sha256, source.identity)
    text = CalibrationText(train_stream, s.micro_batch_tokens, s.seq_len, s.precision)
    storage = Storage(s.artifact, budget, meta, text)

    def file_bytes(masters, scales) -> int:
        return len(pack(plan.encode(masters, scales), plan, meta, s.artifact.coder))

    # Training, until the clock says stop.
    if s.resume is not None and state is None:
        log.warning("no checkpoint to go on from: the run begins again with its first step")
    first_step = state["progress"]["step"] if state is not None else 0
    trainer = build_trainer(
        training_run.loggers(first_step),
        [
            Forecast(
                plan, None if s.artifact.fill or s.qat.to_bytes else budget, 2 * scored_tokens
            ),
            ProgressBar(training_run.console, tokenizer.tokens_per_byte(val_stream)),
            StopAtSignal(),
        ],
    )

    def write(state) -> None:
        if trainer.is_global_zero:
            save_checkpoint(training_run.checkpoint, state | held)

    def keep(step, state) -> None:
        if trainer.is_global_zero:
            save_checkpoint(training_run.kept_checkpoint(step), state | held)

    on_curve = replace(scorer, max_targets=s.eval.curve_tokens) if s.eval.curve_points else scorer

    def bpb_on_curve(weights) -> float:
        return on_curve.score(weights, "a point of the curve").val_bpb

    averaging, proof = Averaging(**vars(s.averaging)), LivenessProof()
    control = price_control(s, plan, budget, file_bytes, trainer)
    hooks = [
        averaging,
        proof,
        *([TrainToBytes(control)] if control is not None else []),
        training_run.validation_curve(first_step, bpb_on_curve),
        KeptCheckpoints(keep, s.fork.keep_steps),
        Checkpoints(write, s.checkpoint.every_steps, s.checkpoint.every_seconds),
    ]
    loop = build_loop(s, module, plan, hooks, teacher)
    batches = BatchShape(
        s.batch_tokens, s.seq_len, machine.world_size(), loop.pace.micro_batches,
        drawn_token(train_stream, s.data_seed),
    )  # fmt: skip
    outcome = fit(loop, train_stream, batches, trainer, state)

    # The file: written by rank 0, read back by all, scored.
    def placed(tensors) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().to(device) for name, tensor in tensors.items()}

    last, last_scales = placed(loop.masters), placed(loop.switch.learned_scales)
    trained = {"weights": last, "learned_scales": last_scales, "averaging": averaging.state()}
    weights, scales = map(placed, tensors_to_store(trained))
    was_on = outcome.qat_last_step == outcome.steps
    is_on_grid = was_on and loop.switch.gradient.is_on_grid
    model = TrainedModel(spec, weights, plan, scales, is_on_grid)
    path, plot = training_run.path(ARTIFACT), training_run.path(PLOT)
    is_writer = machine.rank() == 0
    done = storage.store(model, path, plot, training_run.console) if is_writer else None
    done = trainer.strategy.broadcast(done)
    assert done is not None
    exported, snapped = done
    snapped, read_back = placed(snapped), placed(exported.artifact.weights)
    to_score = {"float": weights, "snapped": snapped, "artifact": read_back}
    if averaging.weights.count:
        to_score |= {"last_float": last, "last_snapped": plan.snap(last, last_scales)}

    def same(one: str, other: str) -> bool:
        weights, others = to_score[one], to_score[other]
        is_same = all(torch.equal(w, others[name]) for name, w in weights.items())
        return trainer.strategy.broadcast(is_same)

    scores: dict[str, Score] = {}
    for name, tensors in to_score.items():  # the same weights have the same score
        equal = next((known for known in scores if same(name, known)), None)
        scores[name] = scores[equal] if equal else scorer.score(tensors, f"{name} weights")
    is_snapped = same("artifact", "snapped")
    return training_run.finish(outcome, proof, len(train_stream), exported, scores, is_snapped)


def before_sweep(sweep: Sweep) -> list[Start]:
    return import_module(STUDY).begin(sweep)


def after_sweep(sweep: Sweep) -> int:
    """Print the paired table, or the verdicts of a study; the highest exit code of the runs."""
    task = import_module(REPORT_TASK)
    if sweep.study is not None:
        rows = task.report_sweep(sweep)
    else:
        rows = task.report(task.run_folders(sweep.folder), sweep.folder)
    rows = [row for row in rows if not row["exported"]]
    return max([row.get("exit_code", 1) for row in rows] + [int(len(sweep.jobs) > len(rows))])


PROGRAM = Program("train", resolve, run, before_sweep, after_sweep)

if __name__ == "__main__":
    sys.exit(main(PROGRAM))
