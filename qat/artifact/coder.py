"""Lossless coders behind one interface; a coder is chosen by name and never by timing.

Each codes one section of an artifact. Decoding is told the exact raw size and never produces more,
so a crafted section cannot expand without bound.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import zstandard

ZLIB_LEVEL = 9
ZSTD_LEVEL = 22


class Coder(NamedTuple):
    encode: Callable[[bytes], bytes]
    decode: Callable[[bytes, int], bytes]  # ValueError unless exactly that many bytes come out


def _zlib_decode(coded: bytes, raw_bytes: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(coded, raw_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"zlib section is damaged: {error}") from None
    if len(raw) != raw_bytes or not stream.eof or stream.unused_data:
        raise ValueError("zlib section does not have its declared size")
    return raw


def _zstd_decode(coded: bytes, raw_bytes: int) -> bytes:
    try:
        if zstandard.get_frame_parameters(coded).content_size != raw_bytes:
            raise ValueError("zstd section does not have its declared size")
        return zstandard.ZstdDecompressor().decompress(coded, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd section is damaged: {error}") from None


CODERS = {
    "zlib": Coder(lambda raw: zlib.compress(raw, ZLIB_LEVEL), _zlib_decode),
    "zstd": Coder(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress, _zstd_decode),
}
