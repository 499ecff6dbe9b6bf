"""A fine-tuned encoder, every way to store it, and one to ship.

    python examples/encoder/run.py

A ModernBERT-shaped encoder is trained to tell which of the 66 books of the World English Bible a
verse is from (13 to 2,461 verses a book), and which section of the canon, which is ordered. Then it
is trained on for a fifth as long as each of six arms: as floats, and with QAT on five grids. The
float arm is stored by all that the cabinet has; the files of QAT are rows beside it. The last word
has an envelope of constraints. What was finished is not done again; ``--help`` lists the settings.
"""

from __future__ import annotations

import argparse
import copy
import io
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertModel

from qat import Plan, QatModel, cabinet
from qat.cabinet.choose_task import print_choice
from qat.cabinet.grid_variants import GRIDS, SHIPPED
from qat.cabinet.labelled import MACRO_F1, LabelledTask, Labels
from qat.report.cabinet_page import write_page
from qat.text.corpus import bible_verses

SECTION_ENDS = (5, 17, 22, 27, 39, 43, 44, 57, 65, 66)  # Law, History, Poetry, ..., Revelation
TEST_SHARE, LEAST_TEST = 20, 4  # every 20th verse of a book, 4 at least
MAX_TOKENS, VOCABULARY, BATCH = 64, 4096, 64
PADDING = 0
HEADS = {"book": 66, "section": len(SECTION_ENDS)}
KEEP = ["book*", "section*"]  # heads stay float32, bit for bit
QAT_GRIDS = {name: (GRIDS | SHIPPED)[name] for name in ("int8", "int6", "int4", "int3", "mxfp4")}
VARIANTS = [
    "fp32", "bf16", "fp16", *(f"{way}_{grid}" for way in ("rtn", "gptq", "qat") for grid in
    QAT_GRIDS), "awq_int4_e8", "smoothquant_w8a8", "torchao *", "bitsandbytes *",
]  # fmt: skip


class BookReader(nn.Module):
    """(B, T) ids -> logits of each head, from the mean of all positions that are no padding."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        config = ModernBertConfig(
            vocab_size=VOCABULARY, hidden_size=dim, intermediate_size=3 * dim // 2,
            num_hidden_layers=layers, num_attention_heads=dim // 32,
            max_position_embeddings=MAX_TOKENS, pad_token_id=PADDING, bos_token_id=1,
            eos_token_id=2, cls_token_id=1, sep_token_id=2, attn_implementation="sdpa",
        )  # fmt: skip
        self.encoder = ModernBertModel(config)
        self.book, self.section = (nn.Linear(dim, classes) for classes in HEADS.values())

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        found = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        mask_BT1 = attention_mask[..., None]
        mean_BC = (found.last_hidden_state * mask_BT1).sum(1) / mask_BT1.sum(1)
        return {"book": self.book(mean_BC), "section": self.section(mean_BC)}


class Verses:
    """Token ids and both labels of some verses."""

    def __init__(self, ids: list[list[int]], books: np.ndarray) -> None:
        sections = np.searchsorted(SECTION_ENDS, books, side="right")
        self.ids, self.labels = ids, {"book": books, "section": sections}

    def batch(self, at: np.ndarray) -> dict[str, Tensor]:
        rows = [self.ids[i] for i in at]
        width = -(-max(map(len, rows)) // 8) * 8
        ids = torch.tensor([row + [PADDING] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != PADDING).long()}

    def in_order(self) -> list[dict[str, Tensor]]:
        return [self.batch(at) for at in np.split(np.arange(len(self.ids)), self._cuts())]

    def _cuts(self) -> range:
        return range(BATCH, len(self.ids), BATCH)

    def shuffled(self, seed: int) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Batches and their labels, without end."""
        rng = np.random.default_rng(seed)
        while True:
            for at in np.split(rng.permutation(len(self.ids)), self._cuts()):
                labels = {head: torch.from_numpy(y[at]) for head, y in self.labels.items()}
                yield self.batch(at), labels


