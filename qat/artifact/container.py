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
Reading checks length, magic, version and hash before it believes anything else, then the header's
length, strict JSON, and every size against the plan and the plan against this machine's memory,
before it allocates. It takes less memory than twice the tensors as float32, beside the file.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.artifact.coder import CODERS, Matrix, encode_section
from qat.artifact.header import Header, Section, check_length, read_header, section_sizes
from qat.errors import UserError
from qat.quantize.grid import DTYPES, FP8
from qat.quantize.plan import Encoded, Entry, Plan
from qat.quantize.rounding import Codes

MAGIC = b"QATMODEL"
FORMAT = 2
PREFIX = struct.Struct("<8sII")
HASH_BYTES = 32
CHUNK_BYTES = 1 << 20
Buffer = bytearray | memoryview


@dataclass(frozen=True)
class Artifact:
    """A file read back: its meta data, plan, and float32 weights decoded from the stored codes.

    ``encoded`` and the weights stored as fp32 are views of the sections.
    """

    meta: dict[str, Any]
    plan: Plan
    weights: dict[str, Tensor]
    encoded: list[Encoded]
    sections: list[Section]
    num_bytes: int


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _split_planes(raw: bytes) -> bytes:
    """16-bit values -> all low bytes, then all high bytes: general coders find more to share."""
    return np.frombuffer(raw, np.uint8).reshape(-1, 2).T.tobytes()


def _join_planes(raw: Buffer) -> memoryview:
    return np.frombuffer(raw, np.uint8).reshape(2, -1).T.copy().reshape(-1).data


def matrix_of(entry: Entry) -> Matrix:
    """The codes of a tensor on a grid, as a coder sees them."""
    assert entry.grid is not None
    is_fp8 = entry.grid.levels in FP8
    largest = 127 if is_fp8 else max(abs(int(limit)) for limit in entry.grid.code_limits)
    role = re.sub(r"\d+", "*", entry.name)
    columns = entry.num_elements // max(entry.num_rows, 1)
    return Matrix(entry.num_rows, columns, largest.bit_length(), is_fp8, role)


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
    """The whole file as bytes. ValueError if its header is longer than a reader takes."""
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
    sections, parts = [], []
    for name, size in section_sizes(plan).items():
        used, data = encode_section(raws[name], _matrices(plan, name), coder)
        sections.append(Section(name, used, size, len(data)))
        parts.append(data)
    header = Header(dict(meta), plan, sections).as_bytes()
    body = b"".join([PREFIX.pack(MAGIC, FORMAT, len(header)), header, *parts])
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
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or device may have no end
            raise UserError(f"artifact={path}: not a file")
        with open(path, "rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise UserError(f"artifact={path}: {error.strerror or error}") from None
    except MemoryError:
        raise UserError(f"artifact={path}: there is not enough memory to read it") from None
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"artifact={path}: not a readable artifact ({reason})") from None


class _Body:
    """What precedes the hash, read once from the start and hashed on the way."""

    def __init__(self, file: BufferedReader, num_bytes: int) -> None:
        file.seek(0)
        self.file, self.left = file, num_bytes
        self.sha256 = hashlib.sha256()

    def take(self, count: int) -> bytearray:
        if count > self.left:
            raise ValueError(f"{count:,} bytes are to follow, and {self.left:,} do")
        data = bytearray(count)
        if self.file.readinto(data) != count:
            raise ValueError("it became shorter while it was read")
        self.sha256.update(data)
        self.left -= count
        return data


def _read(file: BufferedReader, size: int) -> Artifact:
    """Twice through the file: nothing is believed of one whose hash is wrong, and what is decoded
    is hashed again, because the file may have changed since."""
    if size < PREFIX.size + HASH_BYTES:
        raise ValueError(f"only {size} bytes long")
    body = _Body(file, size - HASH_BYTES)
    magic, version, header_bytes = PREFIX.unpack(body.take(PREFIX.size))
    if magic != MAGIC:
        raise ValueError("it does not begin as an artifact does")
    if version != FORMAT:
        age = "older" if version < FORMAT else "newer"
        raise ValueError(f"format {version}, {age} than format {FORMAT}, which this program reads")
    while body.left:
        body.take(min(body.left, CHUNK_BYTES))
    if body.sha256.digest() != file.read(HASH_BYTES):
        raise ValueError("its SHA-256 does not match: truncated or damaged")
    checked, body = body, _Body(file, size - HASH_BYTES)
    body.take(PREFIX.size)
    if header_bytes > body.left:
        raise ValueError("its header is longer than the file")
    check_length(header_bytes)
    header = read_header(body.take(header_bytes))
    if sum(section.coded_bytes for section in header.sections) != body.left:
        raise ValueError("its sections do not end where the file does")
    raws = {
        name: CODERS[coder].decode(body.take(coded_bytes), raw_bytes, _matrices(header.plan, name))
        for name, coder, raw_bytes, coded_bytes in header.sections
    }
    if body.sha256.digest() != checked.sha256.digest():
        raise ValueError("it changed while it was read")
    raws["floats16"] = _join_planes(raws["floats16"])
    encoded = _split(header.plan, raws)
    weights = {}
    for item in encoded:
        weights[item.entry.name] = w = item.decode()
        if not _is_finite(item.floats) or not _is_finite(w):
            raise ValueError(f"tensor {item.entry.name} has a value that is not finite")
    return Artifact(header.meta, header.plan, weights, encoded, header.sections, size)


def _is_finite(values: Tensor) -> bool:
    """Without a copy, as ``isfinite`` makes; a NaN is the least and the largest."""
    return not values.numel() or all(torch.isfinite(end) for end in torch.aminmax(values))


def _split(plan: Plan, raws: Mapping[str, Buffer]) -> list[Encoded]:
    """The sections as the tensors of the plan: views, so that no code exists twice."""
    offsets = dict.fromkeys(raws, 0)

    def take(section: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        if count == 0:
            return torch.zeros(shape, dtype=dtype)
        start = offsets[section]
        offsets[section] += count * dtype.itemsize
        return torch.frombuffer(raws[section], dtype=dtype, count=count, offset=start).view(shape)

    def take_floats(storage: str, shape: tuple[int, ...]) -> Tensor:
        dtype = DTYPES[storage]
        return take("floats16" if dtype.itemsize == 2 else "floats32", dtype, shape)

    def take_codes(entry: Entry, shape: tuple[int, ...]) -> Tensor:
        assert entry.grid is not None
        codes = take("codes", torch.int8, shape)
        low, high = entry.grid.code_limits
        is_int = entry.grid.levels not in FP8
        if is_int and codes.numel() and not low <= codes.min() <= codes.max() <= high:
            raise ValueError(f"tensor {entry.name} has a code outside its grid")
        return codes

    encoded = []
    for entry in plan:
        if entry.grid is None:
            encoded.append(Encoded(entry, plain=take_floats(entry.dtype, entry.shape)))
        else:
            codes = take_codes(entry, entry.shape)
            zeros = take_codes(entry, entry.steps_shape) if entry.num_zeros else None
            steps = take_floats(entry.grid.step_dtype, entry.steps_shape)
            encoded.append(Encoded(entry, Codes(codes, steps, zeros)))
    return encoded
