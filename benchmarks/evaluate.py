"""What evaluation costs, at the size of real data.

    .venv/bin/python benchmarks/evaluate.py --audit    # table on stdout, JSON in logs/audit.json

``--audit``: the computation of ``task=audit`` on shards of random tokens in a temporary folder, a
twentieth of them validation text, some of whose documents are planted in the training text. It
runs in a process of its own, so that peak memory is that of the audit and of what it imports. The
shards were just written: they are read from the page cache where there is room for them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qat.language.audit import audit  # noqa: E402
from qat.language.bits_per_byte import ByteTable  # noqa: E402
from qat.language.shards import ShardWriter, TokenStream  # noqa: E402
from qat.language.tokenizer import BOS_ID  # noqa: E402

AUDIT_CHILD = "--audit-child"
VOCAB_SIZE = 1024
SHORTEST, LONGEST = 50, 3000  # tokens of a document
PLANTED = 25  # validation documents in the training text


def _random_documents(random: np.random.Generator, count: int) -> list[int]:
    """BOS and random tokens, ``count`` times."""
    lengths = random.integers(SHORTEST, LONGEST + 1, count)
    tokens = random.integers(BOS_ID + 1, VOCAB_SIZE, int((lengths + 1).sum()), np.uint16)
    tokens[np.cumsum(lengths + 1) - lengths - 1] = BOS_ID
    return tokens.tolist()


def write_shards(folder: Path, num_bytes: int) -> None:
    """Shards of both sides, ``num_bytes`` together."""
    random = np.random.default_rng(0)
    val, train = (ShardWriter(folder, side) for side in ("val", "train"))
    planted = _random_documents(random, PLANTED)
    for writer in (val, train):
        writer.write(planted)
    while 2 * (val.num_tokens + train.num_tokens) < num_bytes:
        val.write(_random_documents(random, 100))
        train.write(_random_documents(random, 1_900))
    for writer in (val, train):
        writer.close()


def audit_child(folder: Path) -> None:
    """Audit the shards and print seconds, bytes and peak memory as JSON."""
    table = ByteTable(
        torch.full((VOCAB_SIZE,), 3),
        torch.arange(VOCAB_SIZE) % 3 == 0,
        torch.arange(VOCAB_SIZE) <= BOS_ID,
    )
    started = time.perf_counter()
    val, train = (
        TokenStream(list(folder.glob(f"{side}_*.bin")), side) for side in ("val", "train")
    )
    found = audit(val, train, table, 0, Console(stderr=True, quiet=True))
    seconds = time.perf_counter() - started
    assert found.train is not None
    assert found.overlap is not None
    assert found.overlap.num_documents == PLANTED, found.overlap
    tokens = found.val.num_tokens + found.train.num_tokens
    measured = {
        "gigabytes": tokens * 2 / 1e9,
        "documents": found.val.num_documents + found.train.num_documents,
        "seconds": seconds,
        "gigabytes_per_second": tokens * 2 / 1e9 / seconds,
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    print(json.dumps(measured))


def bench_audit(gigabytes: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), int(gigabytes * 1e9))
        command = [sys.executable, __file__, AUDIT_CHILD, folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(done.stdout)
    for name, value in measured.items():
        print(f"{name:22} {value:12,.2f}")
    (ROOT / "logs" / "audit.json").write_text(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--audit", action="store_true", help="task=audit on random shards")
    mode.add_argument(AUDIT_CHILD, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of shards, for --audit")
    arguments = parser.parse_args()
    if arguments.audit_child:
        audit_child(Path(arguments.audit_child))
    elif arguments.audit:
        bench_audit(arguments.gigabytes)


if __name__ == "__main__":
    main()
