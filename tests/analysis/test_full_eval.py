"""``eval.py eval=full`` as a whole, and the measurements that need a model."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from qat.analysis import layer_damage as layers
from qat.analysis.minimal_pairs import sentence_nats
from qat.analysis.reliability import TemperatureSearch
from qat.analysis.token_scores import ScoredText, scores_at, token_scores
from qat.evaluation.score import Scorer
from qat.model.gpt import GPT
from qat.settings.schema import EvalSettings
from qat.text.shards import ShardWriter, TokenStream
from qat.text.tokenizer import BOS_ID
from tests.conftest import ROOT
from tests.evaluation.test_windows import SHAPE, scorer
from tests.test_torchrun import torchrun

METRICS_DOC = ROOT / "docs" / "metrics.md"
NAMES = {  # as metrics.md abbreviates them
    "MODEL": "float|artifact",
    "TIER": "all|head|mid|tail",
    "KIND": "[a-z_]+",
    "T": "none|tuned|floats",
}
QUICK = ("eval.layers_tokens=300", "eval.repeats=2", "eval.resamples=50", "eval.batch_tokens=2048")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    gpt = GPT(SHAPE)
    return {name: torch.randn_like(p) * 0.3 for name, p in gpt.named_parameters()}


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    folder = tmp_path_factory.mktemp("shards")
    ids = np.random.default_rng(2).integers(2, 24, 400)
    ids[::40] = BOS_ID
    writer = ShardWriter(folder, "val")
    writer.write(ids.tolist())
    writer.close()
    return TokenStream(sorted(folder.glob("*.bin")), "data.val_files")


def test_token_scores_are_those_of_the_logits(stream: TokenStream, weights: dict) -> None:
    subject = scorer(stream, stride=5)
    text = ScoredText.of(subject)
    search = TemperatureSearch()
    in_search = torch.from_numpy(text.in_search)
    found = token_scores(subject, weights, search, in_search, "test")
    with torch.inference_mode():
        batches = list(subject.forward(weights, "test"))
        score = subject.score(weights, "test")
    at = torch.cat([batch.positions for batch, _ in batches])
    logits = torch.cat([logits for _, logits in batches])[at.argsort()]
    targets = torch.from_numpy(stream.take(1, 399))
    assert text.targets.tolist() == targets.tolist()
    assert found.nats.allclose(F.cross_entropy(logits, targets, reduction="none"))
    assert found.predicted.equal(logits.argmax(-1))
    assert found.confidence.allclose(logits.softmax(-1).amax(-1))
    assert float(found.nats.double().mean()) == pytest.approx(score.val_loss, abs=1e-9)
    assert text.num_bytes.sum() == score.num_bytes
    assert text.documents.tolist() == [i // 40 for i in range(399)]
    assert text.in_search.tolist() == [i // 40 % 2 == 0 for i in range(399)]
    assert int(search.sums[-1]) == text.in_search.sum()
    for (nats, confidence), temperature in zip(
        scores_at(subject, weights, [0.5, 2.0], ~text.in_search, "test"), (0.5, 2.0), strict=True
    ):
        judged = ~text.in_search
        nats, confidence = nats[judged], confidence[judged]
        scaled = logits / temperature
        expected = F.cross_entropy(scaled, targets, reduction="none")[judged]
        assert nats.allclose(expected, atol=1e-5)
        assert confidence.allclose(scaled.softmax(-1).amax(-1)[judged], atol=1e-6)


@pytest.mark.parametrize("asked", [{}, {"by_document": True}])
def test_a_part_of_the_text_is_read_as_in_the_whole(
    asked: dict, stream: TokenStream, weights: dict
) -> None:
    """``eval.max_tokens``: in windows that do not overlap a token's score is the same."""
    whole = scorer(stream, stride=None, **asked)
    part = scorer(stream, stride=None, max_tokens=100, **asked)
    texts = [ScoredText.of(subject) for subject in (whole, part)]
    chosen = part.positions
    assert len(chosen) == part.windows.num_targets <= 100 < whole.windows.num_targets
    assert chosen.max() > 300  # from all over the text
    nowhere = torch.zeros(len(texts[0].targets), dtype=torch.bool)
    found = [
        token_scores(subject, weights, None, nowhere, "test").nats for subject in (whole, part)
    ]
    assert found[1].equal(found[0][chosen])
    for name in ("targets", "num_bytes"):
        assert (getattr(texts[1], name) == getattr(texts[0], name)[chosen]).all()
    of_whole = texts[0].documents[chosen]
    assert (np.diff(texts[1].documents) == (np.diff(of_whole) > 0)).all()
    assert texts[1].num_documents == len(set(of_whole.tolist()))
    judged = np.arange(len(chosen)) == 50
    ((nats, _),) = scores_at(part, weights, [1.0], judged, "test")
    assert nats[50].allclose(found[1][50])
    score = part.score(weights, "test")
    assert score.val_loss == pytest.approx(float(found[1].double().mean()), abs=1e-9)
    assert (score.num_tokens, score.of_tokens) == (len(chosen), whole.windows.num_targets)


