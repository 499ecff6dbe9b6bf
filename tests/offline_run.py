"""Reads what W&B keeps of an offline run, with no code of W&B's but the messages' types.

A ``.wandb`` file is ``:W&B``, 3 bytes of magic and version, then blocks of 32 KiB that hold
messages in LevelDB's log format: each fragment has its crc32, length and kind in front, and none
crosses the end of a block.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record, RunRecord

HEADER_BYTES, BLOCK_BYTES = 7, 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class UnfinishedError(Exception):
    """The file ends within a message: W&B's own process is still writing it."""


def fragments(raw: bytes) -> Iterator[tuple[int, bytes]]:
    assert raw[:4] == b":W&B"
    at = HEADER_BYTES
    while at < len(raw):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < HEADER_BYTES:  # no room for another fragment's head
            at += left
            continue
        if len(raw) - at < HEADER_BYTES:
            raise UnfinishedError
        crc, length, kind = struct.unpack_from("<IHB", raw, at)
        data = raw[at + HEADER_BYTES : at + HEADER_BYTES + length]
        if len(data) < length:
            raise UnfinishedError
        assert zlib.crc32(bytes([kind]) + data) == crc
        yield kind, data
        at += HEADER_BYTES + length


def records(raw: bytes) -> list[Record]:
    found: list[Record] = []
    message, is_open = b"", False
    for kind, data in fragments(raw):
        assert is_open == (kind in (MIDDLE, LAST))
        message = message + data if is_open else data
        is_open = kind in (FIRST, MIDDLE)
        if not is_open:
            found.append(Record())
            found[-1].ParseFromString(message)
    if not found or not found[-1].HasField("exit"):
        raise UnfinishedError
    return found


def finished_records(file: Path) -> list[Record]:
    """All of them: a run's ``finish()`` returns some milliseconds before the last are written."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return records(file.read_bytes())
        except UnfinishedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@dataclass
class OfflineRun:
    folder: Path
    run: RunRecord
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)  # nested keys joined by "."
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None

    def table(self, name: str) -> list[dict[str, Any]]:
        """The rows of a logged table, from the media file that is uploaded."""
        (file,) = (self.folder / "files/media/table").glob(f"{name}_*.table.json")
        table = json.loads(file.read_text())
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_offline_run(parent: Path) -> OfflineRun:
    """What the one offline run in ``parent`` logged; a later value of a key replaces an earlier."""
    (file,) = parent.glob("wandb/offline-run-*/*.wandb")
    found = OfflineRun(file.parent, RunRecord())
    for record in finished_records(file):
        match record.WhichOneof("record_type"):
            case "run":
                found.run = record.run
                found.config |= _values(record.run.config.update)
            case "config":
                found.config |= _values(record.config.update)
            case "summary":
                found.summary |= _values(record.summary.update)
            case "history":
                found.history.append(_values(record.history.item))
            case "exit":
                found.exit_code = record.exit.exit_code
    return found
