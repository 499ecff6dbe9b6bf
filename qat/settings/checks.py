"""Every check of the settings that needs no model, no data and no torch.

A refusal names the setting as the user typed it and says what to do. ``resolve_*`` also replace
``auto`` and defaults that depend on other settings by concrete values, so that what is saved with a
run is what ran.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from qat.errors import UserError
from qat.model.spec import architectures
from qat.settings import machine
from qat.settings.schema import (
    DataSettings,
    EvalSettings,
    EvalTaskSettings,
    LoggerSettings,
    ModelSettings,
    QatSettings,
    StudySettings,
    TrainSettings,
    check_each,
    require,
)

CPU_EVAL_TOKENS = 1_048_576
# Of W&B's own, those that say what settings say, or give two runs of a sweep one place.
WANDB_VARIABLES = {
    "WANDB_PROJECT": "give logger.project",
    "WANDB_RUN_GROUP": "give logger.group",
    "WANDB_TAGS": "give logger.tags",
    "WANDB_NAME": "give run_name",
    "WANDB_DIR": "W&B's files are in the run's folder, in runs_dir",
    "WANDB_RUN_ID": "each run has an id of its own",
    "WANDB_RESUME": "a run that goes on by resume=RUN is another run of W&B",
    "WANDB_SWEEP_ID": "give a sweep by -m",
    "WANDB_DISABLED": "give logger=csv",
    "WANDB_MODE": "give logger=csv, or logger.offline",
}
WANDB_MODES = ("online", "offline")  # which of them logger.offline decides
TEXT_VOCAB_SIZE = 260  # the smallest that is made of text: qat/text/tokenizer.py
MAX_VOCAB_SIZE = 65_536  # token ids are stored as uint16
Eval = TypeVar("Eval", bound=EvalSettings)
MAX_LOGITS = 2**28  # of a micro-batch with a teacher: a gigabyte as float32
FILES = (".gguf", ".safetensors", ".ptz")  # that task=export writes
TEXT_SOURCES = ("web_bible", "text", "hub")


def resolve_train(settings: TrainSettings, choices: Mapping[str, str | None]) -> TrainSettings:
    """Checked settings, ``auto`` and defaults filled in. ``choices``: group -> option.

    UserError for anything impossible or contradictory.
    """
    s = replace(settings, compile=settings.compile.lower())
    check_each(s)
    forever = "max_steps is null too, so the run would never end; give one of them"
    is_bounded = s.budget_seconds is not None or s.max_steps is not None
    require(is_bounded, "budget_seconds", None, forever)
    if s.schedule.warmdown_fraction is not None and s.schedule.warmdown_steps is not None:
        raise UserError(
            f"schedule.warmdown_fraction = {s.schedule.warmdown_fraction} and "
            f"schedule.warmdown_steps = {s.schedule.warmdown_steps}: two warmdowns; add "
            "schedule.warmdown_steps=null"
        )
    price, is_read = s.artifact.gptq_bit_price, s.artifact.method == "gptq"
    only = "only with artifact.method=gptq"
    require(price == 0.0 or is_read, "artifact.gptq_bit_price", price, only)
    _check_stores(s.study)
    check_logger(s.logger)
    check_eval(s.eval, s.seq_len)
    _check_model(s.model)
    _check_batches(s)
    _check_data(s.data, TEXT_SOURCES)
    _check_prices(s)
    is_whole = (s.fork.run is None) == (s.fork.step is None)
    require(is_whole, "fork.step", s.fork.step, "give fork.run=RUN and fork.step=N, or neither")
    _check_runs_dir(s.runs_dir)
    _check_implied_choices(s.qat, choices)
    _check_to_bytes(s)
    missing = machine.no_compiler() if s.compile == "true" or machine.has_cuda() else None
    if s.compile == "true" and missing:
        raise UserError(f"compile = true: {missing}; install a compiler, or give compile=false")
    is_compiled = machine.has_cuda() and not missing if s.compile == "auto" else s.compile == "true"
    return replace(
        s,
        precision=machine.faster_precision() if s.precision == "auto" else s.precision,
        compile=str(is_compiled).lower(),
        qat=_resolve_start(s),
        model=replace(
            s.model,
            init_from=s.model.init_from and locate_weights(s.model.init_from, s.runs_dir),
        ),
        eval=_resolve_max_tokens(s.eval),
    )


def check_logger(s: LoggerSettings) -> None:
    is_there = s.name != "wandb" or find_spec("wandb") is not None
    require(is_there, "logger.name", s.name, "it is not installed; pip install -e '.[wandb]'")

    alike: dict[str, Collection[str | None]] = {
        "WANDB_PROJECT": [s.project],
        "WANDB_RUN_GROUP": [s.group],
        "WANDB_MODE": WANDB_MODES,
    }
    for variable, instead in WANDB_VARIABLES.items() if s.name == "wandb" else ():
        said = os.environ.get(variable)
        if said and said not in alike.get(variable, ()):
            raise UserError(f"logger=wandb: {variable}={said} is not obeyed: {instead}; unset it")


def _check_stores(s: StudySettings) -> None:
    for name, store in s.stores.items():
        typed = f"study.stores.{name}"
        has_price = store.gptq_bit_price is not None
        only = "only with method: gptq"
        is_read = store.method == "gptq" or not has_price
        require(is_read, f"{typed}.gptq_bit_price", store.gptq_bit_price, only)
        for arm in store.arms or ():
            known = f"no such arm; choose from {', '.join(s.arms)}"
            require(arm in s.arms, f"{typed}.arms", arm, known)


def _check_prices(s: TrainSettings) -> None:
    for name in ("update_price", "qat_update_price"):
        price = getattr(s.schedule, name)
        counted = price == 1.0 or (s.budget_seconds is None and s.max_steps is not None)
        only = "a priced run has no clock; give budget_seconds=null max_steps=N"
        require(counted, f"schedule.{name}", price, only)


def _check_to_bytes(s: TrainSettings) -> None:
    """Training to a number of bytes decides alone how the last weights are stored."""
    if not (s.qat.enabled and s.qat.to_bytes):
        return
    learned = "takes learned scales of rows and columns; give qat=rd"
    one_of_learned = s.grid.scale_rule == "learned" and s.grid.column_scales
    require(one_of_learned, "qat.to_bytes", "true", learned)
    late = (
        "qat.to_bytes = true learns first what matters to the loss; start after two updates or more"
    )
    # The first update moves what starts at zero, which no gradient gets through before.
    for start, too_early in (("start_step", 1), ("start_fraction", 0)):
        value = getattr(s.qat, start)
        require(value is None or value > too_early, f"qat.{start}", value, late)
    scale = s.qat.start_lr_scale
    require(scale is None or scale < 1, "qat.start_lr_scale", scale, late)
    for setting, value, allowed in (
        ("artifact.fill", s.artifact.fill, False),
        ("artifact.method", s.artifact.method, "round"),
        ("averaging", s.averaging.kind, "none"),
        ("qat.stop_step", s.qat.stop_step, None),
    ):
        require(value == allowed, setting, value, "not with qat.to_bytes = true; drop it")


def _check_vocab_size(vocab_size: int) -> None:
    require(
        1 < vocab_size <= MAX_VOCAB_SIZE,
        "model.vocab_size",
        vocab_size,
        f"give {TEXT_VOCAB_SIZE} to {MAX_VOCAB_SIZE}, or with shards what their tokenizer has; "
        "tokens are stored in 16 bits",
    )


def _resolve_max_tokens(e: Eval) -> Eval:
    if e.max_tokens != "auto":
        return e
    return replace(e, max_tokens=None if machine.has_cuda() else CPU_EVAL_TOKENS)


def check_eval(e: EvalSettings, trained_seq_len: int | None = None) -> None:
    seq_len = e.seq_len or trained_seq_len
    if e.stride is not None and seq_len is not None and e.stride > seq_len:
        why = "" if e.seq_len else " (null: seq_len, as trained)"
        raise UserError(
            f"eval.stride = {e.stride}: must be at most eval.seq_len = {seq_len}{why}, or tokens "
            "between windows would not be scored"
        )


def _check_model(m: ModelSettings) -> None:
    known = architectures()
    require(m.name in known, "model.name", m.name, f"choose from {', '.join(known)}")
    for name in ("num_layers", "dim", "num_heads", "num_kv_heads", "mlp_mult"):
        require(getattr(m, name) >= 1, f"model.{name}", getattr(m, name), "give 1 or more")
    require(
        m.dim % m.num_heads == 0,
        "model.dim",
        m.dim,
        f"must be a multiple of model.num_heads = {m.num_heads}",
    )
    require(
        m.dim // m.num_heads % 2 == 0,
        "model.dim",
        m.dim,
        f"gives odd heads of {m.dim // m.num_heads}; rotary embedding needs an even size",
    )
    require(
        m.num_heads % m.num_kv_heads == 0,
        "model.num_kv_heads",
        m.num_kv_heads,
        f"must divide model.num_heads = {m.num_heads}",
    )
    _check_vocab_size(m.vocab_size)


def find_run(setting: str, run: str, runs_dir: str) -> Path:
    """The folder that a path or a run's name means."""
    folder = next((p for p in (run, os.path.join(runs_dir, run)) if os.path.isdir(p)), None)
    if folder is None:
        raise UserError(f"{setting}={run}: no such folder, here or in {runs_dir}")
    return Path(folder)


