"""``final_model.int8.ptz``, the challenge's own artifact: read as untrusted data, and written.

The file is zlib over a ``torch.save`` of a dict (parameter-golf baseline, ``train_gpt.py``):

    __quant_format__         "int8_clean_per_row_v1"
    quantized                name -> int8 codes (rows, columns), of matrices over 65,536 elements
    scales                   name -> fp16 scales (rows,)
    dtypes                   name -> float type of the weight it was made from, and is again
    qmeta                    name -> {"scheme": "per_row", "axis": 0}; left out if empty
    passthrough              name -> fp16 of the other weights, fp32 of control vectors
    passthrough_orig_dtypes  name -> float type of a weight kept as fp16; left out if empty

A pickle is a program, so one is never simply loaded. The expansion is bounded; the zip inside must
be stored as is and no larger than it; its pickle may do nothing but what makes such a file, which
is seen without running it; ``torch.load`` reads it with ``weights_only``; and of what comes out
every type, shape and size is checked before anything is computed.

``weights_only`` alone is not enough: it runs no code of a file's choice, but it builds what the
file says. A tuple of itself twice, sixty times over, takes a kilobyte to write and for ever to
hash; a tuple nested a million deep overflows the stack. So the stack of the pickle is followed here
with the kind of each value in its place: a tuple may hold flat ones, nothing is used twice but
names and tensors, and keys are text or numbers.

This module is imported only where a .ptz is read or written: it is no part of scoring a .qat.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from qat.errors import UserError
from qat.quantize.grid import Grid
from qat.quantize.plan import Encoded, Entry, Plan
from qat.quantize.rounding import DTYPES, Codes

MAX_PICKLE_BYTES = 1 << 20  # the reference's own has some 100 a tensor
# Kinds of values on the stack. A flat tuple holds text, names and numbers alone.
TEXT, NUMBER, STORAGE_NAME, MAKES_DICT, MAKES_TENSOR, EMPTY, FLAT, NESTED = range(8)
CONTAINER, STORAGE, TENSOR = range(8, 11)
# What the pickle of such a file calls, by pickle's own names.
MAY_NAME = {
    "collections OrderedDict": MAKES_DICT, "torch._utils _rebuild_tensor_v2": MAKES_TENSOR,
    **dict.fromkeys(("torch CharStorage", "torch FloatStorage", "torch HalfStorage"), STORAGE_NAME),
}  # fmt: skip
PUSHES = {
    "BINUNICODE": TEXT, "EMPTY_TUPLE": EMPTY, "EMPTY_DICT": CONTAINER, "EMPTY_LIST": CONTAINER,
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "NEWTRUE", "NEWFALSE"), NUMBER),
}  # fmt: skip
MAY_REPEAT = (TEXT, *MAY_NAME.values(), TENSOR)
CALLS = {(MAKES_DICT, EMPTY): CONTAINER, (MAKES_TENSOR, NESTED): TENSOR}
TAKES = {  # how many values; 0: all from the mark on
    "TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3,
    "SETITEM": 2, "SETITEMS": 0, "APPEND": 1, "APPENDS": 0,
}  # fmt: skip
KEYS = {TEXT, NUMBER}
REFUSED = "its pickle does what no file of weights does: refused"


def check_pickle(program: bytes) -> None:
    """ValueError unless ``program`` makes what torch.save makes of dicts of tensors by name."""
    if len(program) > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle is longer than {MAX_PICKLE_BYTES} bytes")
    _check_names(program)
    try:
        if _result(program) != CONTAINER:
            raise ValueError(REFUSED)
    except LookupError:  # taken from an empty stack, or from no place of the memo
        raise ValueError(REFUSED) from None


def _check_names(program: bytes) -> None:
    try:
        for opcode, argument, _ in pickletools.genops(program):
            # STACK_GLOBAL and the like take the name from elsewhere; torch.save does not use them.
            if opcode.name == "GLOBAL" and argument in MAY_NAME:
                continue
            if "GLOBAL" in opcode.name or opcode.name in ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
                raise ValueError(f"it would run {str(argument or opcode.name)[:80]!r}: refused")
            if opcode.name.startswith("EXT"):
                raise ValueError("it would run code of an extension: refused")
    except ValueError:
        raise
    except Exception as error:  # pickletools has many for damage, none of them named
        raise ValueError(f"it holds no torch file: {error}") from None


# Not weights_only and a bound on size: a tuple nested or doubled within it is built and hashed.
def _result(program: bytes) -> int:
    """The kind of what the program leaves; ValueError or LookupError at what none may do."""
    stacks: list[list[int]] = [[]]  # a mark begins another
    memo: dict[int, int] = {}
    for opcode, argument, _ in pickletools.genops(program):
        name, value, stack = opcode.name, cast(Any, argument), stacks[-1]
        if name in PUSHES:
            stack.append(PUSHES[name])
        elif name == "GLOBAL":
            stack.append(MAY_NAME[value])
        elif name == "MARK":
            stacks.append([])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET") and memo[value] in MAY_REPEAT:
            stack.append(memo[value])
        elif name == "BINPERSID" and stack.pop() == FLAT:
            stack.append(STORAGE)
        elif name == "REDUCE":
            stack.append(CALLS[stack.pop(-2), stack.pop()])
        elif name in TAKES:
            count = TAKES[name]
            parts = [stack.pop() for _ in range(count)][::-1] if count else stacks.pop()
            is_tuple = name.startswith("TUPLE")
            has_odd_key = name.startswith("SET") and set(parts[::2]) - KEYS
            if has_odd_key or (NESTED in parts if is_tuple else stacks[-1][-1] != CONTAINER):
                raise ValueError(REFUSED)
            if is_tuple:
                stacks[-1].append(NESTED if set(parts) - {TEXT, NUMBER, STORAGE_NAME} else FLAT)
        elif name == "STOP" and len(stacks) == len(stack) == 1:
            return stack[0]
        elif name != "PROTO":
            raise ValueError(REFUSED)
    raise ValueError(REFUSED)


FORMAT = "int8_clean_per_row_v1"
GOLF_GRID = Grid(bits=8, scale_rule="percentile", scale_floor=1 / 127, code_scale_dtype="fp32")
PER_ROW = {"scheme": "per_row", "axis": 0}
SECTIONS = ("quantized", "scales", "dtypes", "passthrough")
OPTIONAL_SECTIONS = ("qmeta", "passthrough_orig_dtypes")
MAX_RAW_BYTES = 256_000_000  # of the expanded file: 15 times what fits the challenge's limit
ZLIB_LEVEL = 9
STORED_AS = {torch.float16: "fp16", torch.float32: "fp32"}
TYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class GolfFile:
    """A file read back: its plan (codes on the golf grid, or plain floats) and float32 weights."""

    plan: Plan
    weights: dict[str, Tensor]
    num_bytes: int


def read_golf_file(path: Path) -> GolfFile:
    """Read, check and decode a file. UserError names the file and what is wrong with it."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_RAW_BYTES + 1)
    except OSError as error:
        raise UserError(f"artifact={path}: {error.strerror or error}") from None
    try:
        return unpack_golf(data)
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"artifact={path}: not a readable .ptz file ({reason})") from None