def test_one_document_is_halved_by_windows(stream: TokenStream) -> None:
    subject = scorer(stream)
    subject.__dict__["document_starts"] = np.array([0])
    text = ScoredText.of(subject)
    assert text.num_documents == 1
    assert text.in_search.tolist() == [i // 16 % 2 == 0 for i in range(384)]


@pytest.mark.parametrize("tied", [True, False])
def test_output_errors_are_those_of_the_outputs(tied: bool, stream: TokenStream) -> None:
    """Against the outputs themselves, caught in the float model."""
    shape = replace(SHAPE, tie_embeddings=tied)
    torch.manual_seed(3)
    gpt = GPT(shape)
    weights = {name: torch.randn_like(p) * 0.3 for name, p in gpt.named_parameters()}
    stored = {name: w + torch.randn_like(w) * 0.02 for name, w in weights.items()}
    table = scorer(stream).byte_table
    subject = Scorer(
        shape, stream, table, 16, EvalSettings(stride=4), torch.device("cpu"), Console(quiet=True)
    )
    matrices = [name for name, w in weights.items() if w.ndim == 2 and "resid" not in name
                and "skip" not in name]  # fmt: skip
    found = layers.layer_damage(subject, weights, stored, matrices, 10_000)
    assert [layer.tensor for layer in found] == matrices
    inputs: dict[str, torch.Tensor] = {}
    for name, module in gpt.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, x, name=name: inputs.__setitem__(f"{name}.weight", x[0].flatten(0, 1))
            )
    ids = torch.from_numpy(stream.take(0, 384)).view(-1, 16)
    targets = torch.from_numpy(stream.take(1, 384))
    with torch.inference_mode():
        logits = torch.func.functional_call(gpt, weights, (ids,))
        before = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        seen = dict(inputs)  # the changed models below overwrite them
        hidden = torch.atanh(logits.double() / 30) * 30  # of the head, before the softcap
        for layer in found:
            name, w, q = layer.tensor, weights[layer.tensor], stored[layer.tensor]
            if name == "tok_emb.weight" and not tied:
                output, error = w[ids], (q - w)[ids]
            elif name == "tok_emb.weight":
                output = hidden
                # The head alone is what counts, though the tensor is the lookup too.
                x = torch.linalg.lstsq(w.double(), hidden.flatten(0, 1).mT).solution.mT
                error = x @ (q - w).double().mT
            else:
                output, error = seen[name] @ w.mT, seen[name] @ (q - w).mT
            expected = float(error.double().norm() / output.double().norm())
            assert layer.output_error == pytest.approx(expected, rel=1e-3), name
            changed = torch.func.functional_call(gpt, weights | {name: q}, (ids,))
            after = F.cross_entropy(changed.flatten(0, 1), targets, reduction="sum")
            num_bytes = int((targets != BOS_ID).sum())
            rise = float(after - before) / num_bytes / math.log(2)
            assert layer.delta_bpb == pytest.approx(rise, abs=1e-5), name


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_sentences_are_scored_each_by_itself(
    batch_tokens: int, stream: TokenStream, weights: dict
) -> None:
    sentences = [[BOS_ID, *range(2, 2 + n)] for n in (3, 9, 1, 5, 9, 2)]
    found = sentence_nats(scorer(stream, batch_tokens=batch_tokens), weights, sentences, "test")
    gpt = GPT(SHAPE)
    for ids, nats in zip(sentences, found.tolist(), strict=True):
        with torch.inference_mode():
            logits = torch.func.functional_call(gpt, weights, (torch.tensor([ids[:-1]]),))[0]
        expected = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        assert nats == pytest.approx(float(expected), abs=1e-5)


