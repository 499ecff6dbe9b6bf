"""``cabinet.run``: the cabinet of any torch model and any evaluation.

The model is called with ``inputs`` to see what each matrix reads (GPTQ, AWQ and their like are
calibrated on it), and to time it. It is judged by ``evaluate``: a function of a module that returns
numbers, or a labelled task (``qat.cabinet.labelled.LabelledTask``), which also says where damage
lands and how far confidences can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat.analysis.cost import Calls
from qat.cabinet.grid_variants import file_variant
from qat.cabinet.measure import choose_variants, claim, float_kept, measure_all
from qat.cabinet.objective import Objective, Row
from qat.cabinet.roofline import Traffic, traffic_of
from qat.cabinet.row import Bench
from qat.cabinet.variant import Frozen, Kept
from qat.errors import UserError
from qat.model.wiring import arguments
from qat.quantize.plan import digest_of

SAME_RTOL, SAME_ATOL = 1e-4, 1e-5  # of two calls: kernels may add up in another order
NO_FILES: Mapping[str, str | Path] = {}


class Judge(Protocol):
    """An evaluation that compares, too: see ``qat.cabinet.row.Evaluation``."""

    @property
    def objective(self) -> Objective: ...

    def read(self, model: nn.Module) -> tuple[dict[str, Any], Any]: ...

    def compare(self, before: Any, after: Any) -> dict[str, Any]: ...

    def identity(self) -> dict[str, Any]:
        """Of what it judges by: rows of another one are not mixed with its own."""


@dataclass(frozen=True)
class FunctionJudge:
    """A plain function of a module; ``objective`` is one of the numbers that it returns."""

    function: Callable[[nn.Module], Mapping[str, float]]
    objective: Objective

    def read(self, model: nn.Module) -> tuple[dict[str, Any], Any]:
        found = {name: float(value) for name, value in self.function(model).items()}
        if self.objective.key not in found:
            raise UserError(
                f"objective = {self.objective.key}: evaluate returns {', '.join(found) or 'none'}"
            )
        return found, None

    def compare(self, before: Any, after: Any) -> dict[str, Any]:
        return {}

    def identity(self) -> dict[str, Any]:
        return {}


class ModuleEvaluation:
    """A judge, and what calls of the model cost. ``inputs``: batches on the model's device."""

    throughput = "items_per_second"

    def __init__(self, judge: Judge, model: nn.Module, inputs: Sequence[Any], repeats: int) -> None:
        self.judge, self.objective, self.repeats = judge, judge.objective, repeats
        self._model, self._many = model, inputs[0]
        self._one = _first_item(inputs[0])

    @cached_property
    def traffic(self) -> Traffic:
        return traffic_of(self._model, self._one)

    def read(self, made: Kept, name: str) -> tuple[dict[str, Any], Any]:
        with torch.no_grad(), _precision(made):
            return self.judge.read(made.module)

    def compare(self, before: Any, after: Any) -> dict[str, Any]:
        return self.judge.compare(before, after)

    def calls(self, made: Kept) -> Calls:
        def call(inputs: Any) -> Callable[[], object]:
            args, kwargs = arguments(inputs)

            def forward() -> None:
                with torch.no_grad(), _precision(made):
                    made.module(*args, **kwargs)

            return forward

        return Calls(call(self._one), call(self._many), _num_items(self._many))


def run(
    model: nn.Module,
    inputs: Iterable[Any],
    evaluate: Judge | Callable[[nn.Module], Mapping[str, float]],
    *,
    folder: str | Path,
    objective: Objective | None = None,
    variants: Sequence[str] | None = None,
    keep: Collection[str] = (),
    files: Mapping[str, str | Path] = NO_FILES,
    repeats: int = 5,
) -> list[Row]:
    """A row per variant; ``folder`` gets results.json, REPORT.md, summary.json and pictures.

    ``model``: float32, anything whose matrices go through ``F.linear``; it is not changed.
    ``inputs``: batches to calibrate on, each a tensor, a tuple or a mapping of them, items along
    the first dimension. ``evaluate``: a function of a module, with ``objective`` naming one of its
    numbers, or a labelled task. ``variants``: globs of rows, None: all. ``keep``: globs of
    parameters or modules that stay bit for bit. ``files``: name of a row -> a ``.qat`` file of the
    same model, as ``QatModel.save`` writes it. What is in ``folder`` already is not measured again.
    UserError says in a line what is wrong, before long work.
    """
    batches = [_without_grad(batch) for batch in inputs]
    if not batches:
        raise UserError("inputs: there are none; give some batches that the model is called with")
    judge: Judge
    if not callable(evaluate):
        judge = evaluate
    elif objective is None:
        raise UserError("objective = None: name the number of evaluate that variants are for")
    else:
        judge = FunctionJudge(evaluate, objective)
    with layer_by_layer():
        return _run(model, batches, judge, Path(folder), variants, keep, files, repeats)


