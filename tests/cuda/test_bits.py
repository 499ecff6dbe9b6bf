"""Promise 10: a GPU gives the bits of a CPU, for every grid whose scales need no sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qat.artifact.container import pack, read_artifact, write_whole
from qat.ptq.gptq import GptqFactor
from qat.quantize.fused import FusedSnap, has_kernel, is_fusable
from qat.quantize.gradients import make_rule
from qat.quantize.gradients.learned import Learned
from qat.quantize.grid import Grid
from qat.quantize.plan import Entry, Plan, build_plan
from qat.quantize.rounding import decode, encode, rotated
from tests.quantize.test_fused import plan_of, same_bits, weights
from tests.quantize.test_same_bits import (
    CLAIMING,
    GRIDS,
    SUMS,
    bits,
    differences,
    hard_weights,
    rounded,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("name", CLAIMING)
def test_snapping_encoding_and_decoding(name: str) -> None:
    grid = CLAIMING[name]
    there = differences(grid, lambda w: rounded(w, grid), lambda w: rounded(w.on("cuda"), grid))
    assert there == []


@pytest.mark.parametrize("name", CLAIMING)
def test_a_file_of_one_is_read_by_the_other(name: str) -> None:
    grid = CLAIMING[name]
    for w in hard_weights(grid).values():
        coded = encode(w.weights, grid, w.scales)
        placed = type(coded)(*(None if t is None else t.cuda() for t in coded))
        assert torch.equal(bits(decode(coded, grid)), bits(decode(placed, grid)))


def test_the_fused_pass() -> None:
    """Triton's kernels on the GPU against plain torch on a CPU."""
    masters = weights()
    plan = plan_of(masters)
    placed = {name: w.cuda() for name, w in masters.items()}
    fused, expected = FusedSnap(plan)(placed), plan.snap(masters)
    assert len(fused) > 30
    assert [name for name, w in fused.items() if not same_bits(w.cpu(), expected[name])] == []


def has_fused_kernel(grid: Grid) -> bool:
    entry = Entry("w", (400, 77), grid)
    return is_fusable(entry) and has_kernel(entry)


@pytest.mark.parametrize("name", [n for n, grid in CLAIMING.items() if has_fused_kernel(grid)])
def test_the_fused_pass_on_hard_weights(name: str) -> None:
    grid = CLAIMING[name]
    hard = {k: w.weights for k, w in hard_weights(grid).items() if w.weights.dim() > 1}
    plan = build_plan({k: tuple(w.shape) for k, w in hard.items()}, {"g": grid}, {"*": "g"})
    fused, expected = FusedSnap(plan)({k: w.cuda() for k, w in hard.items()}), plan.snap(hard)
    assert {"rows", "ties"} <= set(fused)
    assert [k for k, w in fused.items() if not torch.equal(bits(w), bits(expected[k]))] == []


def test_a_file_has_the_same_bytes() -> None:
    """A plan of many grids, coded on either."""
    masters = weights()
    entries = [e for e in plan_of(masters) if e.grid is None or e.grid.scale_rule not in SUMS]
    plan = Plan(entries)
    placed = {name: w.cuda() for name, w in masters.items()}
    files = [pack(plan.encode(w, {}), plan, {}, "zlib") for w in (masters, placed)]
    assert files[0] == files[1]


@pytest.mark.parametrize("rule", ["identity", "clipped"])
def test_what_training_sees(rule: str) -> None:
    """And where its gradients pass."""
    for name, grid in CLAIMING.items():
        gradient = make_rule(rule)
        if grid.scale_rule in ("learned", "given") or not gradient.supports(grid):
            continue
        for w in hard_weights(grid).values():
            here, there = (
                gradient.see(rotated(t, grid), grid.unrotated)
                for t in (w.weights, w.weights.cuda())
            )
            assert torch.equal(bits(here.weight), bits(there.weight)), name
            assert (here.slope is None) == (there.slope is None)
            assert here.slope is None or torch.equal(here.slope, there.slope.cpu()), name


def test_what_training_sees_with_learned_scales() -> None:
    for name, grid in CLAIMING.items():
        if grid.scale_rule != "learned":
            continue
        for w in hard_weights(grid).values():
            seen = [
                Learned().see(rotated(m.weights, grid), grid.unrotated, scales=m.scales).weight
                for m in (w, w.on("cuda"))
            ]
            assert torch.equal(bits(seen[0]), bits(seen[1])), name


@pytest.mark.parametrize("name", [name for name in GRIDS if name not in CLAIMING])
def test_where_sums_decide_a_scale_differs_by_its_last_digits(name: str) -> None:
    """What such a grid says of itself, on weights that are no ties and whose squares are numbers;
    how many codes differ is printed."""
    grid = GRIDS[name]
    hard = hard_weights(grid)
    off = total = 0
    for w in (hard["rows"].weights[100:], hard["long"].weights):
        here, there = encode(w, grid), encode(w.cuda(), grid)
        off += int((here.codes != there.codes.cpu()).sum())
        total += here.codes.numel()
        if grid.scale_rule != "mse" and not grid.refit:  # sums choose there, and codes matter
            digits = {"fp16": 2.0**-10, "bf16": 2.0**-7, "fp32": 2.0**-16}[grid.scale_dtype]
            torch.testing.assert_close(
                here.scales.float(), there.scales.cpu().float(), rtol=digits, atol=0.0
            )
    print(f"{grid.label}: {off} of {total} codes differ")
    assert off < 0.01 * total


def test_gptq_feeds_errors_alike() -> None:
    """In float64: a code may differ where a sum's last digit decides a tie, and none is seen to."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    hessian, w = x.T @ x / 512, torch.randn(64, 96, generator=generator)
    for name in ("int4", "int4_g64", "int4_asymmetric"):
        codes = [
            GptqFactor(h, act_order=True).quantize(t, GRIDS[name]).codes.cpu()
            for h, t in ((hessian, w), (hessian.cuda(), w.cuda()))
        ]
        assert (codes[0] != codes[1]).float().mean() < 1e-3, name


def test_a_file_read_here_is_what_the_gpu_saw(tmp_path) -> None:
    """Sums too: who encodes decides, and who reads agrees."""
    for name, grid in GRIDS.items():
        for w in (hard_weights(grid)["rows"], hard_weights(grid)["ties"]):
            placed = w.on("cuda")
            plan = build_plan({"w": tuple(w.weights.shape)}, {"g": grid}, {"*": "g"})
            scales = {} if placed.scales is None else {"w": placed.scales}
            seen: Tensor = plan.snap({"w": placed.weights}, scales)["w"]
            if not math.isfinite(float(seen.abs().max())):
                continue
            data = pack(plan.encode({"w": placed.weights}, scales), plan, {}, "zlib")
            write_whole(tmp_path / "a.qat", data)
            read = read_artifact(tmp_path / "a.qat").weights["w"]
            assert torch.equal(bits(seen), bits(read)), name
