"""The ``constriction`` coder: static tables by class of expected magnitude, then range coding.

The mean magnitudes of every row and column are stored in thirds of an octave; their product sorts
the codes of a section into classes, and each class has a table of its own, counted beforehand and
stored. The range coder is that of the constriction library (Bamler, arXiv 2201.01741). Against
``mix`` nothing adapts, so tables cost bytes and neighbours tell nothing: some 1 % larger, faster.

Classes are integers, and frequencies are integers that sum to 2^16, so what one machine writes any
other reads. Layout: length of the side information (uint32); side information by zlib: rows' and
columns' levels (uint8) of tensor after tensor, then for each class that occurs a table (256 uint16,
of codes as unsigned bytes; 0 where a code does not occur); words (uint32) of the range coder, class
after class. A class of one code only takes no words, and its table is that code's 65535.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import constriction
import numpy as np

from qat.artifact.coder import Matrices, Matrix

LEVELS_PER_OCTAVE = 3
MIDDLE = 32  # the level of a mean magnitude of 1
CLASSES = 64
SYMBOLS = 256
TOTAL = 1 << 16
LENGTH = struct.Struct("<I")


def _levels(means: np.ndarray) -> np.ndarray:
    levels = np.rint(LEVELS_PER_OCTAVE * np.log2(np.maximum(means, 1e-6))) + MIDDLE
    return np.clip(levels, 0, CLASSES - 1).astype(np.uint8)


def _magnitudes(codes: np.ndarray, matrix: Matrix) -> np.ndarray:
    return codes & 0x7F if matrix.is_sign_magnitude else np.abs(codes.astype(np.int16))


def _classes(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The class of every code (rows, columns), uint8."""
    levels = rows[:, None].astype(np.int16) + columns[None].astype(np.int16) - MIDDLE
    return np.clip(levels, 0, CLASSES - 1).astype(np.uint8).ravel()


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts of a class -> integers that sum to ``TOTAL``, at least 1 where a code occurs."""
    occurs = counts > 0
    share = counts * (TOTAL - int(occurs.sum())) // counts.sum() + occurs
    share[share.argmax()] += TOTAL - share.sum()
    return share


def _model(table: np.ndarray) -> tuple[np.ndarray, constriction.stream.model.Categorical]:
    """(codes that occur, their distribution); both sides build it from the same integers."""
    symbols = np.flatnonzero(table)
    shares = table[symbols].astype(np.float64) / TOTAL
    return symbols, constriction.stream.model.Categorical(shares, perfect=False)


def _parts(matrices: Matrices) -> Iterator[tuple[Matrix, slice]]:
    start = 0
    for matrix in matrices:
        end = start + matrix.rows * matrix.columns
        yield matrix, slice(start, end)
        start = end


def encode(raw: bytes, matrices: Matrices) -> bytes:
    """``raw``: the int8 codes of ``matrices``, one after another."""
    codes = np.frombuffer(raw, np.int8)
    side, classes = [], np.zeros(codes.size, np.uint8)
    for matrix, part in _parts(matrices):
        size = _magnitudes(codes[part], matrix).reshape(matrix.rows, matrix.columns)
        mean = max(float(size.mean()), 1e-6) if size.size else 1.0
        rows, columns = (_levels(size.mean(1)), _levels(size.mean(0) / mean)) if size.size else (
            np.zeros(matrix.rows, np.uint8), np.zeros(matrix.columns, np.uint8)
        )  # fmt: skip
        side += [rows.tobytes(), columns.tobytes()]
        classes[part] = _classes(rows, columns)
    coder = constriction.stream.queue.RangeEncoder()
    symbols = codes.view(np.uint8)
    for number in range(CLASSES):
        own = symbols[classes == number]
        if not own.size:
            continue
        table = _frequencies(np.bincount(own, minlength=SYMBOLS).astype(np.int64))
        side.append(np.minimum(table, TOTAL - 1).astype("<u2").tobytes())
        if np.count_nonzero(table) > 1:
            occurring, model = _model(table)
            places = np.zeros(SYMBOLS, np.int32)
            places[occurring] = np.arange(occurring.size)
            coder.encode(places[own], model)
    packed = zlib.compress(b"".join(side), 9)
    return LENGTH.pack(len(packed)) + packed + coder.get_compressed().astype("<u4").tobytes()


def decode(coded: bytes, raw_bytes: int, matrices: Matrices) -> bytes:
    """The inverse of ``encode``. ValueError if the sizes do not fit; content is not checked."""
    if sum(m.rows * m.columns for m in matrices) != raw_bytes or len(coded) < LENGTH.size:
        raise ValueError("constriction section does not have its declared size")
    end = LENGTH.size + LENGTH.unpack_from(coded)[0]
    most = sum(m.rows + m.columns for m in matrices) + 2 * SYMBOLS * CLASSES
    stream = zlib.decompressobj()
    try:
        side = np.frombuffer(stream.decompress(coded[LENGTH.size : end], most), np.uint8)
    except zlib.error as error:
        raise ValueError(f"constriction section is damaged: {error}") from None
    if end > len(coded) or (len(coded) - end) % 4 or not stream.eof or stream.unused_data:
        raise ValueError("constriction section does not have its declared size")
    classes, at = np.zeros(raw_bytes, np.uint8), 0
    for matrix, part in _parts(matrices):
        rows, at = side[at : at + matrix.rows], at + matrix.rows
        columns, at = side[at : at + matrix.columns], at + matrix.columns
        if rows.size + columns.size != matrix.rows + matrix.columns:
            raise ValueError("constriction section has too few levels")
        classes[part] = _classes(rows, columns)
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(coded[end:], "<u4").astype("u4"))
    symbols = np.zeros(raw_bytes, np.uint8)
    for number in range(CLASSES):
        members = np.flatnonzero(classes == number)
        if not members.size:
            continue
        table = side[at : at + 2 * SYMBOLS].view("<u2").astype(np.int64)
        at += 2 * SYMBOLS
        if table.size != SYMBOLS or int(table.sum()) not in (TOTAL, TOTAL - 1):
            raise ValueError("constriction section has a table that does not add up")
        if np.count_nonzero(table) == 1:
            symbols[members] = table.argmax()
            continue
        if table.sum() != TOTAL:
            raise ValueError("constriction section has a table that does not add up")
        occurring, model = _model(table)
        try:
            symbols[members] = occurring[coder.decode(model, members.size)]
        except (AssertionError, ValueError) as error:
            raise ValueError(f"constriction section is damaged: {error}") from None
    if at != side.size or not coder.maybe_exhausted():
        raise ValueError("constriction section does not have its declared size")
    return symbols.tobytes()
