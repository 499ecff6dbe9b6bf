"""The ``mix`` coder: context mixing for codes, an adaptive arithmetic coder with an integer model.

A code is a magnitude, high bit first, then a sign. For every bit several predictions are looked up,
each learned in another context: the mean magnitude of the column and of the row so far, both
together, what they multiply to, the neighbours to the left and above, the tensor's role. A gated
linear mixer adds them up in the logistic domain and learns which to trust (Mahoney, "Adaptive
Weighing of Context Models for Lossless Data Compression", 2005, with lpaq's counters). Trained
weights are not i.i.d.: rows and columns have scales of their own, which is what is won here.

Everything is integer arithmetic, the tables come from exact decimals, and the same function encodes
and decodes, so a file means the same on every machine, compiled or not.

A section is cut into streams of whole tensors, at least ``STREAM_CODES`` codes each but the last,
so that a large model is coded on several cores; every stream learns on its own. Layout: the
streams' lengths (uint32 each), then the streams. The cut follows from the tensors alone.
"""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import cache
from itertools import pairwise

import numpy as np

from qat.artifact.sections import Coded, Matrices, Matrix
from qat.compiled import machine_code

ROLES = 16
# Contexts of a magnitude's bits; each has a table of NODES counters per context value.
BUCKETS = 64  # of a mean magnitude, four to the octave
COLUMN, ROW, BOTH, PRODUCT, NEAR, EXACT, ROLE = range(7)
SIZES = (BUCKETS, BUCKETS, 32 * 32, 2 * BUCKETS, BUCKETS * 16, 32 * 32, ROLES)
STARTS = tuple(int(sum(SIZES[:i])) for i in range(len(SIZES)))
INPUTS = len(SIZES)
NODES = 256
SIGN_CONTEXTS = 32 + 9  # drift of the column's sign; signs to the left and above
COUNT_LIMIT = 1023  # in the lower 10 bits of a counter; the upper 22 are a probability
MAX_BITS = 8  # of a magnitude
USUAL_BYTES = 1.25  # more than codes that look like noise take
CODE_BYTES = 18  # most for a code: its 9 bits cost at most 12 each; and the 4 that end a stream
SIGN_MIXER = MAX_BITS * ROLES * INPUTS  # after the mixers of every depth and role
ONE = 1 << 16


