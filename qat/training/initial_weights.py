"""The weights of ``model.init_from``: a torch file or a .safetensors file of name -> tensor, or a
Llama's folder as Hugging Face writes it (whole, or in parts that an index names).

Nothing of a file is executed. The last two may say which model they are of; then what tensors do
not show (heads, constants) has to agree as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor

from qat.errors import UserError
from qat.model.hugging_face import metadata_of, spec_at
from qat.model.registry import architecture_of
from qat.model.spec import ModelSpec
from qat.text.tokenizer import Tokenizer

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENIZER = "tokenizer_sha256"  # of the metadata


def initial_weights(
    path: Path, spec: ModelSpec, expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Name -> float32 tensor. ValueError says in what they are not ``expected``, of ``spec``."""
    try:
        found = _of_folder(path) if path.is_dir() else _of_file(path)
        source = spec_at(path)
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
    return found


def _sizes(spec: ModelSpec) -> dict[str, Any]:
    """All that fixes a model; what ``mlp_mult`` did is seen from the tensors."""
    sizes = asdict(spec)
    del sizes["mlp_mult"]
    own = getattr(architecture_of(spec), "sizes_of", None)
    return sizes | sizes.pop("more") | (own(spec) if own else {})


def _of_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except UnpicklingError:  # torch's advice here is how to load it without a check
        raise ValueError("it holds more than tensors, or is no torch file") from None
    except Exception as error:  # torch raises many kinds for a file that it did not write
        if not is_zipfile(path):
            raise ValueError("it is no file of torch's") from None
        raise ValueError(str(error).strip().split("\n")[0][:120]) from None
    if not isinstance(found, dict) or not all(isinstance(w, Tensor) for w in found.values()):
        raise ValueError("not a dict of name -> tensor")
    return found


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _of_folder(folder: Path) -> dict[str, Tensor]:
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text("utf-8"))
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not all(isinstance(p, str) for p in names.values()):
            raise ValueError(f"its {INDEX} names no files")
        parts = list(names.values())
    elif (folder / WHOLE).is_file():
        parts = [WHOLE]
    else:
        raise ValueError(f"it has neither {WHOLE} nor {INDEX}")
    found: dict[str, Tensor] = {}
    for part in dict.fromkeys(parts):
        if Path(part).name != part:
            raise ValueError(f"its index names {part!r:.80}, which is not in it")
        found |= _of_safetensors(folder / part)
    # Of old versions: what the sizes say, and a tied head once more.
    found = {n: w for n, w in found.items() if not n.endswith(".rotary_emb.inv_freq")}
    if HEAD in found and EMBEDDING in found and torch.equal(found[HEAD], found[EMBEDDING]):
        del found[HEAD]
    return found


def check_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """UserError if these weights, which can be read, say that they are of another vocabulary."""
    file = path / WHOLE if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        return
    if metadata_of(file).get(TOKENIZER, tokenizer.sha256) != tokenizer.sha256:
        raise UserError(
            f"model.init_from={path}: trained with another tokenizer than {tokenizer.path}; "
            "give its own by data.tokenizer, and shards made with it"
        )
