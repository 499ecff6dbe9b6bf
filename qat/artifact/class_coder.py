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

from qat.artifact.sections import Coded, Matrices, Matrix

LEVELS_PER_OCTAVE = 3
MIDDLE = 32  # the level of a mean magnitude of 1
CLASSES = 64
SYMBOLS = 256
TOTAL = 1 << 16
CHUNK = 1 << 20
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
    """Tensors that are not empty, and their place; an empty one may claim 10^18 rows."""
    start = 0
    for matrix in matrices:
        end = start + matrix.rows * matrix.columns
        if start < end:
            yield matrix, slice(start, end)
        start = end


def encode(raw: bytes, matrices: Matrices) -> bytes:
    """``raw``: the int8 codes of ``matrices``, one after another."""
    codes = np.frombuffer(raw, np.int8)
    side, classes = [], np.zeros(codes.size, np.uint8)
    for matrix, part in _parts(matrices):
        size = _magnitudes(codes[part], matrix).reshape(matrix.rows, matrix.columns)
        mean = max(float(size.mean()), 1e-6)
        rows, columns = _levels(size.mean(1)), _levels(size.mean(0) / mean)
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


def decode(coded: Coded, raw_bytes: int, matrices: Matrices) -> memoryview:
    """The inverse of ``encode``. ValueError if a size does not fit or codes run out."""
    wrong_size = ValueError("constriction section does not have its declared size")
    if sum(m.rows * m.columns for m in matrices) != raw_bytes or len(coded) < LENGTH.size:
        raise wrong_size
    end = LENGTH.size + LENGTH.unpack_from(coded)[0]
    most = sum(m.rows + m.columns for m, _ in _parts(matrices)) + 2 * SYMBOLS * CLASSES
    stream = zlib.decompressobj()
    try:
        side = np.frombuffer(stream.decompress(coded[LENGTH.size : end], most + 1), np.uint8)
    except zlib.error as error:
        raise ValueError(f"constriction section is damaged: {error}") from None
    if end > len(coded) or (len(coded) - end) % 4 or not stream.eof or stream.unused_data:
        raise wrong_size
    classes, at = np.zeros(raw_bytes, np.uint8), 0
    for matrix, part in _parts(matrices):
        middle, after = at + matrix.rows, at + matrix.rows + matrix.columns
        if after > side.size:
            raise wrong_size
        classes[part] = _classes(side[at:middle], side[middle:after])
        at = after
    words = np.frombuffer(coded[end:], "<u4").astype(np.uint32)
    decoder = constriction.stream.queue.RangeDecoder(words)
    symbols = np.zeros(raw_bytes, np.uint8)
    for number in range(CLASSES):
        members = classes == number
        if not members.any():
            continue
        table = np.frombuffer(side[at : at + 2 * SYMBOLS].tobytes(), "<u2").astype(np.int64)
        at += 2 * SYMBOLS
        if table.size != SYMBOLS:
            raise wrong_size
        symbols[members] = _decode_class(decoder, table, int(members.sum()))
    if at != side.size or not decoder.maybe_exhausted():
        raise wrong_size
    return symbols.data


def _decode_class(
    decoder: constriction.stream.queue.RangeDecoder, table: np.ndarray, count: int
) -> np.ndarray:
    occurs = np.count_nonzero(table)
    if table.sum() != (TOTAL if occurs > 1 else TOTAL - 1):
        raise ValueError("constriction section has a table that does not add up")
    if occurs == 1:
        return np.full(count, table.argmax(), np.uint8)
    occurring, model = _model(table)
    codes = np.empty(count, np.uint8)
    try:
        for start in range(0, count, CHUNK):  # numbers of 32 bits: a part at a time
            part = codes[start : start + CHUNK]
            part[:] = occurring[decoder.decode(model, part.size)]
    except (AssertionError, ValueError) as error:
        raise ValueError(f"constriction section is damaged: {error}") from None
    return codes
