"""val_loss and val_bpb of a set of weights: the one function behind every score in this project.

Float, snapped and artifact weights are scored with the same precision and batch shape, so that
their differences are quantization and nothing else. Logits are computed where targets are scored
and nowhere else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from qat.errors import UserError
from qat.evaluation.ranks import add_over_ranks, rank_and_ranks
from qat.evaluation.windows import Batch, Windows, document_windows, read_batches, stream_windows
from qat.model.registry import empty_model, last_logits
from qat.model.spec import ModelSpec
from qat.settings.checks import check_eval
from qat.text.byte_table import ByteTable, bits_per_byte
from qat.text.shards import TokenStream

if TYPE_CHECKING:
    from qat.settings.schema import EvalSettings


SAID_SECONDS = 10.0  # what takes longer is said beforehand


@dataclass(frozen=True)
class Score:
    """``val_loss`` in nats per token, ``val_bpb`` in bits per UTF-8 byte of the tokens scored."""

    val_loss: float
    val_bpb: float
    num_tokens: int
    num_bytes: int
    of_tokens: int  # that could be scored; the others are left out for the sake of time


@dataclass(frozen=True)
class Scorer:
    """Scores any weights of one model on one validation stream.

    ``seq_len`` is that of training; ``settings`` may name another. Under torchrun whole batches
    are dealt out to the ranks, so sums differ by their order only; they are added up in float64.
    """

    spec: ModelSpec
    stream: TokenStream
    byte_table: ByteTable
    seq_len: int
    settings: EvalSettings
    device: torch.device
    console: Console
    max_targets: int | None = None  # score so many only, spread over the text
    module: nn.Module | None = None  # computes in place of the plain model
    bos_id: int | None = None  # what starts each document; None: it is not known

    def __post_init__(self) -> None:
        if not self.windows.num_targets:
            name = "eval.seq_len" if self.settings.seq_len else "seq_len"
            raise UserError(
                f"{name} = {self.settings.seq_len or self.seq_len}: the validation text "
                f"({self.stream.setting}) has only {len(self.stream)} tokens"
            )
        batches = read_batches(self.stream, self.windows.batches(self.settings.batch_tokens))
        if not any(self.byte_table.count(b.previous, b.targets).any() for b in batches):
            raise UserError(f"{self.stream.setting}: its tokens stand for no bytes of text")

    @cached_property
    def all_windows(self) -> Windows:
        s = self.settings
        check_eval(s, self.seq_len)
        seq_len, num_tokens = s.seq_len or self.seq_len, len(self.stream)
        if s.by_document:
            return document_windows(self.document_starts, num_tokens, seq_len, s.stride)
        return stream_windows(num_tokens, seq_len, s.stride)

    @cached_property
    def windows(self) -> Windows:
        """Those that are scored: the same of one text for all models."""
        limits = [n for n in (self.max_targets, self.settings.max_tokens) if isinstance(n, int)]
        return self.all_windows.spread(min(limits)) if limits else self.all_windows

    @cached_property
    def positions(self) -> np.ndarray:
        """Input positions of the targets that are scored, sorted, (N,) int64."""
        return self.windows.positions()

    @cached_property
    def model(self) -> nn.Module:
        """Token ids -> logits, with weights that are handed in."""
        return self.module or empty_model(self.spec)

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Input positions where documents start, (D,) int64; what precedes the first BOS is one.
        UserError if nothing tells where."""
        if self.bos_id is None:
            raise UserError(
                "data.tokenizer: its vocabulary has no BOS, which tells where a document starts "
                "(eval.by_document, eval=full); give shards and a tokenizer with one"
            )
        starts = self.stream.find(self.bos_id)
        if not len(starts):
            raise UserError(
                f"{self.stream.setting}: BOS (id {self.bos_id}), which starts a document "
                "(eval.by_document, eval=full), is nowhere in it; give shards with BOS"
            )
        return starts if len(starts) and starts[0] == 0 else np.append(0, starts)

    def batches(self, title: str, needed: np.ndarray | None = None) -> Iterator[Batch]:
        """This rank's batches, on the device; ``title`` is said on the progress bar, and how long
        it will take if that is long.

        Their positions count the scored targets alone, in the order of the stream. ``needed`` (by
        such positions): leave out windows whose targets are none of these.
        """
        rank, ranks = rank_and_ranks()
        windows, is_part = self.windows, self.windows is not self.all_windows
        if needed is not None:
            by_input = np.zeros(len(self.stream), dtype=bool)
            by_input[self.positions if is_part else slice(len(needed))] = needed
            windows = windows.holding(by_input)
        batches = windows.batches(self.settings.batch_tokens)[rank::ranks]
        quiet = rank != 0 or not self.console.is_terminal
        read = read_batches(self.stream, batches)
        for number, batch in enumerate(
            track(read, title, len(batches), console=self.console, transient=True, disable=quiet)
        ):
            if number == 1:  # the first pays for cold caches
                started = time.perf_counter()
            elif number == 3 and rank == 0:
                seconds = (time.perf_counter() - started) / 2 * (len(batches) - 1)
                if seconds > SAID_SECONDS:
                    told = f"{title}: {windows.num_targets:,} tokens, about {seconds:.0f} s"
                    self.console.print(told, soft_wrap=True)
            if is_part:
                at = np.searchsorted(self.positions, batch.positions.numpy())
                batch = replace(batch, positions=torch.from_numpy(at))
            yield batch.to(self.device)

    def forward(
        self, weights: Mapping[str, Tensor], title: str, needed: np.ndarray | None = None
    ) -> Iterator[tuple[Batch, Tensor]]:
        """This rank's batches, with the logits (N, V) of their scored targets, on the device.

        To be read inside ``torch.inference_mode``.
        """
        placed = {name: w.to(self.device) for name, w in weights.items()}
        bf16 = self.settings.precision == "bf16"
        for batch in self.batches(f"scoring {title}", needed):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                logits_BTV = last_logits(self.model, placed, batch.ids, batch.tail)
            if logits_BTV.shape[:2].numel() == len(batch.rows):  # no padding: nothing to pick
                yield batch, logits_BTV.flatten(0, 1)
            else:
                yield batch, logits_BTV[batch.rows, batch.columns]

    @torch.inference_mode()
    def score(self, weights: Mapping[str, Tensor], title: str) -> Score:
        """Score ``weights`` (name -> float32 tensor); ``title`` names them on the progress bar."""
        table = self.byte_table.to(self.device)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # nats, bytes, tokens
        for batch, logits_NV in self.forward(weights, title):
            nats = F.cross_entropy(logits_NV, batch.targets, reduction="none")
            sums[0] += nats.double().sum()
            sums[1] += table.count(batch.previous, batch.targets).sum()
            sums[2] += batch.targets.numel()
        add_over_ranks(sums)
        nats_sum, num_bytes, num_tokens = sums.tolist()
        loss = nats_sum / num_tokens
        bpb = bits_per_byte(nats_sum, int(num_bytes)) if math.isfinite(loss) else loss
        return Score(loss, bpb, int(num_tokens), int(num_bytes), self.all_windows.num_targets)
