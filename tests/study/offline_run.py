"""Reads what W&B keeps of an offline run, with no code of W&B's but the messages' types.

A ``.wandb`` file is ``:W&B``, 3 bytes of magic and version, then blocks of 32 KiB that hold
messages in LevelDB's log format: each fragment has its crc32, length and kind in front, and none
crosses the end of a block.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record, RunRecord

HEADER_BYTES, BLOCK_BYTES = 7, 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def fragments(raw: bytes) -> Iterator[tuple[int, bytes]]:
    assert raw[:4] == b":W&B"
    at = HEADER_BYTES
    while at < len(raw):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < HEADER_BYTES:  # no room for another fragment's head
            at += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", raw, at)
        data = raw[at + HEADER_BYTES : at + HEADER_BYTES + length]
        assert zlib.crc32(bytes([kind]) + data) == crc
        yield kind, data
        at += HEADER_BYTES + length


def records(file: Path) -> Iterator[Record]:
    message, is_open = b"", False
    for kind, data in fragments(file.read_bytes()):
        assert is_open == (kind in (MIDDLE, LAST))
        message = message + data if is_open else data
        is_open = kind in (FIRST, MIDDLE)
        if not is_open:
            record = Record()
            record.ParseFromString(message)
            yield record
    assert not is_open


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
    return {
        item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items
    }  # fmt: skip


def read_offline_run(run_folder: Path) -> OfflineRun:
    """What was logged, in order; a later value of a summary or config key replaces an earlier."""
    (file,) = run_folder.glob("*.wandb")
    found = OfflineRun(run_folder, RunRecord())
    for record in records(file):
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