def locate_weights(named: str, runs_dir: str) -> str:
    """The path that ``model.init_from`` means: its own, or that of a run of this name."""
    of_run = os.path.join(runs_dir, named)
    return of_run if not os.path.exists(named) and os.path.isdir(of_run) else named


def _check_batches(s: TrainSettings) -> None:
    tokens, ranks = s.batch_tokens, machine.world_size()
    multiple = f"must be a multiple of seq_len = {s.seq_len}"
    require(tokens % s.seq_len == 0, "batch_tokens", tokens, multiple)
    shared = f"must be a multiple of seq_len * ranks = {s.seq_len} * {ranks}"
    require(tokens % (s.seq_len * ranks) == 0, "batch_tokens", tokens, shared)
    one = f"must hold one sequence of seq_len = {s.seq_len}"
    require(s.micro_batch_tokens >= s.seq_len, "micro_batch_tokens", s.micro_batch_tokens, one)


def micro_batches(s: TrainSettings) -> int:
    """Forward passes per rank and optimizer step: the fewest that fit ``micro_batch_tokens``."""
    sequences = s.batch_tokens // (s.seq_len * machine.world_size())
    most = s.micro_batch_tokens // s.seq_len
    return next(n for n in range(1, sequences + 1) if sequences % n == 0 and sequences // n <= most)


def _check_data(d: DataSettings, sources: tuple[str, ...]) -> None:
    require(d.source in sources, "data.source", d.source, f"choose from {', '.join(sources)}")
    require(d.files != [], "data.files", "[]", "name a file, or give null")
    shards = [name for name in ("train_files", "val_files", "tokenizer") if getattr(d, name)]
    if d.files and shards:
        raise UserError(f"data.files and data.{shards[0]} name two sources; give one of them")


def _check_runs_dir(runs_dir: str) -> None:
    """Before minutes are spent on the text; the folder itself is made when there is a run."""
    folder = Path(runs_dir).absolute()
    # Not Path.exists, which fails in a folder that is not ours to look into.
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not os.path.isdir(there):
        raise UserError(f"runs_dir={runs_dir}: cannot write there ({there} is not a folder)")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"runs_dir={runs_dir}: cannot write there ({there} is not ours to write)")


