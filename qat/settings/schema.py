"""Every setting, its type and its unit. Values live in ``conf/``; a key missing here is a typo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from qat.errors import UserError
from qat.model.spec import ModelSpec
from qat.quantize.grid import Grid


@dataclass
class ModelSettings(ModelSpec):  # sizes and architecture: qat/model/spec.py
    init_from: str | None = None  # a torch file of initial weights (read with weights_only)


@dataclass
class OptimizerSettings:
    name: str = "muon"  # muon | normuon | adamw, for the matrices of the blocks
    matrix_lr: float = 0.04  # of these matrices
    weight_decay: float = 0.0  # of these matrices, decoupled: times the learning rate
    tied_embedding_lr: float = 0.05  # Adam, all else
    embedding_lr: float = 0.6  # when untied
    head_lr: float = 0.008
    scalar_lr: float = 0.04  # vectors and scalars
    learned_scale_lr: float = 1e-4  # scales of grids with scale_rule=learned
    momentum_start: float = 0.85  # Muon momentum grows from here ...
    momentum: float = 0.95  # ... to here ...
    momentum_warmup_steps: int = 500  # ... over so many steps
    newton_schulz_dtype: str = "bf16"  # bf16 | fp32, of Muon's iteration
    neuron_beta: float = 0.95  # of NorMuon's mean square per row
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95


@dataclass
class ScheduleSettings:
    warmdown_steps: int | None = MISSING  # the rate falls over so many last steps
    # ... or over this share of the clock, or of max_steps; above 1 it falls from the start, from
    # 1 / warmdown_fraction of its peak
    warmdown_fraction: float | None = None
    floor: float = 0.0  # where it falls to, as a share of its peak
    warmup_steps: int = MISSING  # untimed priming steps; everything is restored after them


@dataclass
class AveragingSettings:  # what is stored instead of the last weights
    kind: str = MISSING  # none | ema | swa
    decay: float = 0.98  # of ema
    start_fraction: float = 0.0  # of the clock, or of max_steps
    every_steps: int = 1
    of: str = "masters"  # masters | snapped: weights as a file would hold them while QAT is on


@dataclass
class DataSettings:
    source: str = MISSING  # web_bible | text | hub | from_artifact
    train_files: str | None = None  # glob of challenge shards
    val_files: str | None = None  # glob of challenge shards
    tokenizer: str | None = None  # a SentencePiece .model
    files: list[str] | None = None  # .txt, .jsonl, .parquet (globs)
    val_fraction: float = 0.05  # share of documents held out, by hash
    cache_dir: str = "~/.cache/qat"
    repo_id: str = "willdepueoai/parameter-golf"
    revision: str = "main"
    dataset: str = "fineweb10B_sp1024"
    train_shards: int = 80


@dataclass
class PlanSettings:
    # glob over parameter names -> grid, a name in ``grids``, fp16, bf16 or fp32
    rules: dict[str, str] = MISSING
    grids: dict[str, Grid] = field(default_factory=dict)  # beside the one named grid
    grid_min_elements: int = 0  # smaller tensors that a rule puts on the grid stay fp16


@dataclass
class QatSettings:
    enabled: bool = MISSING
    grid: str | None = None  # the grid= and plan= options that this arm stands for
    plan: str | None = None
    gradient: str = "identity"  # a file in qat/quantize/gradients
    start_step: int | None = None  # so many updates use float weights first
    start_fraction: float | None = None  # of the clock, or of max_steps
    start_lr_scale: float | None = None  # once the rate has fallen to this share of its peak
    stop_step: int | None = None  # updates after this one use float weights again
    ramp_steps: int = 0  # blend from float to snapped weights over so many updates
    default_start_fraction: float = 0.5  # used when no start is given
    # Train to limit_bytes: what the codes will cost is part of the loss (learned scales only)
    to_bytes: bool = False
    bit_price: float | None = None  # nats per token and bit; null = so that the limit is met


@dataclass
class ArtifactSettings:
    coder: str = (
        "mix"  # zlib | zstd | brotli | constriction | mix | auto (all of them, the smallest)
    )
    method: str = "round"  # round | gptq (full-Hessian, calibrated on training text)
    # What a bit counts in GPTQ's choices, of the price that scales imply; 0 = errors alone
    gptq_bit_price: float = 0.0
    fill: bool = False  # fill limit_bytes: choose each tensor's grid by what its errors cost
    sensitivity_tokens: int = 32_768  # ... of training text, to find out what errors cost


@dataclass
class CheckpointSettings:  # off the clock; the last one is written when training ends
    every_steps: int | None = None
    every_seconds: float | None = 60.0  # of the training clock


@dataclass
class EvalSettings:
    precision: str = "fp32"  # fp32 | bf16 (autocast)
    batch_tokens: int = 4_096  # tokens per forward pass; more than a CPU's caches hold is slower
    seq_len: int | None = None  # of a window; null = as trained
    stride: int | None = None  # of windows that slide; null = they do not overlap
    by_document: bool = False  # no window reaches from one document into the next


@dataclass
class FullEvalSettings(EvalSettings):
    # reliability | damage | layers | pairs | cost, beside val_bpb; eval=full takes all of them
    parts: list[str] = field(default_factory=list)
    pairs_file: str | None = None  # .jsonl of minimal pairs; null = those made from templates
    layers_tokens: int = 16_384  # validation tokens per tensor, of the part layers
    num_bins: int = 15  # of reliability diagrams
    resamples: int = 2_000  # of the bootstrap over documents
    repeats: int = 5  # of each timing


@dataclass
class LoggerSettings:
    name: str = MISSING  # csv | wandb (beside csv)
    project: str = "qat"
    group: str | None = None  # null = the sweep's name
    tags: list[str] = field(default_factory=list)
    offline: bool = True
    every_steps: int = 10  # write metrics.csv after so many steps


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
    seed: int = 1337
    budget_seconds: float | None = MISSING  # training only; null = none
    max_steps: int | None = None  # null = none
    batch_tokens: int = MISSING  # per optimizer step, over all ranks
    micro_batch_tokens: int = MISSING  # largest forward pass of one rank
    seq_len: int = MISSING
    precision: str = "auto"  # auto | bf16 | fp32 (autocast over fp32 masters)
    compile: str = "auto"  # auto (on with CUDA) | true | false
    limit_bytes: int = 16_000_000  # artifact + code, decimal
    run_name: str | None = None  # null = time, qat, grid, seed
    resume: str | None = None  # a run's folder or name: go on with it, settings and all
    sweep_name: str = "sweep-${now:%Y%m%d-%H%M%S}"
    runs_dir: str = "logs/runs"
    # Of a study, the split of a QAT arm's effect. full: train a baseline of as many steps for it;
    # estimate: from the baseline's loss curve.
    ledger: str = "estimate"
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
    eval: EvalSettings = field(default_factory=EvalSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)


@dataclass
class VocabularySettings:  # named as in training; an artifact says its own
    vocab_size: int = 1024  # of text that task=audit prepares


@dataclass
class SampleSettings:
    max_tokens: int = 100
    temperature: float = 0.8  # 0 = always the likeliest token


@dataclass
class SubmissionSettings:  # what submission.json says beside the run's numbers
    author: str | None = None
    github_id: str | None = None
    name: str | None = None  # null = the run's name
    blurb: str | None = None  # a sentence on what was done; null = arm, grid, steps and seconds


@dataclass
class ConstraintSettings:  # of task=choose: the most that a variant may have; null = any
    latency_ms: float | None = None  # forward pass of one sequence
    artifact_bytes: float | None = None  # of the file
    memory_bytes: float | None = None  # of the tensors as they are held
    val_bpb: float | None = None
    perplexity: float | None = None
    ece: float | None = None  # expected calibration error, without a temperature
    peak_memory_bytes: float | None = None  # of the process


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
    seed: int = 1337
    limit_bytes: int = 16_000_000  # artifact + code, decimal; of task=inspect and task=fill
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
        return OmegaConf.to_object(node)
    except OmegaConfBaseException:
        raise
    except ValueError as error:
        for key in node:  # who refused is the innermost that still does
            part = node._get_node(key)  # type: ignore[arg-type]
            if isinstance(part, DictConfig) and not part._is_none():
                as_settings(part, f"{path}{key!s}.")
        raise UserError(f"{path}{error}") from None


def from_yaml(text: str, typed: str) -> TrainSettings:
    """The inverse of ``as_yaml``. UserError naming ``typed`` if it was saved by another version."""
    try:
        saved = OmegaConf.merge(OmegaConf.structured(TrainSettings), OmegaConf.create(text))
        settings = as_settings(saved)
    except (OmegaConfBaseException, YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{typed}: saved by another version ({reason})") from None
    assert isinstance(settings, TrainSettings)
    return settings


def as_yaml(settings: TrainSettings) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(settings))
