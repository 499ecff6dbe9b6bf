"""Every setting: type, unit, and what it may hold, whatever the others say (``ranges.py`` relates
them). Values live in ``conf/``; a key missing here is a typo."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qat.errors import UserError

MAX_TAG_LENGTH = 64  # of W&B
TAGS = f"give tags of 1 to {MAX_TAG_LENGTH} characters"
AT_MOST = "give a number above 0"
EVAL_PARTS = ("reliability", "damage", "layers", "pairs", "cost")


def checked(default: Any, holds: Callable[[Any], bool], remedy: str) -> Any:
    """A field whose value must hold, unless it is null; of a list, each of its values."""
    return field(default=default, metadata={"check": (holds, remedy)})


def at_least_1(default: Any = MISSING) -> Any:
    return checked(default, lambda value: value >= 1, "give 1 or more")


def at_least_0(default: Any = MISSING) -> Any:
    return checked(default, lambda value: 0 <= value < math.inf, "give 0 or more")


def below_1(default: Any) -> Any:
    return checked(default, lambda value: 0 <= value < 1, "give 0 or more, below 1")


def fraction(default: Any = None) -> Any:
    return checked(default, lambda value: 0 <= value <= 1, "give a fraction between 0 and 1")


def above_0(default: Any, remedy: str) -> Any:
    return checked(default, lambda value: 0 < value < math.inf, remedy)


def one_of(options: tuple[str, ...], default: Any) -> Any:
    return checked(default, lambda value: value in options, f"choose from {', '.join(options)}")


def folder_name(default: str | None) -> Any:
    remedy = "use letters, digits, '.', '_', '+' and '-' only"
    return checked(default, lambda name: bool(re.fullmatch(r"\w[\w.+-]*", name)), remedy)


def seed() -> Any:
    return checked(1337, lambda value: 0 <= value < 2**63, "give 0 to 2^63 - 1")


def require(condition: bool, setting: str, value: object, remedy: str) -> None:
    if not condition:
        raise UserError(f"{setting} = {'null' if value is None else value}: {remedy}")


def check_each(settings: Any, prefix: str = "") -> None:
    """Every field by itself. UserError names the first that does not hold, with its groups."""
    for of in fields(settings):
        value, name = getattr(settings, of.name), prefix + of.name
        if is_dataclass(value):
            check_each(value, f"{name}.")
        elif check := of.metadata.get("check"):
            holds, remedy = check
            for one in value if isinstance(value, list) else [value]:
                require(one is None or holds(one), name, one, remedy)


@dataclass
class ModelSettings:
    num_layers: int = MISSING
    dim: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: int = MISSING
    mlp_mult: int = MISSING
    vocab_size: int = MISSING
    tie_embeddings: bool = True
    init_from: str | None = None  # a torch file of initial weights (read with weights_only)


@dataclass
class OptimizerSettings:
    name: str = one_of(("muon", "normuon", "adamw"), "muon")  # for the matrices of the blocks
    matrix_lr: float = at_least_0(0.04)  # of these matrices
    weight_decay: float = below_1(0.0)  # of these matrices, decoupled: times the learning rate
    tied_embedding_lr: float = at_least_0(0.05)  # Adam, all else
    embedding_lr: float = at_least_0(0.6)  # when untied
    head_lr: float = at_least_0(0.008)
    scalar_lr: float = at_least_0(0.04)  # vectors and scalars
    learned_scale_lr: float = at_least_0(1e-4)  # scales of grids with scale_rule=learned
    momentum_start: float = below_1(0.85)  # Muon momentum grows from here ...
    momentum: float = below_1(0.95)  # ... to here ...
    momentum_warmup_steps: int = at_least_0(500)  # ... over so many steps
    newton_schulz_dtype: str = one_of(("bf16", "fp32"), "bf16")  # of Muon's iteration
    neuron_beta: float = below_1(0.95)  # of NorMuon's mean square per row
    adam_beta1: float = below_1(0.9)
    adam_beta2: float = below_1(0.95)


@dataclass
class ScheduleSettings:
    warmdown_steps: int | None = at_least_0()  # the rate falls over so many last steps
    # ... or over this share of the clock, or of max_steps; above 1 it falls from the start, from
    # 1 / warmdown_fraction of its peak
    warmdown_fraction: float | None = above_0(None, "give more than 0")
    floor: float = below_1(0.0)  # where it falls to, as a share of its peak
    warmup_steps: int = at_least_0()  # untimed priming steps; everything is restored after them


@dataclass
class AveragingSettings:  # what is stored instead of the last weights
    kind: str = one_of(("none", "ema", "swa"), MISSING)
    decay: float = below_1(0.98)  # of ema
    start_fraction: float = below_1(0.0)  # of the clock, or of max_steps
    every_steps: int = at_least_1(1)
    # snapped: weights as a file would hold them while QAT is on
    of: str = one_of(("masters", "snapped"), "masters")


@dataclass
class DataSettings:
    source: str = MISSING  # web_bible | text | hub | from_artifact
    train_files: str | None = None  # glob of challenge shards
    val_files: str | None = None  # glob of challenge shards
    tokenizer: str | None = None  # a SentencePiece .model
    files: list[str] | None = None  # .txt, .jsonl, .parquet (globs)
    val_fraction: float = checked(  # share of documents held out, by hash
        0.05, lambda share: 0 < share < 1, "give a fraction between 0 and 1"
    )
    cache_dir: str = "~/.cache/qat"
    repo_id: str = "willdepueoai/parameter-golf"
    revision: str = "main"
    dataset: str = "fineweb10B_sp1024"
    train_shards: int = at_least_1(80)


@dataclass
class GridSettings:  # meanings: qat/quantize/grid.py
    levels: str = "int"  # int | ternary | binary | fp8_e4m3 | fp8_e5m2
    bits: int | None = None  # of int levels, 2 to 8
    range: str = "symmetric"  # symmetric | full | asymmetric
    group_size: int | None = None  # columns per scale; null = one scale per row
    per_tensor: bool = False
    scale_rule: str = "amax"  # amax | percentile | sigma | mse | fixed | absmean | learned
    percentile: float = 0.9999984  # a fraction, used by scale_rule=percentile
    sigma: float = 12.85  # clip in standard deviations, used by scale_rule=sigma
    fixed_scale: float | None = None  # used by scale_rule=fixed
    scale_floor: float = 0.0
    scale_dtype: str = "fp16"  # fp32 | bf16 | fp16, as stored
    code_scale_dtype: str | None = None  # null = scale_dtype
    refit: bool = False  # ternary: undo the shrinkage of mean|w|
    column_scales: bool = False  # learned scales per row and per column, multiplied


@dataclass
class PlanSettings:
    # glob over parameter names -> grid, a name in ``grids``, fp16, bf16 or fp32
    rules: dict[str, str] = MISSING
    grids: dict[str, GridSettings] = field(default_factory=dict)  # beside the one named grid
    grid_min_elements: int = 0  # smaller tensors that a rule puts on the grid stay fp16


@dataclass
class QatSettings:
    enabled: bool = MISSING
    grid: str | None = None  # the grid= and plan= options that this arm stands for
    plan: str | None = None
    gradient: str = "identity"  # identity | clipped | soft_round | noise
    start_step: int | None = at_least_0(None)  # so many updates use float weights first
    start_fraction: float | None = fraction()  # of the clock, or of max_steps
    start_lr_scale: float | None = fraction()  # once the rate has fallen to this share of its peak
    stop_step: int | None = at_least_0(None)  # updates after this one use float weights again
    ramp_steps: int = at_least_0(0)  # blend from float to snapped weights over so many updates
    default_start_fraction: float = fraction(0.5)  # used when no start is given
    # Train to limit_bytes: what the codes will cost is part of the loss (learned scales only)
    to_bytes: bool = False
    # nats per token and bit; null = so that the limit is met
    bit_price: float | None = at_least_0(None)


@dataclass
class ArtifactSettings:
    coder: str = (
        "mix"  # zlib | zstd | lzma | brotli | constriction | mix | auto (all of them, the smallest)
    )
    # gptq: full-Hessian, calibrated on training text
    method: str = one_of(("round", "gptq"), "round")
    # What a bit counts in GPTQ's choices, of the price that scales imply; 0 = errors alone
    gptq_bit_price: float = at_least_0(0.0)
    fill: bool = False  # fill limit_bytes: choose each tensor's grid by what its errors cost
    sensitivity_tokens: int = at_least_1(32_768)  # ... of training text, to find it out


@dataclass
class CheckpointSettings:  # off the clock; the last one is written when training ends
    every_steps: int | None = at_least_1(None)
    every_seconds: float | None = at_least_0(60.0)  # of the training clock


@dataclass
class EvalSettings:
    precision: str = one_of(("fp32", "bf16"), "fp32")  # bf16: autocast
    # per forward pass; more than a CPU's caches hold is slower
    batch_tokens: int = at_least_1(4_096)
    seq_len: int | None = at_least_1(None)  # of a window; null = as trained
    stride: int | None = at_least_1(None)  # of windows that slide; null = they do not overlap
    by_document: bool = False  # no window reaches from one document into the next


@dataclass
class FullEvalSettings(EvalSettings):
    # beside val_bpb; eval=full takes all of them
    parts: list[str] = field(
        default_factory=list,
        metadata={"check": (EVAL_PARTS.__contains__, f"choose from {', '.join(EVAL_PARTS)}")},
    )
    pairs_file: str | None = None  # .jsonl of minimal pairs; null = those made from templates
    layers_tokens: int = at_least_1(16_384)  # validation tokens per tensor, of the part layers
    num_bins: int = at_least_1(15)  # of reliability diagrams
    resamples: int = at_least_1(2_000)  # of the bootstrap over documents
    repeats: int = at_least_1(5)  # of each timing


@dataclass
class LoggerSettings:
    name: str = one_of(("csv", "wandb"), MISSING)  # wandb: beside csv
    project: str = "qat"
    group: str | None = None  # null = the sweep's name
    tags: list[str] = field(
        default_factory=list,
        metadata={"check": (lambda tag: 1 <= len(tag) <= MAX_TAG_LENGTH, TAGS)},
    )
    offline: bool = True
    every_steps: int = at_least_1(10)  # write metrics.csv after so many steps


@dataclass
class StoreSettings:  # one more way to store what an arm trained
    grid: str | None = None  # a grid= option; null = the arm's own
    method: str | None = None  # as artifact.method, and so on; null = the arm's own
    gptq_bit_price: float | None = None
    fill: bool | None = None
    arms: list[str] | None = None  # that are stored so; null = all

    def is_of(self, arm: str) -> bool:
        return self.arms is None or arm in self.arms


@dataclass
class StudySettings:  # of an experiment that is one; only its sweep reads them
    question: str = ""
    baseline: str = "none"  # the arm that all others are compared with
    seeds: list[int] = field(default_factory=list)
    grid: str | None = None  # that arms without QAT are stored on; null = the run's own
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> overrides
    stores: dict[str, StoreSettings] = field(default_factory=dict)  # beside each arm's own file
    # Compare each QAT arm also with the baseline that the budget solver fits to as many bytes.
    equal_bytes: bool = False


@dataclass
class TrainSettings:
    profile: str = MISSING
    seed: int = seed()
    # training only; null = none
    budget_seconds: float | None = above_0(MISSING, "give more than 0 seconds, or null")
    max_steps: int | None = at_least_1(None)  # null = none
    batch_tokens: int = at_least_1()  # per optimizer step, over all ranks
    micro_batch_tokens: int = MISSING  # largest forward pass of one rank
    seq_len: int = at_least_1()
    # bf16: autocast over fp32 masters
    precision: str = one_of(("auto", "bf16", "fp32"), "auto")
    compile: str = one_of(("auto", "true", "false"), "auto")  # auto: on with CUDA
    limit_bytes: int = at_least_1(16_000_000)  # artifact + code, decimal
    run_name: str | None = folder_name(None)  # null = time, qat, grid, seed
    resume: str | None = None  # a run's folder or name: go on with it, settings and all
    sweep_name: str = folder_name("sweep-${now:%Y%m%d-%H%M%S}")
    runs_dir: str = "logs/runs"
    # Of a study, the split of a QAT arm's effect. full: train a baseline of as many steps for it;
    # estimate: from the baseline's loss curve.
    ledger: str = one_of(("estimate", "full"), "estimate")
    study: StudySettings = field(default_factory=StudySettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    averaging: AveragingSettings = field(default_factory=AveragingSettings)
    data: DataSettings = field(default_factory=DataSettings)
    grid: GridSettings = field(default_factory=GridSettings)
    plan: PlanSettings = field(default_factory=PlanSettings)
    qat: QatSettings = field(default_factory=QatSettings)
    artifact: ArtifactSettings = field(default_factory=ArtifactSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)


@dataclass
class VocabularySettings:  # named as in training; an artifact says its own
    vocab_size: int = 1024  # of text that task=audit prepares


@dataclass
class SampleSettings:
    max_tokens: int = at_least_1(100)
    temperature: float = at_least_0(0.8)  # 0 = always the likeliest token


@dataclass
class SubmissionSettings:  # what submission.json says beside the run's numbers
    author: str | None = None
    github_id: str | None = None
    name: str | None = None  # null = the run's name
    blurb: str | None = None  # a sentence on what was done; null = arm, grid, steps and seconds


@dataclass
class ConstraintSettings:  # of task=choose: the most that a variant may have; null = any
    latency_ms: float | None = above_0(None, AT_MOST)  # forward pass of one sequence
    artifact_bytes: float | None = above_0(None, AT_MOST)  # of the file
    memory_bytes: float | None = above_0(None, AT_MOST)  # of the tensors as they are held
    val_bpb: float | None = above_0(None, AT_MOST)
    perplexity: float | None = above_0(None, AT_MOST)
    ece: float | None = above_0(None, AT_MOST)  # expected calibration error, without a temperature
    peak_memory_bytes: float | None = above_0(None, AT_MOST)  # of the process


@dataclass
class EvalTaskSettings:
    task: str = "score"  # what to do; all of them: TASKS in eval.py
    artifact: str | None = None  # file: a .qat, or a .ptz of the challenge
    out: str | None = None  # what is written: convert's .ptz, fill's .qat, submission's folder
    run: str | None = None  # run folder or run name; stands for its artifact
    runs: str | None = None  # glob of run folders
    study: str | None = None  # folder or name of a study's sweep
    variants: list[str] | None = None  # globs of task=cabinet's rows; null = all
    cabinet: str | None = None  # folder with the results.json of task=cabinet
    runs_dir: str = "logs/runs"
    prompt: str = ""
    seed: int = seed()
    limit_bytes: int = at_least_1(16_000_000)  # artifact + code, of tasks inspect and fill
    model: VocabularySettings = field(default_factory=VocabularySettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    constraints: ConstraintSettings = field(default_factory=ConstraintSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)  # of task=report
    submission: SubmissionSettings = field(default_factory=SubmissionSettings)
    data: DataSettings = field(default_factory=DataSettings)
    eval: FullEvalSettings = field(default_factory=FullEvalSettings)


def from_yaml(text: str, typed: str) -> TrainSettings:
    """The inverse of ``as_yaml``. UserError naming ``typed`` if it was saved by another version."""
    try:
        saved = OmegaConf.merge(OmegaConf.structured(TrainSettings), OmegaConf.create(text))
        settings = OmegaConf.to_object(saved)
    except (OmegaConfBaseException, YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{typed}: saved by another version ({reason})") from None
    assert isinstance(settings, TrainSettings)
    return settings


def as_yaml(settings: TrainSettings) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(settings))
