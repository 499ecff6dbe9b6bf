"""Quantization-aware training whose simulated weights are, bit for bit, those of the file.

    from qat import Grid, Plan, QatModel, load

This much needs torch and numpy. The programs train.py and eval.py need ``qat[train]``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.qat_model import Liveness as Liveness
    from qat.qat_model import QatModel as QatModel
    from qat.qat_model import load as load
    from qat.quantize.grid import Grid as Grid
    from qat.quantize.plan import Plan as Plan

_HOMES = {
    "Grid": "qat.quantize.grid",
    "Plan": "qat.quantize.plan",
    "QatModel": "qat.qat_model",
    "Liveness": "qat.qat_model",
    "load": "qat.qat_model",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Imported when asked for: the programs' help must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qat' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