def _check_implied_choices(q: QatSettings, choices: Mapping[str, str | None]) -> None:
    """``qat=X`` stands for a grid (and a plan); Hydra composes a contradiction silently."""
    if not q.enabled:
        return
    qat = choices.get("qat")
    for group, implied in (("grid", q.grid), ("plan", q.plan)):
        chosen = choices.get(group)
        if implied is not None and chosen != implied:
            raise UserError(
                f"qat={qat} {group}={chosen}: training would simulate one {group} and store "
                f"another; drop {group}={chosen}, or choose another qat="
            )


def _resolve_start(s: TrainSettings) -> QatSettings:
    """QAT settings with the default start filled in; ``qat=none`` accepts and ignores them."""
    q = s.qat
    if not q.enabled:
        return q
    starts = ("start_step", "start_fraction", "start_lr_scale")
    typed = [f"qat.{name} = {getattr(q, name)}" for name in starts if getattr(q, name) is not None]
    if len(typed) > 1:
        raise UserError(f"{' and '.join(typed)}: {len(typed)} starts; give one of them")
    if q.stop_step is not None and q.start_step is not None and q.stop_step <= q.start_step:
        raise UserError(
            f"qat.stop_step = {q.stop_step}: must be more than qat.start_step = {q.start_step}"
        )
    if q.distill.weight:
        tokens = s.batch_tokens // (machine.world_size() * micro_batches(s))
        require(
            tokens * s.model.vocab_size <= MAX_LOGITS,
            "micro_batch_tokens",
            s.micro_batch_tokens,
            f"with a teacher all logits of {tokens:,} tokens are held; "
            f"give at most {MAX_LOGITS // s.model.vocab_size}",
        )
    if q.distill.teacher is not None and not q.distill.weight:
        raise UserError(
            f"qat.distill.teacher = {q.distill.teacher}: it has no weight in the loss; "
            "give qat.distill.weight"
        )
    if q.start_lr_scale is not None and q.start_lr_scale < 1:
        lowest = s.schedule.floor
        if not (s.schedule.warmdown_steps or s.schedule.warmdown_fraction):
            lowest = 1.0
        if q.start_lr_scale <= lowest:
            raise UserError(
                f"qat.start_lr_scale = {q.start_lr_scale}: the rate never falls below {lowest:g} "
                "(schedule.warmdown_steps, schedule.floor); give a warmdown or another start"
            )
    return q if typed else replace(q, start_fraction=q.default_start_fraction)