def unpack_golf(data: bytes) -> GolfFile:
    """The inverse of ``pack_golf``, up to the float type named in ``dtypes``. ValueError says why
    the data is refused."""
    if len(data) > MAX_RAW_BYTES:
        raise ValueError(f"it is longer than {MAX_RAW_BYTES} bytes")
    raw = _expand(data)
    items = _items(_load(raw))
    stored = [part for item, _ in items for part in (item.coded or item.floats)]
    # Tensors may share a storage, and a file of one weight could name it a million times.
    if sum(part.nbytes for part in stored if part is not None) > len(raw):
        raise ValueError("its tensors are larger than the file")
    weights = {}
    for item, type_name in items:
        name = item.entry.name
        weights[name] = item.decode().to(TYPE_NAMES[type_name]).float()
        if not torch.isfinite(item.floats[0]).all() or not torch.isfinite(weights[name]).all():
            raise ValueError(f"tensor {_label(name)} has a value that is not finite")
    return GolfFile(Plan([item.entry for item, _ in items]), weights, len(data))


def pack_golf(encoded: list[Encoded]) -> bytes:
    """The whole file as bytes. ValueError names a tensor that such a file has no place for.

    The reference keeps its token embedding in bfloat16 and says so in ``dtypes``; here masters are
    float32, and the file says that, so that its reader gives back the weights that were scored.
    """
    names = (*SECTIONS, *OPTIONAL_SECTIONS)
    content: dict[str, dict[str, Any]] = {name: {} for name in names}
    for item in encoded:
        name = item.entry.name
        if item.coded is not None:
            if item.entry.grid != GOLF_GRID or len(item.entry.shape) != 2:
                raise ValueError(f"tensor {name} is not on the grid int8_golf, row by row")
            # A clone owns just its own bytes; torch.save would write all of a shared storage.
            content["quantized"][name] = item.coded.codes.clone()
            content["scales"][name] = item.coded.scales[:, 0].clone()
            content["dtypes"][name] = "float32"
            content["qmeta"][name] = dict(PER_ROW)
        else:
            (floats,) = item.floats
            if floats.dtype not in STORED_AS:
                raise ValueError(f"tensor {name} is stored as {item.entry.dtype}, not fp16 or fp32")
            content["passthrough"][name] = floats.clone()
            if floats.dtype == torch.float16:
                content["passthrough_orig_dtypes"][name] = "float32"
    kept = {key: part for key, part in content.items() if part or key in SECTIONS}
    raw = io.BytesIO()
    torch.save({"__quant_format__": FORMAT, **kept}, raw)
    if raw.tell() > MAX_RAW_BYTES:
        raise ValueError(f"{raw.tell()} bytes before compression, of at most {MAX_RAW_BYTES}")
    return zlib.compress(raw.getvalue(), ZLIB_LEVEL)


