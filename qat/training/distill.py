"""Distillation onto the grid: from the switch on, part of the target is a float teacher's.

    loss = (1 - weight) * cross-entropy + weight * temperature^2 * KL(teacher || student)

in nats, the mean over tokens; both distributions are softmax(logits / temperature), and the square
keeps gradients of one size (Hinton et al., arXiv 1503.02531). The teacher is the float weights at
the switch, or a trained model that is handed in (QAD: arXiv 2601.20088).

Until the switch the model computes its own loss, in the graph of a run without a teacher. The graph
with one is another, made off the clock before the first update. The teacher's forward pass is on
the clock. Logits of a micro-batch are held whole, the teacher's and the student's; the checks of
the settings bound them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.compiled import compiled
from qat.model.registry import empty_model
from qat.model.spec import ModelSpec
from qat.training.loop import Batch, TrainingLoop, UpdateHook

log = logging.getLogger("qat")
Weights = dict[str, Tensor]


class Teacher(NamedTuple):
    """A trained model; float32 weights."""

    spec: ModelSpec
    weights: Weights


def logits_of(model: nn.Module) -> Callable[[Weights, Tensor], Tensor]:
    """The logits (B, T, V) of a module of this kind for weights and ids."""

    def logits(weights: Weights, ids_BT: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (ids_BT,))

    return logits


def distilled_loss(
    logits_BTV: Tensor, targets_BT: Tensor, teacher_BTV: Tensor, weight: float, temperature: float
) -> Tensor:
    """The loss above, in nats. Logits are float32."""
    student, teacher = logits_BTV.flatten(0, 1), teacher_BTV.flatten(0, 1)
    hard = F.cross_entropy(student, targets_BT.flatten())
    soft = F.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    return (1.0 - weight) * hard + weight * temperature**2 * soft


class Distillation(UpdateHook):
    """The loss with a teacher, and the teacher.

    ``model``: a module of the student's kind; its own weights are not looked at. ``spec``: of it,
    where graphs are compiled, which runs of this process then share.
    """

    name = "distillation"

    def __init__(
        self,
        weight: float,
        temperature: float,
        model: nn.Module,
        spec: ModelSpec | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self._is_given = teacher is not None
        self._weights: Weights = {} if teacher is None else teacher.weights

        def student_loss(
            student: Callable[[Weights, Tensor], Tensor],
        ) -> Callable[[Weights, Tensor, Tensor, Tensor], Tensor]:
            return lambda weights, ids, targets, wanted: distilled_loss(
                student(weights, ids), targets, wanted, weight, temperature
            )

        self._teacher_logits = logits_of(model if teacher is None else empty_model(teacher.spec))
        self._student_loss = student_loss(logits_of(model))
        if spec is not None:
            of = spec if teacher is None else teacher.spec
            self._teacher_logits = compiled(("logits", of), lambda: logits_of(empty_model(of)))
            self._student_loss = compiled(
                ("distilled loss", spec, weight, temperature),
                lambda: student_loss(logits_of(empty_model(spec))),
            )

    def loss(self, weights: Weights, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """As a ``LossFunction``; there must be a teacher."""
        with torch.no_grad():
            wanted = self._teacher_logits(self._weights, ids_BT)
        return self._student_loss(weights, ids_BT, targets_BT, wanted)

    def prime(self, loop: TrainingLoop) -> None:
        self._weights = {name: w.to(loop.device) for name, w in self._weights.items()}
        held = sum(p.numel() * p.element_size() for p in loop.masters.values())
        if self._is_given:
            held = sum(w.numel() * w.element_size() for w in self._weights.values())
        log.info("distillation: the teacher's weights take %s bytes more memory", f"{held:,}")

    def first_batch(self, loop: TrainingLoop, batch: Batch) -> None:
        if not loop.schedule.asks_for_qat:
            return
        is_new = not self._weights
        if is_new:
            self._take(loop)
        weights = {name: p.detach().requires_grad_() for name, p in loop.masters.items()}
        loop.loss(weights, *batch, is_on=True).backward()
        if is_new:
            self._weights = {}

    def at_switch(self, loop: TrainingLoop) -> None:
        if not self._is_given:
            self._take(loop)

    def _take(self, loop: TrainingLoop) -> None:
        self._weights = {name: p.detach().clone() for name, p in loop.masters.items()}

    def state(self) -> dict[str, Any] | None:
        return None if self._is_given or not self._weights else dict(self._weights)

    def load_state(self, state: Mapping[str, Any], loop: TrainingLoop) -> None:
        self._weights = dict(state)
