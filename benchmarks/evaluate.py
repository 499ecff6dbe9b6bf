"""What evaluation costs, at the size of real data.

    .venv/bin/python benchmarks/evaluate.py --sliding  # table on stdout, JSON in logs/sliding.json
    .venv/bin/python benchmarks/evaluate.py --audit    # ... in logs/audit.json

``--sliding``: windows of 256 with a stride of 64 at the laptop shapes (random weights and tokens),
against loops that compute all logits of every window: one window at a time with torch's attention,
as a trainer's own model would do it, the same with the attention of this project, and that in
batches of the same size. Losses must agree to 1e-6.

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
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qat.evaluation.score import Scorer  # noqa: E402
from qat.model.gpt import GPT, Attention  # noqa: E402
from qat.model.spec import ModelSpec  # noqa: E402
from qat.settings.schema import EvalSettings  # noqa: E402
from qat.text.audit import audit  # noqa: E402
from qat.text.byte_table import ByteTable  # noqa: E402
from qat.text.shards import ShardWriter, TokenStream  # noqa: E402
from qat.text.tokenizer import BOS_ID  # noqa: E402

AUDIT_CHILD = "--audit-child"
VOCAB_SIZE = 1024
SHORTEST, LONGEST = 50, 3000  # tokens of a document
SLIDING_TOKENS, SEQ_LEN, STRIDE, ROUNDS = 6_000, 256, 64, 5
NAIVE = "one window at a time"
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
    found = audit(val, train, table, BOS_ID, 0, Console(stderr=True, quiet=True))
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


def _torchs_attention(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=True)


def _naive_sliding(scorer: Scorer, weights: dict[str, torch.Tensor], rows: int) -> float:
    """Mean loss in nats; all logits of ``rows`` windows at a time, the scored ones used."""
    with torch.device("meta"):
        gpt = GPT(scorer.spec)
    windows, total = scorer.windows, 0.0
    for first in range(0, len(windows.starts), rows):
        starts, tails = (found[first : first + rows] for found in (windows.starts, windows.tails))
        spans = np.stack([scorer.stream.take(int(start), SEQ_LEN + 1) for start in starts])
        ids = torch.from_numpy(spans)
        logits_BTV = torch.func.functional_call(gpt, weights, (ids[:, :-1],))
        nats_BT = F.cross_entropy(logits_BTV.mT, ids[:, 1:], reduction="none")
        scored = torch.arange(SEQ_LEN) >= SEQ_LEN - torch.from_numpy(tails)[:, None]
        total += float(nats_BT[scored].double().sum())
    return total / windows.num_targets


@torch.inference_mode()
def bench_sliding() -> None:
    torch.manual_seed(0)
    shape = ModelSpec(VOCAB_SIZE, 4, 288, 6, 3, 2, True)
    weights = {name: torch.randn_like(p) * 0.05 for name, p in GPT(shape).named_parameters()}
    table = ByteTable(
        torch.full((VOCAB_SIZE,), 3), torch.zeros(VOCAB_SIZE, dtype=torch.bool),
        torch.arange(VOCAB_SIZE) <= BOS_ID,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder), "val")
        writer.write(_random_documents(np.random.default_rng(0), 5)[:SLIDING_TOKENS])
        writer.close()
        stream = TokenStream(list(Path(folder).glob("*.bin")), "val")
        scorer = Scorer(
            shape, stream, table, SEQ_LEN, EvalSettings(stride=STRIDE), torch.device("cpu"),
            Console(quiet=True),
        )  # fmt: skip
        rows = scorer.settings.batch_tokens // SEQ_LEN
        attend = Attention.attend

        def with_torchs_attention() -> float:
            Attention.attend = staticmethod(_torchs_attention)
            try:
                return _naive_sliding(scorer, weights, 1)
            finally:
                Attention.attend = staticmethod(attend)

        ways = {
            NAIVE: with_torchs_attention,
            "... our attention": lambda: _naive_sliding(scorer, weights, 1),
            "... and in batches": lambda: _naive_sliding(scorer, weights, rows),
            "eval.stride": lambda: scorer.score(weights, "").val_loss,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):  # by turns, so that noise hits all of them
            losses = {}
            for name, way in ways.items():
                started = time.perf_counter()
                losses[name] = way()
                seconds[name].append(time.perf_counter() - started)
    spread = max(losses.values()) - min(losses.values())
    assert spread < 1e-6, losses
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    print(f"{scorer.windows.num_targets} targets, losses within {spread:.1e}")
    for name, median in medians.items():
        print(f"{name:24} {median:8.2f} s  x {medians[NAIVE] / median:.2f}")
    (ROOT / "logs" / "sliding.json").write_text(json.dumps(medians | {"spread": spread}) + "\n")


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
    mode.add_argument("--sliding", action="store_true", help="stride 64 against a plain loop")
    mode.add_argument("--audit", action="store_true", help="task=audit on random shards")
    mode.add_argument(AUDIT_CHILD, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of shards, for --audit")
    arguments = parser.parse_args()
    if arguments.audit_child:
        audit_child(Path(arguments.audit_child))
    elif arguments.sliding:
        bench_sliding()
    elif arguments.audit:
        bench_audit(arguments.gigabytes)


if __name__ == "__main__":
    main()
