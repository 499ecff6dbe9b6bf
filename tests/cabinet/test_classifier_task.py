"""``eval.py task=cabinet model=DIR task_data=FILE.jsonl`` on a small folder, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qat.cabinet import measure
from qat.cabinet.classifier_task import open_classifier, read_pairs
from tests.cabinet.cabinet_rows import CEILINGS

WORDS = [f"word{i}" for i in range(30)]
NAMES = ["bad", "fair", "good"]
FAST = ("variants=[fp32,rtn_int4,gptq_int4,torchao Int8WeightOnly]", "eval.repeats=1",
        "eval.resamples=50")  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_ceilings", lambda _: CEILINGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights with 16 positions, and the tokenizer of its 30 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("classifier")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(path)
    config = BertConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, num_labels=3,
        id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight *= 20
        model.classifier.weight *= 20
    model.save_pretrained(path)
    return path


def rows_of(count: int = 60) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"text": " ".join(rng.choice(WORDS, rng.integers(2, 12))), "label": NAMES[i % 3]}
        for i in range(count)
    ]


def write(rows: list[Any], path: str = "task.jsonl") -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_rows_are_of_the_classifier(folder: Path, program) -> None:
    task = write(rows_of())
    asked = ("eval.py", "task=cabinet", f"model={folder}", f"task_data={task}", "out=c",
             "labels.ordered=true", *FAST)  # fmt: skip
    done = program(*asked)
    assert done.code == 0, done.err
    rows = {row["variant"]: row for row in json.loads(Path("c/results.json").read_text())}
    assert list(rows) == ["fp32", "rtn_int4", "gptq_int4", "torchao Int8WeightOnly"]
    model, tokenizer = open_classifier(folder)
    said, names = [], [row["label"] for row in rows_of()]
    with torch.no_grad():
        for row in rows_of():  # one by one: nothing is padded
            ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
            said.append(int(model.eval()(input_ids=ids).logits.argmax()))
    right = [NAMES[k] == name for k, name in zip(said, names, strict=True)]
    assert rows["fp32"]["accuracy"] == pytest.approx(np.mean(right))
    assert "kappa" in rows["fp32"]
    assert rows["rtn_int4"]["val_loss"] != rows["fp32"]["val_loss"]
    manifest = json.loads(Path("c/manifest.json").read_text())
    assert manifest["kept"] == ["classifier.bias", "classifier.weight"]
    # The labels as numbers are the same labels: the folder goes on, and nothing is measured.
    numbers = [row | {"label": NAMES.index(row["label"])} for row in rows_of()]
    write(numbers)
    again = program(*asked)
    assert again.code == 0, again.err
    assert "fp32:" not in again.err


@pytest.mark.parametrize(
    ("change", "settings", "line"),
    [
        ([{"text": "word1", "label": "fine"}], (), "line 61: label 'fine' is none of the model's: "
         "bad, fair, good"),
        ([{"text": "word1", "label": 7}] * 2, (), "label 7, but the model's head has 3 classes"),
        ([{"text": "word1"}], (), 'line 61 is not {"text": "...", "label": a name or a whole nu'),
        ([[1]], (), "line 61 is not {"),
        ([{"text": "word1 " * 17, "label": 0}], (), "line 61 has 17 tokens, the model's positions "
         "end at 16: give labels.max_tokens=16"),
        ([], ("labels.max_tokens=99",), "labels.max_tokens = 99: the model has 16 positions"),
        ([], ("keep=[nothing*]",), "keep: 'nothing*' matches no parameter or module"),
        ([], ("variants=[int9]",), "variants = ['int9']: names none of fp32"),
        ([], ("run=x",), "run = x: give it or model=DIR"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(
    change: list[Any], settings: tuple[str, ...], line: str, folder: Path, program
) -> None:
    task = write([*rows_of(), *change])
    done = program(
        "eval.py", "task=cabinet", f"model={folder}", f"task_data={task}", "out=c", *settings
    )
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert line in done.err
    assert not Path("c/manifest.json").exists()


@pytest.mark.slow
def test_folders_that_are_no_classifier(folder: Path, program) -> None:
    task = write(rows_of())

    def told(*settings: str) -> str:
        done = program("eval.py", "task=cabinet", *settings)
        assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
        return done.err

    assert "task_data = null: give model=DIR task_data=FILE.jsonl" in told(f"model={folder}")
    assert "model = null: give model=DIR task_data=" in told(f"task_data={task}")
    assert "task_data=lost.jsonl: No such file" in told(f"model={folder}", "task_data=lost.jsonl")
    assert "model=lost: has no config.json" in told("model=lost", f"task_data={task}")
    headless = Path("headless")
    headless.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (headless / file.name).write_bytes(file.read_bytes())
    weights = load_file(headless / "model.safetensors")
    save_file(
        {name: w for name, w in weights.items() if "classifier" not in name},
        headless / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    assert "has no classifier.bias: it was not trained" in told("model=headless",
                                                                f"task_data={task}")  # fmt: skip
    (headless / "model.safetensors").unlink()
    torch.save(weights, headless / "pytorch_model.bin")  # a pickle: never read
    assert "model=headless: " in told("model=headless", f"task_data={task}")


def test_blank_lines_are_no_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "a", "label": 1}\n\n')
    assert read_pairs(path) == [(2, "a", 1)]
