"""The ``mix`` coder: sections of codes through the model of ``qat.artifact.mixing``.

A section is cut into streams of whole tensors, at least ``STREAM_CODES`` codes each but the last,
so that a large model is coded on several cores; every stream learns on its own. Layout: the
streams' lengths (uint32 each), then the streams. The cut follows from the tensors alone.
"""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from qat.artifact.coder import Coded, Matrices, Matrix
from qat.artifact.mixing import MAX_BITS, ROLES, code_tensor, new_model, tables

STREAM_CODES = 1 << 22
LENGTH = struct.Struct("<I")
FULL_RANGE = 0xFFFFFFFF


def _streams(matrices: Matrices) -> list[slice]:
    """Which tensors each stream holds."""
    cuts, count = [0], 0
    for number, matrix in enumerate(matrices):
        count += matrix.rows * matrix.columns
        if count >= STREAM_CODES:
            cuts.append(number + 1)
            count = 0
    if cuts[-1] != len(matrices):
        cuts.append(len(matrices))
    return [slice(start, end) for start, end in pairwise(cuts)]


def _roles(matrices: Matrices) -> dict[str, int]:
    """Roles numbered as they appear; from the sixteenth on they share."""
    names = list(dict.fromkeys(m.role for m in matrices))
    return {name: min(number, ROLES - 1) for number, name in enumerate(names)}


def _num_codes(matrices: Matrices) -> int:
    return sum(m.rows * m.columns for m in matrices)


def _split(code: np.ndarray, matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes (rows, columns) -> magnitudes, negative signs, both uint8."""
    if matrix.is_sign_magnitude:
        return (code & 0x7F).astype(np.uint8), (code < 0).astype(np.uint8)
    return np.abs(code.astype(np.int16)).astype(np.uint8), (code < 0).astype(np.uint8)


def _join(magnitudes: np.ndarray, negatives: np.ndarray, matrix: Matrix) -> None:
    """The inverse of ``_split``; the codes take the place of the magnitudes."""
    if matrix.is_sign_magnitude:
        negatives <<= 7
        magnitudes |= negatives
    elif (magnitudes > negatives + 127).any():
        raise ValueError("mix section holds a code outside int8")
    else:
        np.negative(magnitudes, out=magnitudes, where=negatives.view(np.bool_))


def _run(
    matrices: Matrices, roles: dict[str, int], data: np.ndarray, codes: np.ndarray, decoding: bool
) -> np.ndarray:
    """Code one stream: ``codes`` into ``data``, or the other way.

    Returns the arithmetic coder's state: low, high, code, position in ``data``.
    """
    coder = np.array([0, FULL_RANGE, 0, 0], np.int64)
    if decoding:
        coder[2], coder[3] = int.from_bytes(bytes(data[:4]).ljust(4, b"\0"), "big"), 4
    model, constants, start = new_model(), tables(), 0
    for matrix in matrices:
        if not 1 <= matrix.bits <= MAX_BITS:
            raise ValueError(f"magnitudes of {matrix.bits} bits")
        end = start + matrix.rows * matrix.columns
        tensor = codes[start:end].reshape(matrix.rows, matrix.columns)
        if not tensor.size:
            continue  # a crafted one may have 10^18 empty rows
        if decoding:
            magnitudes, negatives = tensor.view(np.uint8), np.zeros(tensor.shape, np.uint8)
        else:
            magnitudes, negatives = _split(tensor, matrix)
        code_tensor(
            magnitudes, negatives, matrix.bits, matrix.is_sign_magnitude, roles[matrix.role],
            *model, *constants, coder, data, decoding,
        )  # fmt: skip
        if coder[3] > data.size:
            break  # the rest of the codes was never touched, and need not be now
        if decoding:
            _join(magnitudes, negatives, matrix)
        start = end
    return coder


def encode(raw: bytes, matrices: Matrices) -> bytes:
    """``raw``: the int8 codes of ``matrices``, one after another."""
    codes, roles = np.frombuffer(raw, np.int8), _roles(matrices)
    streams = _streams(matrices)
    ends = np.cumsum([_num_codes(matrices[s]) for s in streams]).tolist()

    def work(number: int) -> bytes:
        own = codes[ends[number - 1] if number else 0 : ends[number]]
        # A bit costs at most 12, so a code of 9 bits stays below 14 bytes.
        data = np.zeros(14 * own.size + 16, np.uint8)
        coder = _run(matrices[streams[number]], roles, data, own, decoding=False)
        used = int(coder[3])
        data[used : used + 4] = np.frombuffer(int(coder[0]).to_bytes(4, "big"), np.uint8)
        return data[: used + 4].tobytes()

    with ThreadPoolExecutor() as pool:
        coded = list(pool.map(work, range(len(streams))))
    return b"".join([*(LENGTH.pack(len(stream)) for stream in coded), *coded])


def decode(coded: Coded, raw_bytes: int, matrices: Matrices) -> memoryview:
    """The inverse of ``encode``. ValueError if a size does not fit or a stream does not end where
    its codes do."""
    streams = _streams(matrices)
    if _num_codes(matrices) != raw_bytes or len(coded) < LENGTH.size * len(streams):
        raise ValueError("mix section does not have its declared size")
    lengths = [LENGTH.unpack_from(coded, LENGTH.size * i)[0] for i in range(len(streams))]
    starts = np.cumsum([LENGTH.size * len(streams), *lengths]).tolist()
    if starts[-1] != len(coded):
        raise ValueError("mix section does not have its declared size")
    ends = np.cumsum([0, *(_num_codes(matrices[s]) for s in streams)]).tolist()
    data = np.require(np.frombuffer(coded, np.uint8), requirements="W")  # one compiled version
    codes, roles = np.zeros(raw_bytes, np.int8), _roles(matrices)

    def work(number: int) -> None:
        stream = data[starts[number] : starts[number + 1]]
        own = codes[ends[number] : ends[number + 1]]
        coder = _run(matrices[streams[number]], roles, stream, own, decoding=True)
        if coder[3] != stream.size:
            raise ValueError("mix section is damaged: its streams do not end with their codes")

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, range(len(streams))))
    return codes.view(np.uint8).data