def read_verses(most: int | None) -> tuple[Verses, Verses]:
    """Training and test verses, the latter spread over each book. ``most``: of each book."""
    by_book: list[list[str]] = [[] for _ in range(HEADS["book"])]
    for book, text in bible_verses():
        by_book[book].append(text)
    texts: dict[bool, list[tuple[str, int]]] = {True: [], False: []}
    for book, verses in enumerate(verses[:most] for verses in by_book):
        count = max(LEAST_TEST, len(verses) // TEST_SHARE)
        chosen = {(2 * k + 1) * len(verses) // (2 * count) for k in range(count)}
        for at, text in enumerate(verses):
            texts[at in chosen].append((text, book))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((text for text, _ in texts[False]), trainer)

    def encoded(pairs: list[tuple[str, int]]) -> Verses:
        found = tokenizer.encode_batch([text for text, _ in pairs])
        ids = [[1, *one.ids[: MAX_TOKENS - 2], 2] for one in found]
        return Verses(ids, np.array([book for _, book in pairs]))

    return encoded(texts[False]), encoded(texts[True])


def train(
    name: str, model: nn.Module, verses: Verses, seconds: float, rate: float, seed: int
) -> int:
    """AdamW until the clock stops, its rate rising for a twentieth and then falling to 0; updates
    made. The clock counts seconds of processor time, which others on the machine do not take."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    model.train()
    updates, started = 0, time.process_time()
    for batch, labels in verses.shuffled(seed):
        share = (time.process_time() - started) / seconds
        if share >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(20 * share, 1.0) * (1.0 - share)
        outputs = model(**batch)
        loss = torch.stack([F.cross_entropy(outputs[head], labels[head]) for head in HEADS]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        if updates % 200 == 1:
            print(f"{name}: {share:4.0%}, update {updates}, loss {loss.item():.3f}", flush=True)
    model.eval()
    print(f"{name}: {updates} updates in {seconds:.0f} s of processor time", flush=True)
    return updates


def trained(model: BookReader, file: Path, *how: object) -> BookReader:
    """From ``file`` if it is there."""
    if file.is_file():
        model.load_state_dict(load_file(file))
    else:
        train(file.stem, model, *how)  # type: ignore[arg-type]
        save_file(dict(model.state_dict()), file)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("logs/encoder"), help="folder")
    parser.add_argument("--seconds", type=float, default=300.0, help="processor, first training")
    parser.add_argument("--more-seconds", type=float, default=60.0, help="processor, each arm")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--most", type=int, help="verses of a book; all by default")
    parser.add_argument("--variants", nargs="*", default=VARIANTS, help="rows of the table")
    s = parser.parse_args()
    s.out.mkdir(parents=True, exist_ok=True)
    verses, test = read_verses(s.most)
    print(f"{len(verses.ids):,} verses to train on, {len(test.ids):,} to test", flush=True)
    torch.manual_seed(0)
    base = trained(
        BookReader(s.dim, s.layers), s.out / "base.safetensors", verses, s.seconds, 2e-3, 0
    )
    arm = (verses, s.more_seconds, 5e-4, 1)
    floats = trained(copy.deepcopy(base), s.out / "float.safetensors", *arm)
    files = {f"qat_{name}": s.out / f"{name}.qat" for name in QAT_GRIDS}
    for name, grid in QAT_GRIDS.items():
        if not files[f"qat_{name}"].is_file():
            model = copy.deepcopy(base)
            quantized = QatModel(model, Plan.for_model(model, grid, keep=KEEP)).qat(True)
            train(f"qat_{name}", quantized, *arm)
            quantized.save(files[f"qat_{name}"], "mix")
    labels = {
        head: Labels(
            test.labels[head], classes, is_ordered=head == "section",
            training_counts=np.bincount(verses.labels[head], minlength=classes),
        )
        for head, classes in HEADS.items()
    }  # fmt: skip
    calibration = [batch for (batch, _), _ in zip(verses.shuffled(2), range(16), strict=False)]
    rows = cabinet.run(
        floats, calibration, LabelledTask(test.in_order(), labels), folder=s.out / "cabinet",
        variants=s.variants, keep=KEEP, files=files,
    )  # fmt: skip
    float_row = next(row for row in rows if row["variant"] == "fp32")
    envelope = {
        "macro_f1": float_row["macro_f1"] - 0.01,
        "ece": float_row["ece"] + 0.01,
        "throughput_speedup": 0.7,  # timed in turn with fp32
        "artifact_bytes": float_row["disk_bytes"] / 5,
    }
    with redirect_stdout(io.StringIO()) as told:
        print_choice(rows, envelope, MACRO_F1)
    write_page(s.out / "cabinet")
    (s.out / "cabinet" / "CHOICE.txt").write_text(told.getvalue(), encoding="utf-8")
    print(told.getvalue())


if __name__ == "__main__":
    main()
