"""``eval.py task=cabinet model=DIR task_data=FILE.jsonl``: of a Hugging Face text classifier.

Labels are names that the model's config knows, or numbers. Half of the texts of every label is what
temperatures are searched on, and what GPTQ and its like are calibrated on, which see no labels; F1
and its like are of all texts. Weights are read from safetensors only, and nothing of the folder is
executed. Only the disk is asked, never a hub.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qat.cabinet.any_model import run as run_cabinet
from qat.cabinet.labelled import LabelledTask, Labels
from qat.errors import UserError, of_system

if TYPE_CHECKING:
    from qat.settings.schema import EvalTaskSettings

BATCH_TEXTS = 32
CALIBRATION_TEXTS = 256
HEAD = "logits"


def run(s: EvalTaskSettings) -> int:
    assert s.model.path is not None
    assert s.task_data is not None
    folder = Path(s.model.path)
    pairs = read_pairs(Path(s.task_data))
    model, tokenizer = open_classifier(folder)
    config = model.config
    targets = np.array(
        [class_of(label, config.label2id, f"task_data={s.task_data}: line {line}")
         for line, _, label in pairs]
    )  # fmt: skip
    names = [str(config.id2label.get(k, k)) for k in range(config.num_labels)]
    longest = getattr(config, "max_position_embeddings", None)
    texts = [(line, text) for line, text, _ in pairs]
    ids = encode(tokenizer, texts, s.task_data, longest, s.labels.max_tokens)
    order = np.argsort([len(one) for one in ids], kind="stable")  # less padding
    ids, targets = [ids[i] for i in order], targets[order]
    labels = Labels(
        targets, config.num_labels, names, s.labels.ordered, setting=f"task_data={s.task_data}"
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    padding = tokenizer.pad_token_id or 0
    seen = np.flatnonzero(labels.half_a)
    seen = seen[:: max(1, len(seen) // CALIBRATION_TEXTS)][:CALIBRATION_TEXTS]
    task = LabelledTask(
        batches_of(ids, padding, device), {HEAD: labels}, s.eval.num_bins, s.seed, s.eval.resamples
    )
    calibration = batches_of([ids[i] for i in seen], padding, device)
    middle = len(calibration) // 2  # of texts of middling length: the first batch is timed
    run_cabinet(
        model.to(device),
        calibration[middle:] + calibration[:middle],
        task,
        folder=s.out or folder / "cabinet",
        variants=s.variants,
        keep=heads_of(model, config.num_labels) if s.keep is None else s.keep,
        repeats=s.eval.repeats,
    )
    return 0


def read_pairs(path: Path) -> list[tuple[int, str, str | int]]:
    """(line, text, label). UserError names the first line that has none of them."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"task_data={path}: {error.strerror or of_system(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"task_data={path}: is not UTF-8") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(label, str | int) or isinstance(label, bool):
            wanted = '{"text": "...", "label": a name or a whole number}'
            raise UserError(f"task_data={path}: line {number} is not {wanted}")
        found.append((number, text, label))
    if not found:
        raise UserError(f"task_data={path}: there are no texts")
    return found


def class_of(label: str | int, label2id: dict[str, int], where: str) -> int:
    """UserError for a name that the model does not know."""
    if isinstance(label, int):
        return label
    if label not in label2id:
        known = ", ".join(list(label2id)[:8]) + (", ..." if len(label2id) > 8 else "")
        raise UserError(f"{where}: label {label!r} is none of the model's: {known}")
    return int(label2id[label])


def open_classifier(folder: Path) -> tuple[Any, Any]:
    """Model in float32 and tokenizer. UserError for what is not installed, or not there whole."""
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise UserError("model: needs transformers: pip install -e '.[cabinet]'") from None
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model={folder}: has no config.json; give the folder of a Hugging Face classifier"
        )
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False,
            dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"model={folder}: {str(error).strip().splitlines()[0]}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"model={folder}: its file has no {missing[0]}: it was not trained to classify"
        )
    return model, tokenizer


def encode(
    tokenizer: Any,
    texts: Sequence[tuple[int, str]],
    path: str,
    positions: int | None,
    max_tokens: int | None,
) -> list[list[int]]:
    """Ids of each text. UserError for one that is longer than the model's positions, unless texts
    are cut."""
    if max_tokens is not None and positions is not None and max_tokens > positions:
        raise UserError(f"labels.max_tokens = {max_tokens}: the model has {positions} positions")
    cut = {} if max_tokens is None else {"truncation": True, "max_length": max_tokens}
    found: list[list[int]] = tokenizer([text for _, text in texts], **cut)["input_ids"]
    for (line, _), ids in zip(texts, found, strict=True):
        if positions is not None and len(ids) > positions:
            raise UserError(
                f"task_data={path}: line {line} has {len(ids)} tokens, the model's positions end "
                f"at {positions}: give labels.max_tokens={positions} to cut such texts"
            )
    return found


def batches_of(
    ids: Sequence[Sequence[int]], padding: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """In their order, padded to the longest of each batch."""
    found = []
    for start in range(0, len(ids), BATCH_TEXTS):
        part = [torch.tensor(one) for one in ids[start : start + BATCH_TEXTS]]
        mask = [torch.ones_like(one) for one in part]
        found.append(
            {
                "input_ids": nn.utils.rnn.pad_sequence(part, True, padding).to(device),
                "attention_mask": nn.utils.rnn.pad_sequence(mask, True, 0).to(device),
            }
        )
    return found


def heads_of(model: nn.Module, num_labels: int) -> list[str]:
    """Names of the layers that give as many numbers as there are labels, the last of them."""
    found = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == num_labels
    ]
    return found[-1:]
