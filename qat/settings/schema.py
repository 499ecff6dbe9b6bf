"""Every setting: type, unit, and what it may hold, whatever the others say (``checks.py`` relates
them). Values live in ``conf/``; a key missing here is a typo."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from os.path import expanduser
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qat.errors import UserError
from qat.model.spec import ModelSpec
from qat.quantize.grid import Grid

MAX_TAG_LENGTH, MAX_NAME_LENGTH = 64, 128  # of W&B; file systems take a little more
EVAL_PARTS = ("reliability", "damage", "layers", "pairs", "cost")

Check = tuple[Callable[[Any], bool], str]  # whether a value will do, and what to do if not
AT_LEAST_1: Check = (lambda value: value >= 1, "give 1 or more")
AT_LEAST_0: Check = (lambda value: 0 <= value < math.inf, "give 0 or more")
ABOVE_0: Check = (lambda value: 0 < value < math.inf, "give more than 0")
SECONDS: Check = (ABOVE_0[0], "give more than 0 seconds, or null")
MOST: Check = (ABOVE_0[0], "give a number above 0")
BELOW_1: Check = (lambda value: 0 <= value < 1, "give 0 or more, below 1")
FRACTION: Check = (lambda value: 0 <= value <= 1, "give a fraction between 0 and 1")
SHARE: Check = (lambda value: 0 < value < 1, "give a fraction between 0 and 1")
SEED: Check = (lambda value: 0 <= value < 2**63, "give 0 to 2^63 - 1")
AUTO_OR_COUNT: Check = (
    lambda value: value == "auto" or (type(value) is int and value >= 1),
    "give 1 or more, null for all of them, or auto",
)
PROJECT: Check = (
    lambda name: re.fullmatch(rf"[^/\\#?%:]{{1,{MAX_NAME_LENGTH}}}", str(name)) is not None,
    f"use 1 to {MAX_NAME_LENGTH} letters, none of them one of /\\#?%:",
)
GROUP: Check = (
    lambda name: 1 <= len(name) <= MAX_NAME_LENGTH,
    f"use 1 to {MAX_NAME_LENGTH} letters",
)
TAG: Check = (
    lambda tag: 1 <= len(tag) <= MAX_TAG_LENGTH,
    f"give tags of 1 to {MAX_TAG_LENGTH} characters",
)
NAME: Check = (
    lambda name: (
        re.fullmatch(r"\w[\w.+-]*", name) is not None and len(name.encode()) <= MAX_NAME_LENGTH
    ),
    f"use letters, digits, '.', '_', '+' and '-' only, {MAX_NAME_LENGTH} bytes at most",
)


def one_of(*options: str) -> Check:
    return options.__contains__, f"choose from {', '.join(options)}"


def checked(default: Any, check: Check) -> Any:
    """A field whose value must hold, unless it is null; of a list, each of its values."""
    return field(default=default, metadata={"check": check})


PATH = {"path": True}  # of a field of a path, or a list of them: ``~`` is the home folder


def path(default: str | None = None) -> Any:
    return field(default=default, metadata=PATH)


# For conf/train.yaml, which makes the sweep's folder of a path.
OmegaConf.register_new_resolver("expanduser", expanduser, replace=True)


def _expand_paths(settings: Any) -> None:
    for of in fields(settings):
        value = getattr(settings, of.name)
        if is_dataclass(value):
            _expand_paths(value)
        elif value and of.metadata.get("path"):
            paths = [*map(expanduser, value)] if isinstance(value, list) else expanduser(value)
            object.__setattr__(settings, of.name, paths)  # a model's sizes are frozen


def require(condition: bool, setting: str, value: object, remedy: str) -> None:
    if not condition:
        whole = isinstance(value, float) and value.is_integer()  # typed without a point, as a rule
        told = "null" if value is None else f"{value:.0f}" if whole else value
        raise UserError(f"{setting} = {told}: {remedy}")


def check_each(settings: Any, prefix: str = "") -> None:
    """Every field by itself. UserError names the first that does not hold, with its groups."""
    for of in fields(settings):
        value, name = getattr(settings, of.name), prefix + of.name
        if is_dataclass(value):
            check_each(value, f"{name}.")
        elif isinstance(value, dict):
            for key, one in value.items():
                if is_dataclass(one):
                    check_each(one, f"{name}.{key}.")
        elif check := of.metadata.get("check"):
            holds, remedy = check
            for one in value if isinstance(value, list) else [value]:
                require(one is None or holds(one), name, one, remedy)
        elif of.metadata.get("path"):
            for one in value if isinstance(value, list) else [value or ""]:
                longest = max(len(part.encode()) for part in one.split("/"))
                require(longest < 256, name, one, "a file's name has 255 bytes at most")


@dataclass
class ModelSettings(ModelSpec):  # sizes and architecture: qat/model/spec.py
    # initial weights: a run, a .qat, .safetensors or torch file, or the folder of a Hugging Face
    # Llama; sizes that it says are taken too, but for those typed
    init_from: str | None = path()


@dataclass
class OptimizerSettings:
    name: str = checked("muon", one_of("muon", "normuon", "adamw"))  # of blocks' matrices
    matrix_lr: float = checked(0.04, AT_LEAST_0)  # of these matrices
    weight_decay: float = checked(0.0, BELOW_1)  # of these, times the learning rate
    tied_embedding_lr: float = checked(0.05, AT_LEAST_0)  # Adam, all else
    embedding_lr: float = checked(0.6, AT_LEAST_0)  # when untied
    head_lr: float = checked(0.008, AT_LEAST_0)
    scalar_lr: float = checked(0.04, AT_LEAST_0)  # vectors and scalars
    learned_scale_lr: float = checked(1e-4, AT_LEAST_0)  # scales of grids with scale_rule=learned
    momentum_start: float = checked(0.85, BELOW_1)  # Muon momentum grows from here ...
    momentum: float = checked(0.95, BELOW_1)  # ... to here ...
    momentum_warmup_steps: int = checked(500, AT_LEAST_0)  # ... over so many steps
    newton_schulz_dtype: str = checked("bf16", one_of("bf16", "fp32"))  # of Muon's iteration
    neuron_beta: float = checked(0.95, BELOW_1)  # of NorMuon's mean square per row
    adam_beta1: float = checked(0.9, BELOW_1)
    adam_beta2: float = checked(0.95, BELOW_1)
    lr_scale: float = checked(1.0, AT_LEAST_0)  # of all rates above


@dataclass
class ScheduleSettings:
    warmdown_steps: int | None = checked(MISSING, AT_LEAST_0)  # the rate falls so many last steps
    # ... or over this share of the clock, or of max_steps; above 1 it falls from the start, from
    # 1 / warmdown_fraction of its peak
    warmdown_fraction: float | None = checked(None, ABOVE_0)
    floor: float = checked(0.0, BELOW_1)  # where it falls to, as a share of its peak
    warmup_steps: int = checked(MISSING, AT_LEAST_0)  # untimed priming steps, undone after them
    # What an update takes of max_steps, which are then updates of a baseline (study.clock=priced)
    update_price: float = checked(1.0, ABOVE_0)
    qat_update_price: float = checked(1.0, ABOVE_0)  # ... with QAT on


@dataclass
class AveragingSettings:  # what is stored instead of the last weights
    kind: str = checked(MISSING, one_of("none", "ema", "swa"))
    decay: float = checked(0.98, BELOW_1)  # of ema
    start_fraction: float = checked(0.0, BELOW_1)  # of the clock, or of max_steps
    every_steps: int = checked(1, AT_LEAST_1)
    # snapped: weights as a file would hold them while QAT is on
    of: str = checked("masters", one_of("masters", "snapped"))


@dataclass
class DataSettings:
    source: str = MISSING  # web_bible | text | hub | from_artifact
    train_files: str | None = path()  # glob of challenge shards
    val_files: str | None = path()  # glob of challenge shards
    tokenizer: str | None = path()  # a SentencePiece .model
    # .txt, .jsonl (both as .gz or .zst too), .parquet; globs
    files: list[str] | None = field(default=None, metadata=PATH)
    text_column: str = "text"  # of .jsonl and .parquet files
    val_fraction: float = checked(0.05, SHARE)  # share of documents held out, by hash
    cache_dir: str = path("~/.cache/qat")
    repo_id: str = "willdepueoai/parameter-golf"
    revision: str = "main"
    dataset: str = "fineweb10B_sp1024"
    train_shards: int = checked(80, AT_LEAST_1)


@dataclass
class PlanSettings:
    # glob over parameter names -> grid, a name in ``grids``, fp16, bf16 or fp32
    rules: dict[str, str] = MISSING
    grids: dict[str, Grid] = field(default_factory=dict)  # beside the one named grid
    grid_min_elements: int = 0  # smaller tensors that a rule puts on the grid stay fp16
    # columns of the Hadamard blocks by which every matrix on a grid is rotated, a power of two from
    # 2 to 1024; null = no rotation
    rotate: int | None = None


@dataclass
class DistillSettings:  # part of the target is a float model's, while QAT is on
    weight: float = checked(0.0, FRACTION)  # of the teacher in the loss; 0 = no teacher
    temperature: float = checked(1.0, ABOVE_0)
    teacher: str | None = path()  # a run or a .qat file; null = the float weights at the switch


@dataclass
class QatSettings:
    enabled: bool = MISSING
    grid: str | None = None  # the grid= and plan= options that this arm stands for
    plan: str | None = None
    gradient: str = "identity"  # a file in qat/quantize/gradients
    gradient_strength: float = checked(1.0, AT_LEAST_0)  # times that of the rule, if it has one
    start_step: int | None = checked(None, AT_LEAST_0)  # so many updates use float weights first
    start_fraction: float | None = checked(None, FRACTION)  # of the clock, or of max_steps
    # once the rate has fallen to this share of its peak
    start_lr_scale: float | None = checked(None, FRACTION)
    stop_step: int | None = checked(None, AT_LEAST_0)  # later updates use float weights again
    ramp_steps: int = checked(0, AT_LEAST_0)  # blend from float to snapped over so many updates
    default_start_fraction: float = checked(0.5, FRACTION)  # used when no start is given
    # Train to limit_bytes: what the codes will cost is part of the loss (learned scales only)
    to_bytes: bool = False
    # nats per token and bit; null = so that the limit is met
    bit_price: float | None = checked(None, AT_LEAST_0)
    distill: DistillSettings = field(default_factory=DistillSettings)


@dataclass
class ArtifactSettings:
    coder: str = (
        "mix"  # zlib | zstd | brotli | constriction | mix | auto (all of them, the smallest)
    )
    # gptq: full-Hessian, calibrated on training text
    method: str = checked("round", one_of("round", "gptq"))
    # What a bit counts in GPTQ's choices, of the price that scales imply; 0 = errors alone
    gptq_bit_price: float = checked(0.0, AT_LEAST_0)
    fill: bool = False  # fill limit_bytes: choose each tensor's grid by what its errors cost
    sensitivity_tokens: int = checked(32_768, AT_LEAST_1)  # ... of training text, to find it out


@dataclass
class CheckpointSettings:  # off the clock; the last one is written when training ends
    every_steps: int | None = checked(None, AT_LEAST_1)
    every_seconds: float | None = checked(60.0, AT_LEAST_0)  # of the training clock


@dataclass
class ForkSettings:
    # keep a checkpoint after so many updates, for other runs to go on from
    keep_steps: list[int] = field(default_factory=list, metadata={"check": AT_LEAST_1})
    run: str | None = path()  # go on from this run's, ...
    step: int | None = checked(None, AT_LEAST_1)  # ... kept after so many updates

    @property
    def typed(self) -> str:
        return f"fork.run={self.run} fork.step={self.step}"


@dataclass
class EvalSettings:
    precision: str = checked("fp32", one_of("fp32", "bf16"))  # bf16: autocast
    # per forward pass; more than a CPU's caches hold is slower
    batch_tokens: int = checked(4_096, AT_LEAST_1)
    seq_len: int | None = checked(None, AT_LEAST_1)  # of a window; null = as trained
    stride: int | None = checked(None, AT_LEAST_1)  # null = windows do not overlap
    by_document: bool = False  # no window reaches from one document into the next
    curve_points: int = checked(0, AT_LEAST_0)  # of the validation curve of a run; off the clock
    curve_tokens: int = checked(32_768, AT_LEAST_1)  # of validation text, the same at every point
    # of validation text, in windows spread over all of it; null = all; auto: all on a GPU, on a CPU
    # the million that it scores in about a minute
    max_tokens: int | str | None = checked("auto", AUTO_OR_COUNT)


@dataclass
class FullEvalSettings(EvalSettings):
    # beside val_bpb; eval=full takes all of them
    parts: list[str] = field(default_factory=list, metadata={"check": one_of(*EVAL_PARTS)})
    pairs_file: str | None = path()  # .jsonl of minimal pairs; null = those made from templates
    layers_tokens: int = checked(16_384, AT_LEAST_1)  # of validation text per tensor
    num_bins: int = checked(15, AT_LEAST_1)  # of reliability diagrams
    resamples: int = checked(2_000, AT_LEAST_1)  # of the bootstrap over documents
    repeats: int = checked(5, AT_LEAST_1)  # of each timing


@dataclass
class LoggerSettings:
    name: str = checked(MISSING, one_of("csv", "wandb"))  # wandb: beside csv
    project: str = checked("qat", PROJECT)
    group: str | None = checked(None, GROUP)  # null = the sweep's name
    tags: list[str] = field(default_factory=list, metadata={"check": TAG})
    offline: bool = True  # whatever WANDB_MODE says
    every_steps: int = checked(10, AT_LEAST_1)  # write metrics.csv after so many steps


@dataclass
class StoreSettings:  # one more way to store what an arm trained
    grid: str | None = None  # a grid= option; null = the arm's own
    # as artifact.method, and so on; null = the arm's own
    method: str | None = checked(None, one_of("round", "gptq"))
    gptq_bit_price: float | None = checked(None, AT_LEAST_0)
    fill: bool | None = None
    arms: list[str] | None = None  # that are stored so; null = all


@dataclass
class StudySettings:  # of an experiment that is one; only its sweep reads them
    question: str = ""
    baseline: str = "none"  # the arm that all others are compared with
    seeds: list[int] = field(default_factory=list)
    grid: str | None = None  # that arms without QAT are stored on; null = the run's own
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> overrides
    stores: dict[str, StoreSettings] = field(default_factory=dict)  # beside each arm's own file
    # priced: an arm gets the updates that max_steps (or budget_seconds) of the baseline buy at its
    # price, which is measured, or given in prices: arm (qat: each with QAT that is not named) ->
    # price, or [before the switch, after it]
    clock: str = checked("wall", one_of("wall", "priced"))
    prices: dict[str, Any] = field(default_factory=dict)
    # Compare each QAT arm also with the baseline that the budget solver fits to as many bytes.
    equal_bytes: bool = False

    def stores_of(self, arm: str) -> dict[str, StoreSettings]:
        return {name: s for name, s in self.stores.items() if s.arms is None or arm in s.arms}


@dataclass
class TrainSettings:
    profile: str = MISSING
    seed: int = checked(1337, SEED)  # of first weights and of noise
    data_seed: int | None = checked(None, SEED)  # draws where reading begins; null: at the start
    # training only; null = none
    budget_seconds: float | None = checked(MISSING, SECONDS)
    max_steps: int | None = checked(None, AT_LEAST_1)  # null = none
    batch_tokens: int = checked(MISSING, AT_LEAST_1)  # per optimizer step, over all ranks
    micro_batch_tokens: int = MISSING  # largest forward pass of one rank
    seq_len: int = checked(MISSING, AT_LEAST_1)
    # bf16: autocast over fp32 masters
    precision: str = checked("auto", one_of("auto", "bf16", "fp32"))
    compile: str = checked("auto", one_of("auto", "true", "false"))  # auto: on with CUDA
    limit_bytes: int = checked(16_000_000, AT_LEAST_1)  # artifact + code, decimal
    run_name: str | None = checked(None, NAME)  # null = time, qat, grid, seed
    resume: str | None = path()  # a run's folder or name: go on with it, settings and all
    sweep_name: str = checked("sweep-${now:%Y%m%d-%H%M%S}", NAME)
    runs_dir: str = path("logs/runs")
    # Of a study, the split of a QAT arm's effect. full: train a baseline of as many steps for it;
    # estimate: from the baseline's loss curve.
    ledger: str = checked("estimate", one_of("estimate", "full"))
    study: StudySettings = field(default_factory=StudySettings)
    model: ModelSettings = field(default_factory=lambda: ModelSettings(*[MISSING] * 6))
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    averaging: AveragingSettings = field(default_factory=AveragingSettings)
    data: DataSettings = field(default_factory=DataSettings)
    grid: Grid = MISSING
    plan: PlanSettings = field(default_factory=PlanSettings)
    qat: QatSettings = field(default_factory=QatSettings)
    artifact: ArtifactSettings = field(default_factory=ArtifactSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    fork: ForkSettings = field(default_factory=ForkSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)


@dataclass
class VocabularySettings:  # named as in training; an artifact says its own
    vocab_size: int = 1024  # of text that task=audit prepares
    # folder of a Hugging Face sequence classifier, of task=cabinet; typed as model=DIR
    path: str | None = path()


@dataclass
class LabelSettings:  # of task=cabinet model=DIR
    ordered: bool = False  # labels are steps of a scale: kappa weighs by squared distance
    max_tokens: int | None = checked(None, AT_LEAST_1)  # cut texts to so many; null = refuse longer


@dataclass
class SampleSettings:
    max_tokens: int = checked(100, AT_LEAST_1)
    temperature: float = checked(0.8, AT_LEAST_0)  # 0 = always the likeliest token


@dataclass
class SubmissionSettings:  # what submission.json says beside the run's numbers
    author: str | None = None
    github_id: str | None = None
    name: str | None = None  # null = the run's name
    blurb: str | None = None  # a sentence on what was done; null = arm, grid, steps and seconds


@dataclass
class ConstraintSettings:  # of task=choose: the most that a variant may have, null = any; ...
    latency_ms: float | None = checked(None, MOST)  # forward pass of one sequence
    artifact_bytes: float | None = checked(None, MOST)  # of the file
    memory_bytes: float | None = checked(None, MOST)  # of the tensors as they are held
    val_bpb: float | None = checked(None, MOST)
    perplexity: float | None = checked(None, MOST)
    ece: float | None = checked(None, MOST)  # expected calibration error, without a temperature
    peak_memory_bytes: float | None = checked(None, MOST)  # of the process
    # ... and the least: times as fast as fp32, timed in turn with it, one item or a batch
    latency_speedup: float | None = checked(None, MOST)
    throughput_speedup: float | None = checked(None, MOST)
    # ... and of labelled tasks
    macro_f1: float | None = checked(None, MOST)
    accuracy: float | None = checked(None, MOST)
    mcc: float | None = checked(None, MOST)
    auc: float | None = checked(None, MOST)
    kappa: float | None = checked(None, MOST)  # quadratic-weighted
    items_per_second: float | None = checked(None, MOST)  # texts, in batches


@dataclass
class EvalTaskSettings:
    task: str = "score"  # what to do; all of them: TASKS in eval.py
    artifact: str | None = path()  # file: a .qat, or a .ptz of the challenge
    # what is written: fill's .qat, submission's folder, and of export what the name says
    out: str | None = path()
    run: str | None = path()  # run folder or run name; stands for its artifact
    runs: str | None = path()  # glob of run folders
    study: str | None = path()  # folder or name of a study's sweep
    variants: list[str] | None = None  # globs of task=cabinet's rows; null = all
    task_data: str | None = path()  # .jsonl of {"text": ..., "label": ...}, with model=DIR
    keep: list[str] | None = None  # globs of what stays float32, with model=DIR; null = its head
    labels: LabelSettings = field(default_factory=LabelSettings)
    cabinet: str | None = path()  # folder with the results.json of task=cabinet
    runs_dir: str = path("logs/runs")
    prompt: str = ""
    seed: int = checked(1337, SEED)
    limit_bytes: int = checked(16_000_000, AT_LEAST_1)  # artifact + code, of tasks inspect and fill
    model: VocabularySettings = field(default_factory=VocabularySettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    constraints: ConstraintSettings = field(default_factory=ConstraintSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)  # of task=report
    submission: SubmissionSettings = field(default_factory=SubmissionSettings)
    data: DataSettings = field(default_factory=DataSettings)
    eval: FullEvalSettings = field(default_factory=FullEvalSettings)


def as_settings(node: DictConfig | ListConfig, path: str = "") -> Any:
    """The object that a node of settings describes; UserError for what the object itself refuses.

    ``path`` goes before the names of its settings.
    """
    try:
        settings = OmegaConf.to_object(node)
        if is_dataclass(settings):
            _expand_paths(settings)
        return settings
    except OmegaConfBaseException:
        raise
    except ValueError as error:
        for key in node:  # who refused is the innermost that still does
            part = node._get_node(key)  # type: ignore[arg-type]
            if isinstance(part, DictConfig) and not part._is_none():
                as_settings(part, f"{path}{key!s}.")
        raise UserError(f"{path}{error}") from None


def from_yaml(text: str, typed: str) -> TrainSettings:
    """The inverse of ``as_yaml``. UserError naming ``typed`` if it was saved by another version, or
    is damaged."""
    try:
        saved = OmegaConf.merge(OmegaConf.structured(TrainSettings), OmegaConf.create(text))
        settings = as_settings(saved)
    except (OmegaConfBaseException, YAMLError, AssertionError) as error:  # the last: no mapping
        reason = (str(error) or "no settings").splitlines()[0]
        raise UserError(
            f"{typed}: saved by another version, or damaged ({reason}); start the run anew"
        ) from None
    assert isinstance(settings, TrainSettings)
    return settings


def as_yaml(settings: TrainSettings) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(settings))