@cache
def tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(squash: logit * 256 + 2048 -> probability of 16 bits, stretch: its inverse from 12 bits,
    reciprocals of counts)."""
    squash = np.zeros(4096, np.int64)
    for i in range(4096):
        odds = (Decimal(i - 2048) / 256).exp()
        squash[i] = min(max(int(odds / (1 + odds) * 65536), 16), 65536 - 16)
    stretch = np.zeros(4096, np.int64)
    at = 0
    for p in range(4096):
        while at < 4095 and squash[at] < 16 * p + 8:
            at += 1
        stretch[p] = at - 2048
    reciprocals = np.array([65536 * 2 // (2 * n + 3) for n in range(COUNT_LIMIT + 1)], np.int64)
    return squash, stretch, reciprocals


def new_model() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counters of magnitudes and of signs (22 bits of probability, 10 of count), mixer weights."""
    half = 1 << 31
    magnitudes = np.full(sum(SIZES) * NODES, half, np.uint32)
    signs = np.full(SIGN_CONTEXTS, half, np.uint32)
    return magnitudes, signs, np.full(SIGN_MIXER + 2, ONE // 4, np.int64)


@machine_code
def bucket(x):
    """Four buckets to the octave of 0 <= x < 2^16."""
    if x < 4:
        return x
    bits = 0
    y = x
    while y > 0:
        y >>= 1
        bits += 1
    return min(4 * (bits - 2) + ((x >> (bits - 3)) & 3), 63)


@machine_code
def code_bit(bit, p, coder, data, decoding):
    """One bit with probability ``p`` / 2^16 of being 1; ``coder``: low, high, code, position."""
    low, high = coder[0], coder[1]
    span = high - low
    middle = low + (span >> 16) * p + (((span & 0xFFFF) * p) >> 16)
    if decoding:
        bit = 1 if coder[2] <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + 1
    while ((low ^ high) & 0xFF000000) == 0:
        at = coder[3]
        if decoding:
            incoming = data[at] if at < data.size else 0
            coder[2] = ((coder[2] << 8) & 0xFFFFFFFF) | incoming
        else:
            data[at] = high >> 24
        coder[3] = at + 1
        low = (low << 8) & 0xFFFFFFFF
        high = ((high << 8) & 0xFFFFFFFF) | 0xFF
    coder[0], coder[1] = low, high
    return bit


@machine_code
def learn(counters, at, bit, reciprocals):
    """Move a counter towards ``bit``, the less the more it has seen."""
    counter = int(counters[at])
    count, probability = counter & COUNT_LIMIT, counter >> 10
    probability += (((bit << 22) - probability) * reciprocals[count]) >> 16
    counters[at] = (min(probability, (1 << 22) - 1) << 10) | min(count + 1, COUNT_LIMIT)


@machine_code
def code_tensor(
    magnitudes, negatives, bits, zero_has_sign, role, counters, sign_counters, weights,
    squash, stretch, reciprocals, coder, data, decoding,
):  # fmt: skip
    """Encode or decode one (rows, columns) tensor; decoding fills the first two arrays. Ends early
    with its position beyond ``data`` if that is too short.

    Means are of magnitudes, times 2^8 (``row_mean``, ``tensor_mean``) or 2^16 (``columns_seen``,
    ``row_seen``); a row is measured in units of its columns and a column in units of its rows.
    """
    rows, columns = magnitudes.shape
    # Narrow, and widened where they are read: of a single long row they are most of the memory.
    columns_seen = np.zeros(columns, np.int32)
    column_drift = np.zeros(columns, np.int16)  # of signs
    base = np.zeros(INPUTS, np.int64)
    logits = np.zeros(INPUTS, np.int64)
    shift = max(bits - 5, 0)
    tensor_mean = 0
    last = data.size if decoding else data.size - CODE_BYTES
    for i in range(rows):
        row_mean, row_seen = tensor_mean, tensor_mean << 8
        for j in range(columns):
            if coder[3] > last:
                coder[3] = data.size + 1
                return  # damaged (no true stream is read beyond its end), or no room for a code
            left = int(magnitudes[i, j - 1]) if j > 0 else 0
            left2 = int(magnitudes[i, j - 2]) if j > 1 else left
            up = int(magnitudes[i - 1, j]) if i > 0 else left
            up2 = int(magnitudes[i - 2, j]) if i > 1 else up
            corner = int(magnitudes[i - 1, j + 1]) if i > 0 and j + 1 < columns else up
            column_mean = int(columns_seen[j]) >> 8 if i > 0 else row_mean
            near = (2 * left + left2 + 2 * up + up2 + corner) * 36
            product = bucket(min(column_mean * row_mean // max(tensor_mean, 1), 65535))
            column_bucket, row_bucket = bucket(column_mean), bucket(row_mean)
            base[COLUMN] = column_bucket
            base[ROW] = row_bucket
            base[BOTH] = (column_bucket >> 1) * 32 + (row_bucket >> 1)
            base[PRODUCT] = 2 * product + (1 if i > 32 else 0)
            base[NEAR] = bucket(min(near, 65535)) * 16 + (product >> 2)
            base[EXACT] = min(up >> shift, 31) * 32 + min(left >> shift, 31)
            base[ROLE] = role
            for k in range(INPUTS):
                base[k] = (base[k] + STARTS[k]) * NODES
            magnitude = int(magnitudes[i, j])
            node = 1
            for depth in range(bits):
                first = (depth * ROLES + role) * INPUTS
                total = 0
                for k in range(INPUTS):
                    logits[k] = stretch[counters[base[k] + node] >> 20]
                    total += logits[k] * weights[first + k]
                p = squash[min(max((total >> 16) + 2048, 0), 4095)]
                bit = (magnitude >> (bits - 1 - depth)) & 1
                bit = code_bit(bit, p, coder, data, decoding)
                error = (bit << 16) - p
                for k in range(INPUTS):
                    weights[first + k] += (logits[k] * error + (1 << 15)) >> 16
                    learn(counters, base[k] + node, bit, reciprocals)
                node = 2 * node + bit
            magnitude = node - (1 << bits)
            magnitudes[i, j] = magnitude
            sign = 0
            if magnitude > 0 or zero_has_sign:
                around = 0
                if j > 0 and magnitudes[i, j - 1] > 0:
                    around += 1 + negatives[i, j - 1]
                if i > 0 and magnitudes[i - 1, j] > 0:
                    around += 3 * (1 + negatives[i - 1, j])
                drift = min(max((int(column_drift[j]) >> 11) + 16, 0), 31)
                a = stretch[sign_counters[drift] >> 20]
                b = stretch[sign_counters[32 + around] >> 20]
                total = a * weights[SIGN_MIXER] + b * weights[SIGN_MIXER + 1]
                p = squash[min(max((total >> 16) + 2048, 0), 4095)]
                sign = code_bit(int(negatives[i, j]), p, coder, data, decoding)
                error = (sign << 16) - p
                weights[SIGN_MIXER] += (a * error + (1 << 15)) >> 16
                weights[SIGN_MIXER + 1] += (b * error + (1 << 15)) >> 16
                learn(sign_counters, drift, sign, reciprocals)
                learn(sign_counters, 32 + around, sign, reciprocals)
                column_drift[j] += (((1 - 2 * sign) << 15) - int(column_drift[j])) >> 4
            negatives[i, j] = sign
            value = magnitude << 8
            of_row, of_column = value, value
            if i > 0:
                of_row = value * tensor_mean // max(column_mean, 16)
                of_column = value * tensor_mean // max(row_mean, 16)
            seen = min(of_row << 8, 1 << 24) - row_seen
            row_seen += seen // min(j + (16 if i > 0 else 1), 1024)
            row_mean = row_seen >> 8
            seen = min(of_column << 8, 1 << 24) - int(columns_seen[j])
            columns_seen[j] += seen // min(i + 8, 512)
        if i == 0:
            columns_seen[:] = row_seen
            tensor_mean = row_mean
        tensor_mean += (row_mean - tensor_mean) // min(i + 1, 16)


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
        # Room for the worst takes more memory than the model, and the worst does not come up.
        for room in (USUAL_BYTES, CODE_BYTES):
            data = np.zeros(int(room * own.size) + CODE_BYTES, np.uint8)
            coder = _run(matrices[streams[number]], roles, data, own, decoding=False)
            if coder[3] <= data.size:
                break
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
