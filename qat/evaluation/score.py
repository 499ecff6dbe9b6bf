"""val_loss and val_bpb of a set of weights: the one function behind every score in this project.

Float, snapped and artifact weights are scored with the same precision and batch shape, so that
their differences are quantization and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from qat.errors import UserError
from qat.language.batches import validation_batch, validation_windows
from qat.language.bits_per_byte import ByteTable, bits_per_byte
from qat.language.gpt import GPT, GPTShape
from qat.language.shards import TokenStream


@dataclass(frozen=True)
class Score:
    """``val_loss`` in nats per token, ``val_bpb`` in bits per UTF-8 byte of the tokens scored."""

    val_loss: float
    val_bpb: float
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True)
class Scorer:
    """Scores any weights of one model shape on one validation stream.

    Windows of ``seq_len`` do not overlap and the incomplete last one is dropped, as in the
    baseline. Under torchrun the batches are dealt out to the ranks and the sums added up in
    float64."""

    shape: GPTShape
    stream: TokenStream
    byte_table: ByteTable
    seq_len: int
    batch_tokens: int
    precision: str
    device: torch.device
    console: Console

    def __post_init__(self) -> None:
        num_windows = validation_windows(self.stream, self.seq_len)
        if num_windows < 1:
            raise UserError(
                f"seq_len = {self.seq_len}: the validation text has only {len(self.stream)} tokens"
            )
        windows = (validation_batch(self.stream, self.seq_len, i, 1) for i in range(num_windows))
        if not any(self.byte_table.count(*window).any() for window in windows):
            raise UserError(f"{self.stream.setting}: its tokens stand for no bytes of text")

    @torch.inference_mode()
    def score(self, weights: Mapping[str, Tensor], title: str) -> Score:
        """Score ``weights`` (name -> float32 tensor); ``title`` names them on the progress bar."""
        with torch.device("meta"):
            gpt = GPT(self.shape)
        placed = {name: w.to(self.device) for name, w in weights.items()}
        table = self.byte_table.to(self.device)
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        num_windows = validation_windows(self.stream, self.seq_len)
        per_batch = max(1, self.batch_tokens // self.seq_len)
        starts = range(rank * per_batch, num_windows, ranks * per_batch)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # nats, bytes, tokens
        quiet = rank != 0 or not self.console.is_terminal
        for first in track(
            starts, f"scoring {title}", console=self.console, transient=True, disable=quiet
        ):
            count = min(per_batch, num_windows - first)
            ids, targets = validation_batch(self.stream, self.seq_len, first, count)
            ids, targets = ids.to(self.device), targets.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                logits_BTV = torch.func.functional_call(gpt, placed, (ids,))
            nats = F.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten(), reduction="none")
            sums[0] += nats.double().sum()
            sums[1] += table.count(ids, targets).sum()
            sums[2] += targets.numel()
        if ranks > 1:
            dist.all_reduce(sums)
        nats_sum, num_bytes, num_tokens = sums.tolist()
        loss = nats_sum / num_tokens
        bpb = bits_per_byte(nats_sum, int(num_bytes)) if math.isfinite(loss) else loss
        return Score(loss, bpb, int(num_tokens), int(num_bytes))
