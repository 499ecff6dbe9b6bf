"""QAT in anybody's own loop: a module that computes with the weights its file will hold.

    plan = Plan.for_model(model, Grid(bits=6), keep=["lm_head*"])
    model = QatModel(model, plan)
    model.qat(True)            # from now on forward passes see snapped weights
    ...                        # the loop as it was
    model.save("model.qat")
    weights = load("model.qat")

The wrapped module's parameters stay what they are, the masters that optimizers move; the weights it
computes with are handed to it (``torch.func.functional_call``). Masters are snapped again when one
of them has changed since the last forward pass, which their version counters tell: after any
optimizer's step, a load of a state dict, an assignment in place; so once an update, however many
forward passes that has. Who writes through ``parameter.data`` calls ``refresh`` himself.

Left out: masters of another dtype than float32 (mixed precision is autocast's, around the call),
and modules that read their weights behind torch's back: ``liveness`` names those.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.artifact.container import pack, read_artifact, write_whole
from qat.quantize.gradients import GradientRule
from qat.quantize.plan import Plan
from qat.quantize.switch import QatSwitch, on_grid_share

CODER = "zlib"  # needs nothing beside Python; ``mix`` makes the smallest files


class Liveness(NamedTuple):
    """Whether QAT happens. Shares are of the elements that the plan puts on a grid."""

    is_on: bool
    num_snaps: int  # so often were masters snapped since QAT was switched on
    on_grid_share: float  # of weights as a forward pass sees them: 1.0 while QAT is on
    unused: list[str]  # weights that no module held when it was called on the inputs given
    without_gradient: list[str]  # tensors on a grid whose gradient is missing or all zero


class QatModel(nn.Module):
    """``model`` with a switch. Called as ``model`` is, in training and in evaluation mode.

    ``plan`` names every parameter of the model (``Plan.for_model``). ``gradient``: the rule by
    which gradients get back to the masters, by name or made by ``make_rule``; rules that draw
    numbers draw by ``seed``. ``fused`` snaps in one compiled pass: the same bits, sooner, where
    there is a compiler. ValueError for a plan of other tensors, a rule that does not suit its
    grids, or masters that are not float32.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        gradient: str | GradientRule = "identity",
        seed: int = 0,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.plan = model, plan
        self.switch = QatSwitch(plan, gradient, seed, fused)
        masters = self.masters
        odd = sorted(masters.keys() ^ plan.entries.keys())
        if odd:
            raise ValueError(f"{odd[0]}: the plan and the model do not name the same tensors")
        for name, master in masters.items():
            if tuple(master.shape) != plan.entries[name].shape:
                raise ValueError(f"{name}: the plan has another shape than the model")
            if master.dtype != torch.float32:
                raise ValueError(f"{name} is {master.dtype}: masters are float32, model.float()")
        self._is_on = False
        self._num_snaps = 0
        self._snapped: tuple[tuple[int, int], ...] = ()  # what was snapped last
        self._was_pulled = True  # ``before_update`` was called for the update that comes

    @property
    def masters(self) -> dict[str, nn.Parameter]:
        """Parameters of the wrapped module by name; a tied one has one name."""
        return dict(self.model.named_parameters())

    def qat(self, is_on: bool = True) -> QatModel:
        """Switch; the next forward pass computes accordingly."""
        if is_on != self._is_on:
            self._is_on, self._num_snaps, self._snapped = is_on, 0, ()
            self.switch.refresh(self.masters, False)
        return self

    @property
    def is_on(self) -> bool:
        return self._is_on

    def refresh(self, step: int | None = None, progress: float = 0.0, blend: float = 1.0) -> None:
        """Snap the masters as they are now; with QAT off nothing is computed.

        ``step`` seeds noise (default: a count), ``progress`` (0 to 1) anneals soft rounding,
        ``blend`` mixes masters (0) and snapped weights (1).
        """
        seed = self._num_snaps if step is None else step
        # A loop may evaluate first; what inference mode makes cannot be trained on.
        with torch.inference_mode(False), torch.no_grad(), self._exact():
            self.switch.refresh(self.masters, self._is_on, seed, progress, blend)
        if self._is_on:
            self._num_snaps += 1
            self._snapped = self._versions()
            self._was_pulled = not self.switch.gradient.pulls

    def before_update(self, rate: float, progress: float = 1.0) -> None:
        """What some gradient rules do beside the loss (``pulls``): call it between ``backward()``
        and the optimizer's step. ``rate`` is the optimizer's learning rate, ``progress`` runs from
        0 at the switch to 1."""
        masters = self.masters
        self.switch.before_update(masters, dict.fromkeys(masters, rate), progress)
        if self._is_on:
            self._snapped, self._was_pulled = (), True

    def _versions(self) -> tuple[tuple[int, int], ...]:
        return tuple((id(p), p._version) for p in self.parameters())

    @torch.compiler.disable  # eager, so that a compiled caller sees plain inputs, QAT on or off
    def weights(self) -> dict[str, Tensor]:
        """Name -> weight as the next forward pass sees it; gradients pass on to the masters."""
        if self._is_on and self._snapped != self._versions():
            if self._snapped and not self._was_pulled:
                raise RuntimeError(
                    "this gradient rule does something beside the loss: call "
                    "before_update(learning_rate) after backward() and before the optimizer's step"
                )
            self.refresh()
        return self.switch.weights(self.masters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.model, self.weights(), args, kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._snapped = ()  # a copy has parameters of its own

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "is_on": self._is_on,
            "num_snaps": self._num_snaps,
            "has_scales": bool(self.switch.learned_scales),
            "gradient_rule": self.switch.gradient.state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.qat(state["is_on"])
        self._num_snaps, self._snapped = state["num_snaps"], ()  # its masters are loaded as well
        self.switch.has_scales = state["has_scales"]
        self.switch.gradient.load_state(state["gradient_rule"])

    def snapped(self) -> dict[str, Tensor]:
        """Name -> the weight that a file written now gives back, QAT on or off."""
        with self._exact():
            return self.plan.snap(self.masters, self.switch.learned_scales)

    def _exact(self) -> torch.autocast:
        """Weights are snapped in float32, also inside somebody's autocast."""
        return torch.autocast(next(self.parameters()).device.type, enabled=False)

    def liveness(self, *args: Any, **kwargs: Any) -> Liveness:
        """What the next forward pass sees; given inputs, one is made, and modules are watched."""
        weights = {name: w.detach() for name, w in self.weights().items()}
        seen: Mapping[str, Tensor] = weights
        unused: list[str] = []
        if args or kwargs:
            seen = weights_seen(self.model, weights, *args, **kwargs)
            unused = not_seen(weights, seen)
        masters = self.masters
        share = on_grid_share(seen, masters, self.plan, self.switch.learned_scales)
        dead = [
            entry.name
            for entry in self.plan.on_grid
            if (gradient := masters[entry.name].grad) is None or not gradient.any()
        ]
        return Liveness(self._is_on, self._num_snaps, share, unused, dead)

    def save(self, path: str | Path, coder: str = CODER) -> int:
        """Write the weights on their grids into a file; its bytes.

        ``coder``: zlib, or a stronger one that is installed (``mix``, ``constriction``, ...).
        ValueError names a tensor that is not finite; the file appears whole or not at all.
        """
        encoded = self.plan.encode(self.masters, self.switch.learned_scales)
        data = pack(encoded, self.plan, {}, coder)
        write_whole(Path(path), data)
        return len(data)


def load(path: str | Path) -> dict[str, Tensor]:
    """Name -> float32 weight of a file: the bits that a forward pass with QAT on computed with.

    ``module.load_state_dict(load(path), strict=False)`` puts them into a plain module.
    ``qat.errors.UserError`` says in a line what is wrong with a file; nothing in it is executed.
    """
    return read_artifact(Path(path)).weights


@torch.no_grad()
def weights_seen(
    model: nn.Module, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    """Run ``model`` with ``weights``; each parameter as its own module held it when called."""
    seen: dict[str, Tensor] = {}

    def record(prefix: str):
        def hook(module: nn.Module, _inputs: object) -> None:
            for name, parameter in module.named_parameters(prefix, recurse=False):
                seen[name] = parameter.detach()

        return hook

    handles = [m.register_forward_pre_hook(record(name)) for name, m in model.named_modules()]
    try:
        torch.func.functional_call(model, dict(weights), args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def not_seen(weights: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights that were handed in and that no module held when it was called."""
    return [n for n, w in weights.items() if n not in seen or not torch.equal(seen[n], w)]
