"""Lossless coders behind one interface; a coder is chosen by name or size, never by timing.

Each codes one section of an artifact. Decoding is told the exact raw size and never produces more,
so a crafted section cannot expand without bound; it gives writable bytes, which tensors can share.

General coders see bytes; ``constriction`` and ``mix`` are told which bytes are the codes of which
tensor, and model them (``qat.artifact.class_coder``, ``qat.artifact.mix_coder``).

Three general ones are kept because each is needed: zlib is Python's own, so that torch and numpy
are enough to write and read a file; brotli is the smallest on codes and on scales; zstd takes
seconds where brotli takes half a minute. lzma was never the smallest of them on codes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import NamedTuple, ParamSpec, TypeVar

from qat.artifact.sections import Coded, Matrices, Matrix
from qat.errors import UserError

ZLIB_LEVEL = 9
ZSTD_LEVEL = 22
FAST_BYTES = 1 << 18
BROTLI_LEVEL, BROTLI_WINDOW = 11, 24
PIECE_BYTES, PART_BYTES = 1 << 16, 1 << 20  # of input and of output, while decoding
AUTO = "auto"  # every coder; the smallest is kept
P = ParamSpec("P")
T = TypeVar("T")


class Coder(NamedTuple):
    encode: Callable[[bytes, Matrices], bytes]
    # ValueError unless there are exactly so many bytes
    decode: Callable[[Coded, int, Matrices], bytearray | memoryview]


def _with_library(work: Callable[P, T]) -> Callable[P, T]:
    """For what imports its library when it is first needed. UserError if that is not installed."""

    @wraps(work)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return work(*args, **kwargs)
        except ModuleNotFoundError as missing:
            raise UserError(
                f"{missing.name} is not installed, and this coder needs it: "
                "pip install -e '.[train]', or take artifact.coder=zlib"
            ) from None

    return told


def _collect(raw_bytes: int, parts: Iterator[bytes]) -> bytearray:
    """Small parts, one after another: whole, the expansion would be in memory twice."""
    raw = bytearray()
    for part in parts:
        raw += part
        if len(raw) > raw_bytes:
            break
    if len(raw) != raw_bytes:
        raise ValueError("section does not have its declared size")
    return raw


def _pieces(coded: Coded) -> Iterator[Coded]:
    """Small too: a decoder copies what it has not read yet."""
    view = memoryview(coded)
    return (view[i : i + PIECE_BYTES] for i in range(0, len(view), PIECE_BYTES))


def _check_end(is_finished: bool, has_more: bool) -> None:
    if not is_finished or has_more:
        raise ValueError("section does not end with its declared size")


def _zlib_parts(coded: Coded) -> Iterator[bytes]:
    stream = zlib.decompressobj()
    for piece in _pieces(coded):
        _check_end(True, stream.eof)
        while part := stream.decompress(piece, PART_BYTES):
            yield part
            piece = stream.unconsumed_tail
    _check_end(stream.eof, bool(stream.unused_data))


def _zlib_decode(coded: Coded, raw_bytes: int, _: Matrices) -> bytearray:
    try:
        return _collect(raw_bytes, _zlib_parts(coded))
    except zlib.error as error:
        raise ValueError(f"zlib section is damaged: {error}") from None


@_with_library
def _zstd_encode(raw: bytes, _: Matrices) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(raw)


@_with_library
def _zstd_decode(coded: Coded, raw_bytes: int, _: Matrices) -> bytearray:
    import zstandard

    try:
        if zstandard.get_frame_parameters(coded).content_size != raw_bytes:
            raise ValueError("zstd section does not have its declared size")
        return bytearray(zstandard.ZstdDecompressor().decompress(coded, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd section is damaged: {error}") from None


@_with_library
def _brotli_encode(raw: bytes, _: Matrices) -> bytes:
    import brotli

    return brotli.compress(raw, quality=BROTLI_LEVEL, lgwin=BROTLI_WINDOW)


@_with_library
def _brotli_decode(coded: Coded, raw_bytes: int, _: Matrices) -> bytearray:
    import brotli

    def parts() -> Iterator[bytes]:
        stream = brotli.Decompressor()
        for piece in _pieces(coded):
            _check_end(True, stream.is_finished())
            # Only an empty part says that there is no more: not can_accept_more_data (brotli 1.2).
            while part := stream.process(piece, output_buffer_limit=PART_BYTES):
                yield part
                piece = b""
        _check_end(stream.is_finished(), False)  # what follows its end within a piece is an error

    try:
        return _collect(raw_bytes, parts())
    except brotli.error as error:
        raise ValueError(f"brotli section is damaged: {error}") from None


@_with_library
def _mix_encode(raw: bytes, matrices: Matrices) -> bytes:
    from qat.artifact.mix_coder import encode

    return encode(raw, matrices)


@_with_library
def _mix_decode(coded: Coded, raw_bytes: int, matrices: Matrices) -> memoryview:
    from qat.artifact.mix_coder import decode

    return decode(coded, raw_bytes, matrices)


@_with_library
def _constriction_encode(raw: bytes, matrices: Matrices) -> bytes:
    from qat.artifact.class_coder import encode

    return encode(raw, matrices)


@_with_library
def _constriction_decode(coded: Coded, raw_bytes: int, matrices: Matrices) -> memoryview:
    from qat.artifact.class_coder import decode

    return decode(coded, raw_bytes, matrices)


GENERAL = {
    "zlib": Coder(lambda raw, _: zlib.compress(raw, ZLIB_LEVEL), _zlib_decode),
    "zstd": Coder(_zstd_encode, _zstd_decode),
    "brotli": Coder(_brotli_encode, _brotli_decode),
}
OF_CODES = {
    "constriction": Coder(_constriction_encode, _constriction_decode),
    "mix": Coder(_mix_encode, _mix_decode),
}
CODERS = GENERAL | OF_CODES


def check_coder(coder: str) -> None:
    """Code a byte and read it back, with all that a file of this coder takes. UserError if a
    library is missing or does not work: better before a training than after it."""
    for matrices in ([Matrix(1, 1, 1, False, "trial")], []):
        used, data = encode_section(b"\1", matrices, coder)
        CODERS[used].decode(data, 1, matrices)


def encode_section(raw: bytes, matrices: Matrices, coder: str) -> tuple[str, bytes]:
    """(the coder used, coded bytes) of one section.

    ``auto`` keeps the smallest; so do the coders of codes where there are none to model (of the
    fast ones if there is much of it: others take seconds for a megabyte and win next to nothing).
    """
    if coder in GENERAL or (coder in OF_CODES and matrices):
        tried = [coder]
    elif coder != AUTO and len(raw) > FAST_BYTES:
        tried = ["zlib", "zstd"]
    else:
        tried = list(CODERS if matrices else GENERAL)
    done = [(name, CODERS[name].encode(raw, matrices)) for name in tried]
    return min(done, key=lambda pair: len(pair[1]))