def numbers(value: object, path: str = "") -> list[str]:
    """The paths of all numbers (and nulls) of a JSON value, list indices as ``*``."""
    if isinstance(value, dict):
        return [p for key, v in value.items() for p in numbers(v, f"{path}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [p for v in value for p in numbers(v, f"{path}.*")]
    return [] if isinstance(value, bool | str) else [path]


def documented() -> list[re.Pattern[str]]:
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \| (.+?) \|$", METRICS_DOC.read_text(), re.M)
    assert len(rows) > 40
    patterns = []
    for path, _, _ in rows:
        parts = [f"(?:{NAMES[p]})" if p in NAMES else re.escape(p) for p in path.split(".")]
        patterns.append(re.compile(r"\.".join(parts)))
    return patterns


@pytest.mark.slow
def test_every_number_has_a_unit_and_a_definition(finished: Path, program, cache_dir: Path) -> None:
    asked = (f"artifact={finished / 'artifact.qat'}", "eval=full", f"data.cache_dir={cache_dir}")
    done = program("eval.py", *asked, *QUICK, "out=found")
    assert done.code == 0, done.err
    metrics = json.loads(Path("found/metrics.json").read_text())
    assert metrics["left_out"] == {}
    paths, rules = numbers(metrics), documented()
    assert not [path for path in paths if not any(rule.fullmatch(path) for rule in rules)]
    unused = [rule.pattern for rule in rules if not any(rule.fullmatch(path) for path in paths)]
    assert not unused
    for picture in ("reliability.png", "tiers.png", "layers.png"):
        assert Path("found", picture).read_bytes()[:4] == b"\x89PNG"
    row = json.loads((finished / "result.json").read_text())
    for name in ("float", "artifact"):
        assert metrics["models"][name]["val_bpb"] == pytest.approx(row[f"val_bpb_{name}"], abs=1e-9)
    everything = metrics["damage"]["all"]
    assert everything["delta_bpb"]["estimate"] == pytest.approx(row["quant_gap_bpb"], abs=1e-9)
    tiers = [metrics["damage"][tier] for tier in ("head", "mid", "tail")]
    for key in ("tokens", "text_bytes", "flipped_predictions"):
        assert sum(tier[key] for tier in tiers) == everything[key], key
    assert metrics["pairs"]["models"]["float"]["all"]["num_pairs"] >= 1_000
    for title in ("val_bpb, tail", "minimal pairs, all", "only tok_emb.weight", "latency_ms"):
        assert title in done.out
    again = program("eval.py", *asked, *QUICK, "out=again")
    assert again.code == 0
    second = json.loads(Path("again/metrics.json").read_text())
    for found in (metrics, second):
        for model in found["models"].values():
            del model["cost"]
    assert metrics == second


def test_a_checkpoint_alone_is_a_float_model(finished: Path, program, cache_dir: Path) -> None:
    asked = (f"artifact={finished / 'checkpoint.ckpt'}", f"data.cache_dir={cache_dir}", "out=found")
    done = program("eval.py", *asked, "eval.parts=[reliability,damage,layers]", *QUICK)
    assert done.code == 0, done.err
    metrics = json.loads(Path("found/metrics.json").read_text())
    row = json.loads((finished / "result.json").read_text())
    assert list(metrics["models"]) == ["float"]
    assert metrics["models"]["float"]["val_bpb"] == pytest.approx(row["val_bpb_float"], abs=1e-9)
    assert set(metrics["left_out"]) == {"damage", "layers"}
    assert "left out: damage: compares two models, and there is no artifact" in done.out
    plain = program("eval.py", *asked, *QUICK)
    assert plain.code == 0, plain.err


def test_an_artifact_elsewhere_takes_its_float_model_from_run(
    finished: Path, program, cache_dir: Path
) -> None:
    Path("moved.qat").write_bytes((finished / "artifact.qat").read_bytes())
    asked = ("artifact=moved.qat", "eval.parts=[damage]", f"data.cache_dir={cache_dir}", *QUICK)
    alone = program("eval.py", *asked)
    assert alone.code == 0, alone.err
    assert "left out: damage: compares two models, and there is no float model" in alone.out
    both = program("eval.py", *asked, f"run={finished}")
    assert both.code == 0, both.err
    assert "damage" in json.loads(Path("moved_eval/metrics.json").read_text())


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (
            ("eval.parts=[pairs]", "eval.pairs_file=bad.jsonl"),
            'bad.jsonl, line 2: "bad" is missing',
        ),
        (("eval.parts=[pairs]", "eval.pairs_file=no.jsonl"), "eval.pairs_file=no.jsonl: No such"),
        (("eval.pairs_file=bad.jsonl",), "eval.pairs_file = bad.jsonl: add eval.parts="),
        (("eval.parts=[speed]",), "eval.parts = speed: choose from reliability, damage,"),
        (("eval=everything",), "eval=everything: no such option; choose from full, score"),
        (("eval=full", "eval.resamples=0"), "eval.resamples = 0: give 1 or more"),
        (("eval=full", "out=bad.jsonl"), "out=bad.jsonl: a file; give the folder to write"),
        (("eval.stride=999",), "eval.stride = 999: must be at most eval.seq_len = 32"),
        (("eval.seq_len=9999999",), "eval.seq_len = 9999999: the validation text"),
        (("seq_len=16",), "seq_len=16: unknown setting; did you mean eval.seq_len"),
    ],
)
def test_mistakes_get_one_line(
    asked: tuple[str, ...], line: str, finished: Path, program, cache_dir: Path
) -> None:
    Path("bad.jsonl").write_text('{"good": "he walks", "bad": "he walk"}\n{"good": "a"}\n')
    artifact = f"artifact={finished / 'artifact.qat'}"
    done = program("eval.py", artifact, f"data.cache_dir={cache_dir}", "out=found", *asked)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert line in done.err
    assert not Path("found").exists()


