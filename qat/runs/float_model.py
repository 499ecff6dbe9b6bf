"""The float weights of a run's checkpoint, for whoever compares them with a file of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from qat.errors import UserError
from qat.evaluation.open_model import OTHER_TOKENIZER, names_text
from qat.model.registry import tensor_shapes
from qat.model.spec import ModelSpec
from qat.runs.identity import CheckpointIdentity, check_same
from qat.runs.run_folder import read_config
from qat.runs.store_again import read_state
from qat.settings.schema import DataSettings, TrainSettings, from_yaml
from qat.text.shards import TokenStream
from qat.text.source import Source, from_settings
from qat.text.tokenizer import Tokenizer
from qat.training.build import spec_of
from qat.training.checkpoint import tensors_to_store

SUFFIX = ".ckpt"


@dataclass(frozen=True)
class FloatModel:
    spec: ModelSpec
    weights: dict[str, Tensor]
    settings: TrainSettings
    held: CheckpointIdentity | None  # by the checkpoint
    typed: str

    def open_text(self, data: DataSettings) -> tuple[Source, Tokenizer]:
        """The text that ``data`` names, else that of its run. UserError if it is not found, if it
        has changed, or if its vocabulary is another."""
        is_named = names_text(data)
        source = from_settings(data if is_named else self.settings.data, self.spec.vocab_size)
        tokenizer = Tokenizer(source.tokenizer)
        tokenizer.check_vocab_size(self.spec.vocab_size)
        val = TokenStream(source.val_files, "data.val_files")
        now = CheckpointIdentity.of(asdict(self.settings), source, tokenizer, {"val": val})
        if not is_named:
            check_same(self.typed, self.held, now)
        elif self.held and tokenizer.sha256 != self.held.data["tokenizer"]:
            raise UserError(f"data.tokenizer={tokenizer.path}: {OTHER_TOKENIZER}")
        return source, tokenizer


def open_float(checkpoint: Path, typed: str) -> FloatModel:
    """A checkpoint in the folder of its run. UserError naming ``typed`` if it is not usable."""
    yaml, _ = read_config(checkpoint.parent, typed.partition("=")[0])
    settings = from_yaml(yaml, typed)
    spec = spec_of(settings.model)
    state = read_state(checkpoint)
    weights, _ = tensors_to_store(state)
    if {name: tuple(w.shape) for name, w in weights.items()} != tensor_shapes(spec):
        raise UserError(f"{typed}: {checkpoint} does not hold the weights of its run's model")
    floats = {name: w.float() for name, w in weights.items()}
    return FloatModel(spec, floats, settings, CheckpointIdentity.held_by(state), typed)
