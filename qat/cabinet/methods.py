"""Ways to find the codes of one matrix, given its grid: what differs between variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qat.evaluation.layer_inputs import EMBEDDING, HEAD, LayerInputs
from qat.quantize.awq import awq
from qat.quantize.gptq import GptqFactor
from qat.quantize.plan import Encoded, Entry, Plan
from qat.quantize.rounding import Codes, decode, encode, weighted_steps

LITE_PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)  # GPTQ-lite's candidates
Method = Callable[[Entry, Tensor], tuple[Entry, Codes]]  # codes of a matrix, and its grid


def encoded_by(plan: Plan, weights: Mapping[str, Tensor], method: Method) -> list[Encoded]:
    """Every tensor as a file stores it: matrices by ``method``, the others as the plan says."""
    found = []
    for item in plan.encode(weights):
        if item.entry.grid is not None:
            entry, codes = method(item.entry, weights[item.entry.name])
            zeros = None if codes.zeros is None else codes.zeros.cpu()
            item = Encoded(entry, Codes(codes.codes.cpu(), codes.steps.cpu(), zeros))
        found.append(item)
    return found


def nearest(entry: Entry, w: Tensor) -> tuple[Entry, Codes]:
    """Rounding to nearest, by the grid's own rule."""
    assert entry.grid is not None
    return entry, encode(w, entry.grid)


def lite(entry: Entry, w: Tensor) -> tuple[Entry, Codes]:
    """GPTQ-lite: of each row the percentile clip with the least squared error."""
    assert entry.grid is not None
    best, least = None, None
    for percentile in LITE_PERCENTILES:
        codes = encode(w, replace(entry.grid, step_rule="percentile", percentile=percentile))
        error = (decode(codes, entry.grid) - w).square().sum(1, keepdim=True)
        if best is None or least is None:
            best, least = codes.steps, error
        is_less = error < least
        best, least = torch.where(is_less, codes.steps, best), error.minimum(least)
    assert best is not None
    return entry, encode(w, entry.grid, best.float())


def gptq(inputs: LayerInputs, act_order: bool = True, by_inputs: bool = True) -> Method:
    """Full-Hessian GPTQ; with ``by_inputs`` steps minimise the error weighted by the inputs' mean
    squares. An untied embedding, which multiplies nothing, is rounded to nearest."""
    factors: dict[int, GptqFactor] = {}  # by the sums that matrices share

    def method(entry: Entry, w: Tensor) -> tuple[Entry, Codes]:
        assert entry.grid is not None
        if entry.name == EMBEDDING and not inputs.shape.tie_embeddings:
            return nearest(entry, w)
        hessian = inputs.hessian(entry.name)
        key = id(inputs.read_by(entry.name).products)
        if key not in factors:
            factors[key] = GptqFactor(hessian, act_order=act_order)
        steps = None
        if by_inputs and entry.grid.levels == "int" and not entry.grid.per_tensor:
            steps = weighted_steps(w, entry.grid, hessian.diagonal())
        return entry, factors[key].quantize(w, entry.grid, steps)

    return method


def scaled(inputs: LayerInputs) -> Method:
    """AWQ, its scales stored as column steps; embedding and head rounded to nearest."""

    def method(entry: Entry, w: Tensor) -> tuple[Entry, Codes]:
        assert entry.grid is not None
        if entry.name in (EMBEDDING, HEAD):
            return nearest(entry, w)
        magnitude = inputs.of[entry.name].magnitudes / inputs.num_tokens
        found = awq(w, inputs.hessian(entry.name), magnitude, entry.grid)
        return replace(entry, grid=found.grid), found.coded

    return method
