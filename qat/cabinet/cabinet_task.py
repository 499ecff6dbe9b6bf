"""``eval.py task=cabinet run=RUN``: every post-training method on one frozen checkpoint.

A variant that was measured is not measured again: each leaves ``<variant>/metrics.json`` in the
folder, and ``manifest.json`` says what they were all measured on.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from qat.analysis.damage import count_tokens, tier_by_token
from qat.analysis.full import TRAINING_TOKENS, encode_pairs, pairs_of
from qat.analysis.token_scores import ScoredText
from qat.artifact.container import ARTIFACT
from qat.cabinet.bitsandbytes_variants import bitsandbytes_variants
from qat.cabinet.grid_variants import Frozen, grid_variants, kept
from qat.cabinet.report import stop_text, write_report
from qat.cabinet.roofline import Ceilings, measure_ceilings
from qat.cabinet.row import Bench
from qat.cabinet.summary import summarise
from qat.cabinet.torchao_variants import torchao_variants
from qat.cabinet.variant import Kept, Variant, unmade
from qat.errors import UserError
from qat.evaluation.open_model import open_artifact, open_scorer
from qat.ptq.calibration import MAX_TOKENS, random_sequences, training_sequences, written_sequences
from qat.runs import provenance
from qat.runs.float_model import FloatModel, open_float
from qat.runs.run_folder import CHECKPOINT, write_atomically
from qat.text.shards import TokenStream

if TYPE_CHECKING:
    from qat.budget.budget import Budget
    from qat.settings.schema import EvalTaskSettings

MANIFEST, RESULTS, ROW, ROOFLINE = "manifest.json", "results.json", "metrics.json", "roofline.json"


def run(s: EvalTaskSettings, budget: Budget) -> int:
    path = Path(s.artifact) if s.artifact else Path(s.run or "") / CHECKPOINT
    model = open_float(path, f"artifact={path}" if s.artifact else f"run={s.run}")
    folder = Path(s.out or path.parent / "cabinet")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench, training = _bench(model, s, device)
    manifest = _claim(folder, model, bench, training, s)
    weights = {name: w.to(device) for name, w in model.weights.items()}
    bos_id = bench.scorer.bos_id
    assert bos_id is not None  # the bench knows where documents start
    artifact = path.parent / ARTIFACT
    variants = _variants(model, weights, training, bos_id, artifact, s, device)
    console = Console(stderr=True)
    todo = [v for v in variants if not (folder / v.name / ROW).is_file()]
    if todo:
        reference = bench.reference(weights)
        for variant in track(
            todo, "variants", console=console, transient=True, disable=not console.is_terminal
        ):
            row = bench.row(variant, reference)
            (folder / variant.name).mkdir(exist_ok=True)
            write_atomically(folder / variant.name / ROW, json.dumps(row, indent=1) + "\n")
            told = row["reason"] or f"{row['disk_bytes']:,} bytes, val_bpb {row['val_bpb']:.5f}"
            console.print(f"{variant.name}: {told}", highlight=False)
    rows = [json.loads((folder / v.name / ROW).read_text("utf-8")) for v in variants]
    write_atomically(folder / RESULTS, json.dumps(rows, indent=1) + "\n")
    ceilings = _ceilings(folder, device)
    write_report(rows, ceilings, manifest, folder)
    print(stop_text(rows, summarise(rows, ceilings)))
    print(f"written: {folder}/REPORT.md, summary.json, {RESULTS} and pictures")
    return 0


def _bench(
    model: FloatModel, s: EvalTaskSettings, device: torch.device
) -> tuple[Bench, TokenStream]:
    """The texts. UserError if there is no training text: methods are calibrated on it."""
    source, tokenizer = model.open_text(s.data)
    if not source.train_files:
        raise UserError("data.train_files = null: variants are calibrated on it; give a glob")
    scorer = open_scorer(model.spec, model.settings.seq_len, source, tokenizer, s.eval, device)
    training = TokenStream(source.train_files, "data.train_files")
    counts = count_tokens(training, model.spec.vocab_size, TRAINING_TOKENS)
    sentences = encode_pairs(tokenizer, pairs_of(s.eval))
    text = ScoredText.of(scorer)
    return Bench(scorer, text, sentences, tier_by_token(counts), s.eval, s.seed), training


def _claim(
    folder: Path, model: FloatModel, bench: Bench, training: TokenStream, s: EvalTaskSettings
) -> dict[str, Any]:
    """The folder's manifest, written now or found. UserError if its rows are of something else."""
    digest = hashlib.sha256()
    for name, w in sorted(model.weights.items()):
        digest.update(name.encode())
        digest.update(w.contiguous().numpy().tobytes())
    same = {
        "weights_sha256": digest.hexdigest(),
        "validation_text": bench.scorer.stream.fingerprint,
        "training_text": training.fingerprint,
        "seed": s.seed,
        "eval": asdict(s.eval),
        "storing_code": provenance.storing_code("cabinet"),
    }
    path = folder / MANIFEST
    if path.is_file():
        found = json.loads(path.read_text("utf-8"))
        for key, value in same.items():
            if found.get(key) != value:
                raise UserError(
                    f"out={folder}: its variants were measured with another {key}; "
                    "give another out=FOLDER"
                )
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={folder}: {error.strerror or error}") from None
    manifest = same | provenance.collect(1)
    write_atomically(path, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _variants(
    model: FloatModel,
    weights: dict[str, Tensor],
    training: TokenStream,
    bos_id: int,
    artifact: Path,
    s: EvalTaskSettings,
    device: torch.device,
) -> list[Variant]:
    """Those that ``variants`` names; all by default. UserError if it names none."""
    seq_len = min(model.settings.seq_len, MAX_TOKENS)
    texts = {
        "train": lambda: training_sequences(training, seq_len),
        "self": lambda: written_sequences(model.spec, weights, bos_id, s.seed),
        "random": lambda: random_sequences(model.spec, seq_len, s.seed),
    }
    rows = grid_variants(Frozen(model.spec, weights, texts))
    rows += torchao_variants(model.spec, weights, device)
    rows += bitsandbytes_variants(model.spec, weights, device)
    if artifact.is_file():
        rows.append(_own_variant(artifact))
    if s.variants is None:
        return rows
    chosen = [v for v in rows if any(fnmatchcase(v.name, glob) for glob in s.variants)]
    if not chosen:
        names = ", ".join(v.name for v in rows)
        raise UserError(f"variants = {s.variants}: names none of {names}")
    return chosen


def _own_variant(path: Path) -> Variant:
    """The file that the run itself wrote, a row with the reason if it cannot be read."""
    try:
        opened = open_artifact(path)
    except UserError as error:
        return unmade("own_artifact", "qat", str(error))

    def make() -> Kept:
        return replace(
            kept(opened.artifact.encoded, opened.spec), disk_bytes=opened.artifact.num_bytes
        )

    return Variant("own_artifact", "qat", make)


def _ceilings(folder: Path, device: torch.device) -> Ceilings:
    path = folder / ROOFLINE
    if not path.is_file():
        write_atomically(path, json.dumps(asdict(measure_ceilings(device)), indent=1) + "\n")
    return Ceilings(**json.loads(path.read_text("utf-8")))
