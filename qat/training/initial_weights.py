"""The weights of ``model.init_from``, wherever they come from.

    a run's folder        its float weights: the average, if it stored one
    FILE.ckpt             those of a run's checkpoint, or of any torch file
    FILE.qat              those that the file gives back
    FILE.safetensors      tensors by name
    FILE.pt, FILE.pth     a state dict, also as ``model`` or ``state_dict`` of something larger
    a Llama's folder      as Hugging Face writes it, whole or in parts that an index names

Nothing of a file is executed. What says which model it is of has to agree also in what tensors do
not show (heads, constants); prefixes that wrappers leave on names (PREFIXES) are taken off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch
import yaml
from torch import Tensor

from qat.artifact.container import read_artifact, read_header_of
from qat.errors import UserError
from qat.model.registry import architecture_of
from qat.model.spec import ModelSpec
from qat.settings.schema import DataSettings
from qat.text.tokenizer import Tokenizer
from qat.training.checkpoint import MARKS, tensors_to_store
from qat.training.llama_config import metadata_of, spec_at

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
RUN, CHECKPOINT = "config.yaml", "checkpoint.ckpt"  # of a run's folder
SETTING = "model.init_from"
TOKENIZER = "tokenizer_sha256"  # of the metadata
WRAPPED = ("model", "state_dict")
PREFIXES = ("_orig_mod.", "module.", "model.")  # of torch.compile, DDP, LightningModule


class Held(NamedTuple):
    """What a file or folder holds."""

    weights: dict[str, Tensor]
    tokenizer_sha256: str | None = None  # if it says so


def spec_of_source(path: Path) -> ModelSpec | None:
    """What it says of its model; None of a file that says nothing. ValueError: what this program
    has no model for. OSError, and UserError of a damaged .qat."""
    config = path / RUN if path.is_dir() else path.with_name(RUN)
    try:
        if (path.is_dir() or path.suffix == ".ckpt") and config.is_file():
            said = yaml.safe_load(config.read_text("utf-8"))["model"]
            return ModelSpec.from_json({f.name: said[f.name] for f in fields(ModelSpec)})
        if path.suffix == ".qat" and path.is_file():
            meta = read_header_of(path, f"{SETTING}={path}").meta  # of an own loop it says nothing
            return ModelSpec.from_json(meta["model"]) if meta else None
    except (LookupError, TypeError, ArithmeticError, yaml.YAMLError) as error:
        raise ValueError(f"it describes no model ({type(error).__name__}: {error})") from None
    return spec_at(path)


def data_of_source(path: Path) -> dict[str, Any]:
    """The settings ``data.*`` of the run that it is of; {} of anything else."""
    config = path / RUN if path.is_dir() else path.with_name(RUN)
    if not (path.is_dir() or path.suffix == ".ckpt") or not config.is_file():
        return {}
    try:
        said = yaml.safe_load(config.read_text("utf-8"))["data"]
        return {f.name: said[f.name] for f in fields(DataSettings) if f.name != "cache_dir"}
    except (LookupError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"its {RUN} is damaged ({type(error).__name__}: {error})") from None


def initial_weights(
    path: Path,
    spec: ModelSpec,
    expected: Mapping[str, Tensor],
    tokenizer: Tokenizer | None = None,
) -> dict[str, Tensor]:
    """Name -> float32 tensor. ValueError says in what they are not ``expected``, of ``spec``;
    UserError that they say to be of another vocabulary than ``tokenizer``."""
    try:
        held = _of_folder(path) if path.is_dir() else _of_file(path)
        _check_tensors(held.weights)
        found, source = _without_prefix(held.weights, expected), spec_of_source(path)
    except OSError as error:
        raise ValueError(error.strerror or error) from None
    except RecursionError:  # of an index
        raise ValueError("it is nested too deep") from None
    for name in [*expected, *found]:
        if name not in found:
            raise ValueError(f"it has no {name}")
        if name not in expected:
            raise ValueError(f"the model has no {name}")
        if found[name].shape != expected[name].shape:
            shapes = tuple(found[name].shape), tuple(expected[name].shape)
            raise ValueError(f"{name} is {shapes[0]}, in the model {shapes[1]}")
        if not found[name].is_floating_point():
            raise ValueError(f"{name} is of {found[name].dtype}, no float")
        found[name] = found[name].float()
        if not found[name].isfinite().all():
            raise ValueError(f"{name} is not finite")
    asked = _sizes(spec)
    for size, value in _sizes(source).items() if source else ():
        if asked.get(size) != value:
            raise ValueError(f"its {size} is {value}, in the model {asked.get(size)}")
    if tokenizer is not None and held.tokenizer_sha256 not in (None, tokenizer.sha256):
        raise UserError(
            f"{SETTING}={path}: trained with another tokenizer than {tokenizer.path}; "
            "give its own by data.tokenizer, and shards made with it"
        )
    return found


def _check_tensors(found: Mapping[Any, Any]) -> None:
    """ValueError if they are not names and tensors that hold numbers."""
    for name, w in found.items():
        if not isinstance(name, str) or not isinstance(w, Tensor):
            raise ValueError("not a dict of name -> tensor")
        if w.layout != torch.strided or w.is_meta or w.is_quantized:
            raise ValueError(f"{name} is no plain tensor")


def _without_prefix(found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        is_wrapped = all(name.startswith(prefix) for name in found)
        if is_wrapped and not found.keys() & expected.keys():
            found = {name.removeprefix(prefix): w for name, w in found.items()}
    return found


def _sizes(spec: ModelSpec) -> dict[str, Any]:
    """All that fixes a model; what ``mlp_mult`` did is seen from the tensors."""
    sizes = asdict(spec)
    del sizes["mlp_mult"]
    own = getattr(architecture_of(spec), "sizes_of", None)
    return sizes | sizes.pop("more") | (own(spec) if own else {})


def _of_file(path: Path) -> Held:
    if path.suffix == ".safetensors":
        return Held(_of_safetensors(path), metadata_of(path).get(TOKENIZER))
    if path.suffix == ".qat":
        artifact = read_artifact(path, f"{SETTING}={path}")
        return Held(artifact.weights, artifact.meta.get(TOKENIZER))
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except UnpicklingError:  # torch's advice here is how to load it without a check
        raise ValueError("it holds more than tensors, or is no torch file") from None
    except Exception as error:  # torch raises many kinds for a file that it did not write
        if not is_zipfile(path):
            raise ValueError("torch did not write it") from None
        raise ValueError(str(error).strip().split("\n")[0][:120]) from None
    if isinstance(found, dict) and found.keys() >= MARKS:
        try:
            data = found.get("identity", {}).get("data", {})
            return Held(tensors_to_store(found)[0], data.get("tokenizer"))
        except (LookupError, TypeError, AttributeError):
            raise ValueError("a checkpoint, but none of this version") from None
    wrapped = [found[key] for key in WRAPPED if isinstance(found, dict) and key in found]
    found = next((inner for inner in wrapped if isinstance(inner, dict)), found)
    if not isinstance(found, dict):
        raise ValueError("not a dict of name -> tensor")
    return Held(found)


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _of_folder(folder: Path) -> Held:
    if (folder / RUN).is_file():
        return _of_file(folder / CHECKPOINT)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text("utf-8"))
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not all(isinstance(p, str) for p in names.values()):
            raise ValueError(f"its {INDEX} names no files")
        parts = list(names.values())
    elif (folder / WHOLE).is_file():
        parts = [WHOLE]
    else:
        raise ValueError(f"it is no run, and has neither {WHOLE} nor {INDEX}")
    found: dict[str, Tensor] = {}
    for part in dict.fromkeys(parts):
        if Path(part).name != part:
            raise ValueError(f"its index names {part!r:.80}, which is not in it")
        found |= _of_safetensors(folder / part)
    # Of old versions: what the sizes say, and a tied head once more.
    found = {n: w for n, w in found.items() if not n.endswith(".rotary_emb.inv_freq")}
    if HEAD in found and EMBEDDING in found and torch.equal(found[HEAD], found[EMBEDDING]):
        del found[HEAD]
    is_whole = (folder / WHOLE).is_file()
    return Held(found, metadata_of(folder / WHOLE).get(TOKENIZER) if is_whole else None)
