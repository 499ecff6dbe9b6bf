"""A cabinet's folder: its rows, each measured once, and the report of them.

A variant that was measured is not measured again: each leaves ``<variant>/metrics.json`` in the
folder, and ``manifest.json`` says what they were all measured on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from qat.cabinet.bitsandbytes_variants import bitsandbytes_variants
from qat.cabinet.grid_variants import grid_variants
from qat.cabinet.objective import Objective, Row
from qat.cabinet.report import stop_text, write_report
from qat.cabinet.roofline import Ceilings, measure_ceilings
from qat.cabinet.row import Bench
from qat.cabinet.summary import FLOAT, summarise
from qat.cabinet.torchao_variants import torchao_variants
from qat.cabinet.variant import Frozen, Kept, Variant
from qat.errors import UserError
from qat.runs import provenance
from qat.runs.run_folder import write_atomically

MANIFEST, RESULTS, ROW, ROOFLINE = "manifest.json", "results.json", "metrics.json", "roofline.json"


def claim(folder: Path, same: dict[str, Any], objective: Objective) -> dict[str, Any]:
    """The folder's manifest, found or still to be written. UserError if its rows are of something
    else than ``same`` says, or nothing can be written there."""
    same = same | {
        "objective": asdict(objective), "storing_code": provenance.storing_code("cabinet")
    }  # fmt: skip
    path = folder / MANIFEST
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
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
    return same | provenance.collect(1)


def choose_variants(
    model: Frozen, more: Sequence[Variant], globs: Sequence[str] | None
) -> list[Variant]:
    """Those that a glob names; all without globs. UserError if they name none."""
    rows = grid_variants(model) + torchao_variants(model) + bitsandbytes_variants(model)
    rows += more
    if globs is None:
        return rows
    chosen = [v for v in rows if any(fnmatchcase(v.name, glob) for glob in globs)]
    if not chosen:
        names = ", ".join(v.name for v in rows)
        raise UserError(f"variants = {list(globs)}: names none of {names}")
    return chosen


def float_kept(model: Frozen) -> Kept:
    """What the variant fp32 is: to compare with, also where no row of it is asked for."""
    return next(v for v in grid_variants(model) if v.name == FLOAT).make()


def measure_all(
    folder: Path, manifest: dict[str, Any], variants: Sequence[Variant], bench: Bench
) -> list[Row]:
    """Rows of all variants, in their order; REPORT.md and its like are written anew."""
    objective = bench.evaluation.objective
    console = Console(stderr=True)
    todo = [v for v in variants if not _is_measured(folder, v)]
    if todo:
        bench.read_float()  # what cannot be measured at all leaves no manifest behind
    if not (folder / MANIFEST).is_file():
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for variant in track(
        todo, "variants", console=console, transient=True, disable=not console.is_terminal
    ):
        row = bench.row(variant)
        (folder / variant.name).mkdir(exist_ok=True)
        write_atomically(folder / variant.name / ROW, json.dumps(row, indent=1) + "\n")
        told = row["reason"] or (
            f"{row['disk_bytes']:,} bytes, {objective.key} {row[objective.key]:.5f}"
        )
        console.print(f"{variant.name}: {told}", highlight=False)
    rows = [json.loads((folder / v.name / ROW).read_text("utf-8")) for v in variants]
    write_atomically(folder / RESULTS, json.dumps(rows, indent=1) + "\n")
    ceilings = _ceilings(folder, bench.device)
    write_report(rows, ceilings, manifest, folder, objective)
    print(stop_text(rows, summarise(rows, ceilings, objective), objective))
    print(f"written: {folder}/REPORT.md, summary.json, {RESULTS} and pictures")
    return rows


def _is_measured(folder: Path, variant: Variant) -> bool:
    path = folder / variant.name / ROW
    if not path.is_file():
        return False
    found = json.loads(path.read_text("utf-8"))
    return variant.made_from is None or found.get("made_from") == variant.made_from


def _ceilings(folder: Path, device: torch.device) -> Ceilings:
    path = folder / ROOFLINE
    if not path.is_file():
        write_atomically(path, json.dumps(asdict(measure_ceilings(device)), indent=1) + "\n")
    return Ceilings(**json.loads(path.read_text("utf-8")))