def _run(
    model: nn.Module,
    batches: list[Any],
    judge: Judge,
    folder: Path,
    variants: Sequence[str] | None,
    keep: Collection[str],
    files: Mapping[str, str | Path],
    repeats: int,
) -> list[Row]:
    texts = [*batches, *getattr(judge, "batches", ())]  # to calibrate on, and of a labelled task
    check_positions(model, texts)
    frozen = Frozen.of_module(model, batches, keep)
    check_same_twice(frozen.module, batches[0])
    more = [file_variant(name, Path(path), frozen) for name, path in files.items()]
    chosen = choose_variants(frozen, more, variants)
    same = {
        "weights_sha256": digest_of(frozen.weights),
        "inputs_sha256": digest_of(_named(texts)),
        "kept": sorted(frozen.kept),
    } | judge.identity()
    manifest = claim(folder, same, judge.objective)
    evaluation = ModuleEvaluation(judge, frozen.module, batches, repeats)
    return measure_all(folder, manifest, chosen, Bench(evaluation, float_kept(frozen)))


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Without the kernels of ``nn.TransformerEncoderLayer`` that go past its layers, and so past
    those that a library puts there."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def check_positions(model: nn.Module, batches: Iterable[Any]) -> None:
    """UserError for texts that are longer than a Hugging Face model has positions."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for number, batch in enumerate(batches, start=1):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if most is not None and isinstance(ids, Tensor) and ids.size(-1) > most:
            raise UserError(
                f"inputs: batch {number} has texts of {ids.size(-1)} tokens, the model's positions "
                f"end at {most}: cut them"
            )


@torch.no_grad()
def check_same_twice(model: nn.Module, inputs: Any) -> None:
    """UserError for outputs that are not finite, or are others the second time."""
    args, kwargs = arguments(inputs)
    first, second = (
        [leaf for leaf in pytree.tree_leaves(_plain(model(*args, **kwargs)))
         if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for _ in range(2)
    )  # fmt: skip
    for one, other in zip(first, second, strict=True):
        if not one.isfinite().all():
            raise UserError("model: its outputs hold NaN or infinity on the first of the inputs")
        if not torch.allclose(one, other, rtol=SAME_RTOL, atol=SAME_ATOL):
            raise UserError(
                "model: it gives other outputs for the same inputs (noise or dropout that eval() "
                "does not end): its variants could not be compared"
            )


def _plain(output: Any) -> Any:
    """Outputs of transformers are mappings of their own class."""
    return dict(output) if isinstance(output, Mapping) else output


def _precision(made: Kept) -> torch.autocast:
    device = next(made.module.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=made.precision == "bf16")


def _tensors(inputs: Any) -> dict[str, Tensor]:
    args, kwargs = arguments(inputs)
    named = {str(at): arg for at, arg in enumerate(args)} | kwargs
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _named(batches: Sequence[Any]) -> dict[str, Tensor]:
    return {
        f"{at}.{name}": tensor
        for at, batch in enumerate(batches)
        for name, tensor in _tensors(batch).items()
    }


def _num_items(inputs: Any) -> int:
    return max(len(tensor) for tensor in _tensors(inputs).values() if tensor.dim())


def _mapped(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    def of(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    if isinstance(inputs, Mapping):
        return {name: of(value) for name, value in inputs.items()}
    return tuple(map(of, inputs)) if isinstance(inputs, tuple) else of(inputs)


def _without_grad(inputs: Any) -> Any:
    return _mapped(inputs, Tensor.detach)


def _first_item(inputs: Any) -> Any:
    count = _num_items(inputs)
    return _mapped(
        inputs, lambda tensor: tensor[:1] if tensor.dim() and len(tensor) == count else tensor
    )
