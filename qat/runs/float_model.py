"""The float weights of a run's checkpoint, for whoever compares them with a file of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qat.errors import UserError
from qat.evaluation.open_model import names_text
from qat.model.registry import tensor_shapes
from qat.model.spec import ModelSpec
from qat.runs.run_folder import read_config
from qat.runs.store_again import stored_tensors
from qat.settings.schema import DataSettings, TrainSettings, from_yaml
from qat.text.source import Source, from_settings
from qat.text.tokenizer import Tokenizer
from qat.training.build import spec_of

SUFFIX = ".ckpt"


@dataclass(frozen=True)
class FloatModel:
    spec: ModelSpec
    weights: dict[str, Tensor]
    settings: TrainSettings

    def open_text(self, data: DataSettings) -> tuple[Source, Tokenizer]:
        """The text that ``data`` names, else that of its run. UserError if it is not found, or of
        another vocabulary."""
        chosen = data if names_text(data) else self.settings.data
        source = from_settings(chosen, self.spec.vocab_size)
        tokenizer = Tokenizer(source.tokenizer)
        tokenizer.check_vocab_size(self.spec.vocab_size)
        return source, tokenizer


def open_float(checkpoint: Path, typed: str) -> FloatModel:
    """A checkpoint in the folder of its run. UserError naming ``typed`` if it is not usable."""
    yaml, _ = read_config(checkpoint.parent, typed.partition("=")[0])
    settings = from_yaml(yaml, typed)
    spec = spec_of(settings.model)
    weights, _ = stored_tensors(checkpoint)
    if {name: tuple(w.shape) for name, w in weights.items()} != tensor_shapes(spec):
        raise UserError(f"{typed}: {checkpoint} does not hold the weights of its run's model")
    return FloatModel(spec, {name: w.float() for name, w in weights.items()}, settings)
