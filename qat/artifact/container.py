"""The artifact file: everything needed to rebuild a quantized model, and nothing that executes.

Format 2, little-endian:

    8 bytes    magic ``QATMODEL``
    4 bytes    format version (uint32)
    4 bytes    header length H (uint32)
    H bytes    header, UTF-8 JSON with sorted keys: format-independent ``meta`` (model, tokenizer
               hash, data source), ``plan``, ``sections`` [[name, coder, raw bytes, coded bytes]]
    ...        the coded sections, in header order: codes (int8, one symbol per byte, then the zero
               points of an asymmetric grid; tensor after tensor in plan order), steps and plain
               tensors (low bytes, then high bytes, of all 16-bit values; 32-bit values as is)
    32 bytes   SHA-256 of all that precedes

The bytes are a function of weights, plan, meta and coder only: no time, host, run name or seed.
Reading checks length, magic, version and hash before it believes anything else, and every size
against the plan before it allocates.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.artifact.coder import CODERS, Matrix, encode_section
from qat.errors import UserError
from qat.quantize.grid import DTYPES, FP8
from qat.quantize.plan import Encoded, Entry, Plan
from qat.quantize.rounding import Codes

MAGIC = b"QATMODEL"
FORMAT = 2
PREFIX = struct.Struct("<8sII")
HASH_BYTES = 32
WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Artifact:
    """A file read back: its meta data, plan, and float32 weights decoded from the stored codes."""

    meta: dict[str, Any]
    plan: Plan
    weights: dict[str, Tensor]
    encoded: list[Encoded]
    sections: list[tuple[str, str, int, int]]  # name, coder, raw bytes, coded bytes
    num_bytes: int


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _split_planes(raw: bytes) -> bytes:
    """16-bit values -> all low bytes, then all high bytes: general coders find more to share."""
    return np.frombuffer(raw, np.uint8).reshape(-1, 2).T.tobytes()


def _join_planes(raw: bytes) -> bytes:
    return np.frombuffer(raw, np.uint8).reshape(2, -1).T.tobytes()


def _stored_floats(plan: Plan) -> list[tuple[str, int]]:
    """(storage dtype, count) of steps and plain tensors, in plan order."""
    return [
        (e.grid.step_dtype, math.prod(e.steps_shape)) if e.grid else (e.dtype, e.num_elements)
        for e in plan
    ]


def _section_sizes(plan: Plan) -> list[tuple[str, int]]:
    """Raw bytes of each section, from the plan alone."""
    floats = _stored_floats(plan)
    return [
        ("codes", sum(e.num_elements + e.num_zeros for e in plan.on_grid)),
        ("floats16", sum(2 * count for dtype, count in floats if WIDTHS[dtype] == 2)),
        ("floats32", sum(4 * count for dtype, count in floats if WIDTHS[dtype] == 4)),
    ]


def matrix_of(entry: Entry) -> Matrix:
    """The codes of a tensor on a grid, as a coder sees them."""
    assert entry.grid is not None
    rows = entry.shape[0] if len(entry.shape) > 1 else 1
    is_fp8 = entry.grid.levels in FP8
    largest = 127 if is_fp8 else max(abs(int(limit)) for limit in entry.grid.code_limits)
    role = re.sub(r"\d+", "*", entry.name)
    columns = entry.num_elements // max(rows, 1)
    return Matrix(rows, columns, largest.bit_length(), is_fp8, role)


def _matrices(plan: Plan, section: str) -> list[Matrix]:
    """The codes section as tensors, in its order: codes, then the zero points if there are some.

    The other sections have none.
    """
    found: list[Matrix] = []
    if section != "codes":
        return found
    for entry in plan.on_grid:
        found.append(matrix_of(entry))
        if entry.num_zeros:
            found.append(Matrix(1, entry.num_zeros, 8, False, "zero points"))
    return found


def pack(encoded: list[Encoded], plan: Plan, meta: Mapping[str, Any], coder: str) -> bytes:
    """The whole file as bytes."""
    codes, halves, words = bytearray(), bytearray(), bytearray()
    for item in encoded:
        if item.coded is not None:
            codes += _raw(item.coded.codes)
            if item.coded.zeros is not None:
                codes += _raw(item.coded.zeros)
        (halves if item.floats.element_size() == 2 else words).extend(_raw(item.floats))
    raws = {
        "codes": bytes(codes),
        "floats16": _split_planes(bytes(halves)),
        "floats32": bytes(words),
    }
    coded = {
        name: encode_section(raws[name], _matrices(plan, name), coder)
        for name, _ in _section_sizes(plan)
    }
    header = {
        "meta": meta,
        "plan": plan.as_json(),
        "sections": [
            [name, coded[name][0], size, len(coded[name][1])] for name, size in _section_sizes(plan)
        ],
    }
    header_bytes = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    body = (
        PREFIX.pack(MAGIC, FORMAT, len(header_bytes))
        + header_bytes
        + b"".join(data for _, data in coded.values())
    )
    return body + hashlib.sha256(body).digest()


def write_artifact(path: Path, data: bytes) -> None:
    """Write atomically: the final name appears only when every byte is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_artifact(path: Path) -> Artifact:
    """Read, check and decode a file. UserError names the file and what is wrong with it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"artifact={path}: {error.strerror or error}") from None
    try:
        return _unpack(data)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, struct.error) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"artifact={path}: not a readable artifact ({reason})") from None


def _unpack(data: bytes) -> Artifact:
    if len(data) < PREFIX.size + HASH_BYTES:
        raise ValueError(f"only {len(data)} bytes long")
    magic, version, header_bytes = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("it does not begin as an artifact does")
    if version != FORMAT:
        raise ValueError(f"format {version}; this program reads format {FORMAT}")
    if hashlib.sha256(data[:-HASH_BYTES]).digest() != data[-HASH_BYTES:]:
        raise ValueError("its SHA-256 does not match: truncated or damaged")
    end = len(data) - HASH_BYTES
    start = PREFIX.size + header_bytes
    if start > end:
        raise ValueError("its header is longer than the file")
    header = json.loads(data[PREFIX.size : start])
    plan = Plan.from_json(header["plan"])
    sizes = _section_sizes(plan)
    if [(name, raw) for name, _, raw, _ in header["sections"]] != sizes:
        raise ValueError("its sections do not have the sizes its plan asks for")
    raws = {}
    for name, coder, raw_bytes, coded_bytes in header["sections"]:
        if type(coded_bytes) is not int or not 0 <= coded_bytes <= end - start:
            raise ValueError(f"section {name} runs past the end")
        coded = data[start : start + coded_bytes]
        raws[name] = CODERS[coder].decode(coded, raw_bytes, _matrices(plan, name))
        start += coded_bytes
    if start != end:
        raise ValueError("bytes left over after the last section")
    raws["floats16"] = _join_planes(raws["floats16"])
    encoded = _split(plan, raws)
    weights = {item.entry.name: item.decode() for item in encoded}
    sections = [tuple(section) for section in header["sections"]]
    return Artifact(header["meta"], plan, weights, encoded, sections, len(data))


def _split(plan: Plan, raws: Mapping[str, bytes]) -> list[Encoded]:
    """Cut the sections into the tensors of the plan."""
    offsets = dict.fromkeys(raws, 0)

    def take(section: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        if count == 0:
            return torch.zeros(shape, dtype=dtype)
        start = offsets[section]
        offsets[section] += count * dtype.itemsize
        raw = bytearray(raws[section][start : offsets[section]])
        return torch.frombuffer(raw, dtype=dtype).view(shape)

    def take_floats(storage: str, shape: tuple[int, ...]) -> Tensor:
        return take("floats16" if WIDTHS[storage] == 2 else "floats32", DTYPES[storage], shape)

    encoded = []
    for entry in plan:
        if entry.grid is None:
            encoded.append(Encoded(entry, plain=take_floats(entry.dtype, entry.shape)))
        else:
            codes = take("codes", torch.int8, entry.shape)
            low, high = entry.grid.code_limits
            is_int = entry.grid.levels not in FP8
            if is_int and codes.numel() and not low <= codes.min() <= codes.max() <= high:
                raise ValueError(f"tensor {entry.name} has a code outside its grid")
            has_zeros = entry.num_zeros > 0
            zeros = take("codes", torch.int8, entry.steps_shape) if has_zeros else None
            steps = take_floats(entry.grid.step_dtype, entry.steps_shape)
            encoded.append(Encoded(entry, Codes(codes, steps, zeros)))
    for item in encoded:
        if not torch.isfinite(item.floats).all() or not torch.isfinite(item.decode()).all():
            raise ValueError(f"tensor {item.entry.name} has a value that is not finite")
    return encoded