def _expand(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(data, MAX_RAW_BYTES + 1)
    except zlib.error as error:
        raise ValueError(f"damaged, or not zlib at all: {error}") from None
    if len(raw) > MAX_RAW_BYTES:
        raise ValueError(f"it expands to more than {MAX_RAW_BYTES} bytes")
    if not stream.eof:
        raise ValueError("its zlib data ends early: truncated")
    if stream.unused_data:
        raise ValueError("bytes left over after its zlib data")
    return raw


def _load(raw: bytes) -> dict[str, Any]:
    """The dict in a torch file. Nothing in it runs: what its pickle names is looked at before."""
    checked = _checked_zip(raw)
    try:
        content = torch.load(checked, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's advice here is how to load it without a check
        raise ValueError("its pickle does what no file of weights does: refused") from None
    except Exception as error:  # torch raises many kinds for a file that it did not write
        reason = str(error).strip().split("\n")[0][:120]
        raise ValueError(f"torch cannot read it: {reason}") from None
    if not isinstance(content, dict) or content.get("__quant_format__") != FORMAT:
        raise ValueError(f"it does not say __quant_format__ = {FORMAT}")
    content = {key: part for key, part in content.items() if key != "__quant_format__"}
    parts = {name: content.pop(name, {}) for name in OPTIONAL_SECTIONS}
    if set(content) != set(SECTIONS):
        raise ValueError(f"it does not consist of {', '.join(SECTIONS)}")
    parts |= content
    for key, part in parts.items():
        if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
            raise ValueError(f"its {key} is not a dict by tensor name")
    return parts


def _checked_zip(raw: bytes) -> io.BytesIO:
    """``raw`` written anew, so that torch, whose own reader might find another pickle in it, loads
    what was looked at. ValueError unless it is a zip without compression (an entry could expand
    a second time, past the bound of the first) whose pickle is that of a file of weights."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            entries = archive.infolist()
            is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not is_stored or sum(entry.file_size for entry in entries) > len(raw):
                raise ValueError("its zip expands further")
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or len({entry.filename for entry in entries}) != len(entries):
                raise ValueError("it holds no torch file")
            check_pickle(archive.read(pickles[0]))
            checked = io.BytesIO()
            with zipfile.ZipFile(checked, "w") as copy:
                for entry in entries:
                    copy.writestr(entry.filename, archive.read(entry))
    except ValueError:
        raise
    except Exception as error:  # zipfile has many for damage, none of them named
        raise ValueError(f"it holds no torch file: {error}") from None
    checked.seek(0)
    return checked


def _items(parts: Mapping[str, dict[str, Any]]) -> list[tuple[Encoded, str]]:
    """Tensors as an artifact holds them, each with the name of its float type."""
    quantized, passthrough = parts["quantized"], parts["passthrough"]
    if set(quantized) != set(parts["scales"]) or set(quantized) != set(parts["dtypes"]):
        raise ValueError("its quantized, scales and dtypes name different tensors")
    if set(quantized) & set(passthrough):
        raise ValueError("it names a tensor twice")
    if not set(parts["qmeta"]) <= set(quantized):
        raise ValueError("its qmeta names a tensor that is not quantized")
    if not set(parts["passthrough_orig_dtypes"]) <= set(passthrough):
        raise ValueError("its passthrough_orig_dtypes names a tensor that is not there")
    items = []
    for name, codes in quantized.items():
        label, scales = _label(name), parts["scales"][name]
        _check_tensor(label, codes, torch.int8)
        _check_tensor(f"scales of {label}", scales, torch.float16)
        if codes.dim() != 2 or scales.shape != codes.shape[:1]:
            raise ValueError(f"tensor {label} is not a matrix with a scale per row")
        meta = parts["qmeta"].get(name, PER_ROW)
        if not _is_plain(meta) or meta != PER_ROW:
            raise ValueError(f"tensor {label} is not quantized row by row")
        entry = Entry(name, tuple(codes.shape), GOLF_GRID)
        items.append((Encoded(entry, Codes(codes, scales[:, None])), parts["dtypes"][name]))
    for name, plain in passthrough.items():
        label = _label(name)
        _check_tensor(label, plain, *STORED_AS)
        entry = Entry(name, tuple(plain.shape), None, STORED_AS[plain.dtype])
        type_name = parts["passthrough_orig_dtypes"].get(name, "float32")
        items.append((Encoded(entry, plain=plain), type_name))
    for item, type_name in items:
        if not isinstance(type_name, str) or type_name not in TYPE_NAMES:
            options = ", ".join(TYPE_NAMES)
            raise ValueError(f"tensor {_label(item.entry.name)} has a float type not of {options}")
    return items


def _is_plain(meta: object) -> bool:
    """Whether this can be compared: a forged file may hold tensors where numbers belong."""
    return isinstance(meta, dict) and all(type(value) in (str, int) for value in meta.values())


def _label(name: str) -> str:
    """A tensor's name as an error may show it, whatever characters a file puts into it."""
    return re.sub(r"[^\w.]", "?", name)[:80]


def _check_tensor(label: str, tensor: object, *dtypes: torch.dtype) -> None:
    """ValueError unless this is a plain tensor of one of ``dtypes`` with all its elements in the
    file: strides of 0 make a terabyte of two bytes."""
    if (
        type(tensor) is not torch.Tensor
        or tensor.dtype not in dtypes
        or tensor.layout != torch.strided
        or tensor.device.type != "cpu"
        or not tensor.is_contiguous()
        or tensor.requires_grad
    ):
        options = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"tensor {label} is not a plain tensor of {options}")