def resolve_eval(settings: EvalTaskSettings, choices: Mapping[str, str | None]) -> EvalTaskSettings:
    """Checked settings of eval.py, ``data.*`` included."""
    s = settings
    check_each(s)
    if s.task != "score" and machine.world_size() > 1:
        raise UserError(f"task={s.task}: runs in one process; start it without torchrun")
    if s.task == "fill":
        needed = "the solver needs a run's checkpoint; give run=RUN and no artifact"
        require(bool(s.run) and not s.artifact, "run", s.run, needed)
        is_named = s.out is None or s.out.endswith(".qat")
        require(is_named, "out", s.out, "give the file to write, out=FILE.qat")
    elif s.task == "cabinet" and (s.model.path or s.task_data):
        require(not s.run and not s.artifact, "run", s.run or s.artifact, "give it or model=DIR")
        labelled = "give model=DIR task_data=FILE.jsonl (both)"
        require(bool(s.model.path), "model", s.model.path, labelled)
        require(bool(s.task_data), "task_data", s.task_data, labelled)
    elif s.task == "cabinet":
        one = "give run=RUN or artifact=CHECKPOINT.ckpt (one of them), or model=DIR and task_data="
        require(bool(s.artifact) != bool(s.run), "run", s.run, one)
        is_checkpoint = s.artifact is None or s.artifact.endswith(".ckpt")
        require(is_checkpoint, "artifact", s.artifact, "variants are made of a float checkpoint")
    elif s.task == "report":
        one = (
            "give study=NAME or a glob of run folders, runs='logs/runs/*', or cabinet=FOLDER "
            "(one of them)"
        )
        require(bool(s.runs) + bool(s.study) + bool(s.cabinet) == 1, "runs", s.runs, one)
    elif s.task == "choose":
        require(
            bool(s.cabinet), "cabinet", s.cabinet, "give the folder of a cabinet, cabinet=FOLDER"
        )
        most = (
            "give the most of something, constraints='{latency_ms: 10, artifact_bytes: 16000000}'"
        )
        is_given = any(limit is not None for limit in vars(s.constraints).values())
        require(is_given, "constraints", None, most)
    elif s.task == "submission":
        require(not s.artifact, "artifact", s.artifact, "a submission is made of run=RUN")
        require(bool(s.run), "run", s.run, "give the run to submit, run=RUN")
        require(bool(s.out), "out", s.out, "give the folder to write, out=DIR")
    elif s.task == "export":
        one = "give artifact=PATH or run=RUN (one of them)"
        require(bool(s.artifact) != bool(s.run), "artifact", s.artifact, one)
        require(
            not (s.artifact or "").endswith(".ptz"), "artifact", s.artifact,
            "the challenge's file holds tensors only; give a .qat",
        )  # fmt: skip
        out = s.out or ""
        suffix = "/" if out.endswith("/") else os.path.splitext(out)[1]
        remedy = f"give one of {', '.join(f'FILE{end}' for end in FILES)}, or DIR/ (Hugging Face)"
        require(bool(out) and suffix in ("/", "", *FILES), "out", s.out, remedy)
    elif s.task == "audit" and not (s.artifact or s.run):
        d = s.data
        is_typed = bool(d.train_files or d.val_files or d.tokenizer or d.files)
        needed = "name the data: data.val_files=GLOB data.tokenizer=PATH, data=NAME, or run=RUN"
        require(is_typed or d.source != "from_artifact", "data", d.source, needed)
    elif not (s.task == "score" and s.eval.parts and s.artifact and s.run):
        require(
            bool(s.artifact) != bool(s.run),
            "artifact",
            s.artifact,
            "give artifact=PATH or run=RUN (one of them)",
        )
    if s.run:
        s = replace(s, run=str(find_run("run", s.run, s.runs_dir)))
    if s.study:
        s = replace(s, study=str(find_run("study", s.study, s.runs_dir)))
    check_logger(s.logger)
    check_eval(s.eval)
    is_used = s.eval.pairs_file is None or "pairs" in s.eval.parts
    pairs = "add eval.parts='[pairs]' or eval=full"
    require(is_used, "eval.pairs_file", s.eval.pairs_file, pairs)
    _check_data(s.data, (*TEXT_SOURCES, "from_artifact"))
    _check_vocab_size(s.model.vocab_size)
    _check_golf_file(s)
    return replace(s, eval=_resolve_max_tokens(s.eval))


def _check_golf_file(s: EvalTaskSettings) -> None:
    """The challenge's file holds tensors only; what else scoring needs has to be typed."""
    is_golf = s.artifact is not None and s.artifact.endswith(".ptz")
    if is_golf:
        for setting, value, example in (
            ("eval.seq_len", s.eval.seq_len, "eval.seq_len=1024"),
            ("data.val_files", s.data.val_files, "data.val_files=GLOB"),
            ("data.tokenizer", s.data.tokenizer, "data.tokenizer=PATH"),
        ):
            require(bool(value), setting, value, f"a .ptz file does not say; give {example}")
