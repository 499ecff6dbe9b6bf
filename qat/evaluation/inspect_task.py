"""``eval.py task=inspect``: where the bytes of an artifact are.

A section holds all tensors, so what one tensor costs in it is not defined; ``coded alone`` codes
its codes by themselves with the section's coder. The totals below the table are the file's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from qat.artifact.coder import CODERS
from qat.artifact.container import HASH_BYTES, PREFIX, Artifact, read_artifact
from qat.artifact.sections import matrix_of
from qat.evaluation.open_model import artifact_path
from qat.quantize.plan import Encoded
from qat.settings.terminal import print_wide

if TYPE_CHECKING:
    from qat.budget.budget import Budget
    from qat.settings.schema import EvalTaskSettings

COLUMNS = (
    "tensor", "grid", "shape", "symbols", "order-0 bits", "coded alone", "bits/weight", "scales",
)  # fmt: skip


def order0_bits(codes: torch.Tensor) -> float:
    """Entropy of the symbols' frequencies, in bits per code."""
    counts = torch.unique(codes, return_counts=True)[1].double()
    share = counts / counts.sum()
    return float(-(share * share.log2()).sum()) if codes.numel() else 0.0


def _row(item: Encoded, coder: str) -> list[str]:
    entry = item.entry
    shape = " x ".join(map(str, entry.shape))
    floats_bytes = sum(floats.numel() * floats.element_size() for floats in item.floats)
    if item.coded is None or entry.grid is None:
        bits = 8.0 * item.floats[0].element_size()
        return [entry.name, entry.dtype, shape, "", "", f"{floats_bytes:,}", f"{bits:.3f}", ""]
    codes = item.coded.codes
    coded = CODERS[coder].encode(codes.numpy().tobytes(), [matrix_of(entry)])
    per_weight = 8 * (len(coded) + floats_bytes) / max(codes.numel(), 1)
    return [
        entry.name, entry.grid.label, shape, str(codes.unique().numel()),
        f"{order0_bits(codes):.3f}", f"{len(coded):,}", f"{per_weight:.3f}", f"{floats_bytes:,}",
    ]  # fmt: skip


def size_lines(artifact: Artifact, budget: Budget) -> list[tuple[str, int]]:
    """What the file consists of, and what the limit leaves; (name, bytes)."""
    sections = [
        (f"{name} ({coder}, {raw:,} raw)", coded) for name, coder, raw, coded in artifact.sections
    ]
    fixed = PREFIX.size + HASH_BYTES
    header = artifact.num_bytes - fixed - sum(size for _, size in sections)
    ideal = sum(
        math.ceil(order0_bits(item.coded.codes) * item.coded.codes.numel() / 8)
        for item in artifact.encoded
        if item.coded is not None
    )
    return [
        ("codes at the order-0 entropy of each tensor", ideal),
        *sections,
        ("header", header),
        ("magic, version, length, SHA-256", fixed),
        ("artifact", artifact.num_bytes),
        ("code", budget.code_bytes),
        ("total", artifact.num_bytes + budget.code_bytes),
        (
            f"headroom below limit_bytes = {budget.limit_bytes:,}",
            budget.artifact_bytes - artifact.num_bytes,
        ),
    ]


def run(s: EvalTaskSettings, budget: Budget) -> int:
    path = artifact_path(s)
    artifact = read_artifact(path)
    table = Table(title=str(path), title_justify="left")
    for title in COLUMNS:
        table.add_column(title, justify="left" if title in COLUMNS[:3] else "right")
    coder = artifact.sections[0][1]
    for item in artifact.encoded:
        table.add_row(*_row(item, coder))
    print_wide(table)
    for name, size in size_lines(artifact, budget):
        print(f"{size:>14,}  {name}")
    return 0
