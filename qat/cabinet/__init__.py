"""Every post-training method as a variant of one frozen model: what QAT has to beat.

from qat import cabinet
rows = cabinet.run(model, inputs, evaluate, keep=["classifier*"], folder="cabinet")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.cabinet.any_model import run as run


def __getattr__(name: str) -> Any:
    """Imported when asked for: pictures of studies need none of it."""
    if name != "run":
        raise AttributeError(f"module 'qat.cabinet' has no attribute {name!r}")
    return import_module("qat.cabinet.any_model").run
