"""Minimal pairs: of two sentences, which does the model find likelier?

A pair is right if the good sentence has fewer nats in total than the bad one (not per token: both
say the same, and the bad one must not be excused for its length). A tie is wrong, and so is NaN.
Shares come with Wilson intervals; two models are compared on the pairs they disagree on.

Left out: comparing single words in context, and sentences that differ in more than one place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from qat.analysis.intervals import mcnemar_exact, wilson_interval
from qat.errors import UserError
from qat.evaluation.ranks import add_over_ranks, rank_and_ranks
from qat.evaluation.score import Scorer
from qat.text.corpus import LONE_SURROGATE

DEFAULT_KIND = "pairs"


@dataclass(frozen=True)
class Pair:
    good: str
    bad: str
    kind: str


@dataclass(frozen=True)
class Accuracy:
    """How many pairs were right; ``low`` and ``high`` bound the share (Wilson, level 0.95)."""

    num_right: int
    num_pairs: int
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Pairs that just one of two models got right, and the p-value that they are equally good."""

    only_first: int
    only_second: int
    p_value: float


def read_pairs(path: Path) -> list[Pair]:
    """Pairs of a .jsonl file, a JSON object with "good" and "bad" (and "kind") on each line.

    Empty lines are skipped, and so are other keys. UserError names the first line that is no pair.
    """
    pairs = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        pairs.append(_parse(line))
                    except ValueError as error:
                        where = f"eval.pairs_file={path}, line {number}"
                        raise UserError(f"{where}: {error}") from None
    except OSError as error:
        raise UserError(f"eval.pairs_file={path}: {error.strerror or error}") from None
    if not pairs:
        raise UserError(f'eval.pairs_file={path}: no pairs; give lines {{"good": ..., "bad": ...}}')
    return pairs


def _parse(line: bytes) -> Pair:
    """ValueError says what is wrong with a line."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(row, dict):
        raise ValueError('not an object with "good" and "bad"')
    row = {"kind": DEFAULT_KIND, **row}
    for key in ("good", "bad", "kind"):
        if key not in row:
            raise ValueError(f'"{key}" is missing')
        if not isinstance(row[key], str):
            raise ValueError(f'"{key}" is not a string')
        if not row[key].strip():
            raise ValueError(f'"{key}" is empty')
        if LONE_SURROGATE.search(row[key]):
            raise ValueError(f'"{key}" has half of a surrogate pair')
    pair = Pair(row["good"], row["bad"], row["kind"])
    if pair.good == pair.bad:
        raise ValueError('"good" and "bad" are the same')
    return pair


def are_right(good_nats: np.ndarray, bad_nats: np.ndarray) -> np.ndarray:
    """Total nats of the sentences of each pair, (P,) and (P,) -> (P,) bool."""
    return good_nats < bad_nats


def accuracy(is_right: np.ndarray) -> Accuracy:
    """Of (P,) bool."""
    num_right = int(is_right.sum())
    return Accuracy(num_right, len(is_right), *wilson_interval(num_right, len(is_right)))


def accuracy_by_kind(pairs: list[Pair], is_right: np.ndarray) -> dict[str, Accuracy]:
    """Of (P,) bool, one for each kind in the order of the pairs."""
    kinds = [pair.kind for pair in pairs]
    masks = {kind: np.array([other == kind for other in kinds]) for kind in dict.fromkeys(kinds)}
    return {kind: accuracy(is_right[mask]) for kind, mask in masks.items()}


def compare(first_is_right: np.ndarray, second_is_right: np.ndarray) -> Comparison:
    """Two models on the same pairs, (P,) bool each: McNemar's exact test."""
    only_first = int((first_is_right & ~second_is_right).sum())
    only_second = int((second_is_right & ~first_is_right).sum())
    return Comparison(only_first, only_second, mcnemar_exact(only_first, only_second))


@torch.inference_mode()
def sentence_nats(
    scorer: Scorer, weights: Mapping[str, Tensor], sentences: Sequence[Sequence[int]], title: str
) -> Tensor:
    """-ln of the probability of each sentence given its BOS: (S,) float64, on the CPU.

    ``sentences`` are token ids with BOS. Batches are dealt out to the ranks.
    """
    placed = {name: w.to(scorer.device) for name, w in weights.items()}
    order = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))
    rows = max(1, scorer.settings.batch_tokens // len(sentences[order[0]]))
    batches = [order[i : i + rows] for i in range(0, len(order), rows)]
    rank, ranks = rank_and_ranks()
    totals = torch.zeros(len(sentences), dtype=torch.float64, device=scorer.device)
    quiet = rank != 0 or not scorer.console.is_terminal
    for batch in track(
        batches[rank::ranks], title, console=scorer.console, transient=True, disable=quiet
    ):
        lengths = torch.tensor([len(sentences[i]) for i in batch])
        ids = torch.zeros(len(batch), int(lengths[0]), dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : lengths[row]] = torch.tensor(sentences[i])
        ids = ids.to(scorer.device)
        bf16 = scorer.settings.precision == "bf16"
        with torch.autocast(scorer.device.type, torch.bfloat16, enabled=bf16):
            logits_BTV = torch.func.functional_call(scorer.model, placed, (ids[:, :-1],))
        nats_BT = F.cross_entropy(logits_BTV.mT, ids[:, 1:], reduction="none").double()
        is_target = torch.arange(1, ids.shape[1]) < lengths[:, None]
        nats_BT[~is_target.to(scorer.device)] = 0.0
        totals[torch.tensor(batch, device=scorer.device)] = nats_BT.sum(1)
    add_over_ranks(totals)
    return totals.cpu()