def test_a_text_without_bytes_is_refused(tmp_path: Path, weights: dict) -> None:
    writer = ShardWriter(tmp_path, "val")
    writer.write([BOS_ID] * 100)
    writer.close()
    with pytest.raises(Exception, match=r"data.val_files: its tokens stand for no bytes of text"):
        scorer(TokenStream(sorted(tmp_path.glob("*.bin")), "data.val_files"))


@pytest.mark.slow
def test_two_ranks_measure_the_same(finished: Path, cache_dir: Path, tmp_path: Path) -> None:
    parts = "eval.parts=[reliability,damage,layers,pairs]"
    found = []
    for ranks in (1, 2):
        done = torchrun(
            f"artifact={finished / 'artifact.qat'}", parts, "eval.stride=16", *QUICK,
            f"out={tmp_path / str(ranks)}", f"data.cache_dir={cache_dir}", cwd=tmp_path,
            ranks=ranks, script="eval.py",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("val_loss") == 1
        found.append(json.loads((tmp_path / str(ranks) / "metrics.json").read_text()))
    assert numbers(found[0]) == numbers(found[1])
    for one, two in zip(*(flat(f) for f in found), strict=True):
        assert one == pytest.approx(two, abs=1e-9)


def flat(value: object) -> list[float]:
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return [number for v in inside for number in flat(v)]
    return [] if isinstance(value, str) or value is None else [float(value)]
