"""Which tokens are scored, and what they see: against loops that follow the definition."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qat.errors import UserError
from qat.evaluation.score import Score, Scorer
from qat.evaluation.windows import Windows, document_windows, stream_windows
from qat.model.gpt import GPT
from qat.model.spec import ModelSpec
from qat.settings.checks import CPU_EVAL_TOKENS, resolve_eval
from qat.settings.schema import (
    DataSettings,
    EvalSettings,
    EvalTaskSettings,
    FullEvalSettings,
    LoggerSettings,
)
from qat.text.byte_table import ByteTable
from qat.text.shards import ShardWriter, TokenStream
from qat.text.tokenizer import BOS_ID
from tests.conftest import result_of
from tests.test_torchrun import torchrun

SHAPE = ModelSpec(24, 3, 16, 4, 2, 2, True)
NUM_TOKENS = 131


def scored(windows: Windows) -> list[int]:
    """Input positions whose targets are scored, in any order."""
    ends = windows.starts + windows.lengths
    spans = zip(ends - windows.tails, ends, strict=True)
    return sorted(int(i) for first, end in spans for i in range(first, end))


sizes = st.tuples(st.integers(2, 300), st.integers(1, 40), st.integers(1, 40)).filter(
    lambda s: s[2] <= s[1]
)


@given(sizes)
def test_sliding_windows_score_every_target_once(size: tuple[int, int, int]) -> None:
    num_tokens, seq_len, stride = size
    windows = stream_windows(num_tokens, seq_len, stride)
    if num_tokens - 1 < seq_len:
        assert not len(windows.starts)
        return
    assert scored(windows) == list(range(num_tokens - 1))
    assert windows.num_targets == num_tokens - 1
    assert (windows.lengths == seq_len).all()
    assert windows.tails[0] == seq_len
    assert (windows.tails[1:] <= stride).all()


@given(sizes, st.integers(1, 400))
def test_a_part_is_spread_over_the_text_and_known_by_its_positions(
    size: tuple[int, int, int], most: int
) -> None:
    num_tokens, seq_len, stride = size
    windows = stream_windows(num_tokens, seq_len, stride)
    assert windows.positions().tolist() == scored(windows)
    if not len(windows.starts):
        return
    part = windows.spread(most)
    assert part.positions().tolist() == scored(part)
    assert set(scored(part)) <= set(scored(windows))
    assert part.num_targets <= max(most + seq_len, seq_len)


@given(sizes, st.data())
def test_document_windows_stay_inside_documents(
    size: tuple[int, int, int], data: st.DataObject
) -> None:
    num_tokens, seq_len, stride = size
    more = data.draw(st.sets(st.integers(1, num_tokens - 1), max_size=8))
    starts = np.array(sorted({0} | more))
    windows = document_windows(starts, num_tokens, seq_len, stride)
    assert scored(windows) == list(range(num_tokens - 1))
    document = np.searchsorted(starts, np.arange(num_tokens), side="right")
    for start, length, tail in zip(windows.starts, windows.lengths, windows.tails, strict=True):
        assert len(set(document[start : start + length])) == 1
        if start not in starts:
            assert length == seq_len
            assert tail <= stride


def test_without_a_stride_windows_are_the_baselines() -> None:
    windows = stream_windows(5_000, 16, None)
    assert windows.starts.tolist() == list(range(0, 4_984, 16))
    assert scored(windows) == list(range(4_992))


@given(sizes, st.integers(1, 200))
def test_batches_hold_every_window_once(size: tuple[int, int, int], batch_tokens: int) -> None:
    windows = stream_windows(*size)
    batches = windows.batches(batch_tokens)
    together = [row for b in batches for row in zip(b.starts, b.lengths, b.tails, strict=True)]
    assert sorted(together) == sorted(
        zip(windows.starts, windows.lengths, windows.tails, strict=True)
    )
    for batch in batches:
        padded = len(batch.starts) * batch.lengths.max()
        assert padded <= batch_tokens or len(batch.starts) == 1
        assert len({bool(whole) for whole in batch.tails == batch.lengths}) == 1


@given(sizes, st.data())
def test_windows_that_hold_what_is_needed(size: tuple[int, int, int], data: st.DataObject) -> None:
    windows = stream_windows(*size)
    needed = np.zeros(size[0] - 1, dtype=bool)
    needed[sorted(data.draw(st.sets(st.integers(0, size[0] - 2), max_size=3)))] = True
    chosen = windows.holding(needed)
    assert set(np.flatnonzero(needed)) & set(scored(windows)) <= set(scored(chosen))
    spans = zip(chosen.starts + chosen.lengths, chosen.tails, strict=True)
    assert all(needed[end - tail : end].any() for end, tail in spans)


@given(sizes, st.integers(1, 300))
def test_a_part_of_the_windows_is_spread_over_all(
    size: tuple[int, int, int], max_targets: int
) -> None:
    windows = stream_windows(size[0], size[1], None)
    part = windows.spread(max_targets)
    assert set(part.starts) <= set(windows.starts)
    assert len(set(part.starts)) == len(part.starts)
    assert part.num_targets <= max(max_targets, min(windows.num_targets, size[1]))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    gpt = GPT(SHAPE)
    return {name: torch.randn_like(p) * 0.3 for name, p in gpt.named_parameters()}


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    folder = tmp_path_factory.mktemp("shards")
    ids = np.random.default_rng(0).integers(2, 24, NUM_TOKENS)
    ids[[0, 9, 10, 75, 102, NUM_TOKENS - 1]] = BOS_ID  # one empty, the last predicts nothing
    writer = ShardWriter(folder, "val", 64)
    writer.write(ids.tolist())
    writer.close()
    return TokenStream(sorted(folder.glob("*.bin")), "data.val_files")


def scorer(stream: TokenStream, **asked: object) -> Scorer:
    silent = torch.arange(24) == BOS_ID
    table = ByteTable((~silent).long(), torch.zeros(24, dtype=torch.bool), silent)
    console = Console(quiet=True)
    return Scorer(
        SHAPE, stream, table, 16, EvalSettings(**asked), torch.device("cpu"), console,
        bos_id=BOS_ID,
    )  # fmt: skip


def naive(
    stream: TokenStream, weights: dict, seq_len: int, stride: int, by_document: bool
) -> list[float]:
    """Nats of every target, one forward pass each, over all that its window sees."""
    ids = torch.from_numpy(stream.take(0, len(stream)))
    gpt = GPT(SHAPE)
    nats = []
    for i in range(len(ids) - 1):
        first, last = 0, len(ids) - 1  # the span of inputs that this target's document has
        if by_document:
            starts = [0] + [j for j in range(1, len(ids)) if ids[j] == BOS_ID]
            first = max(j for j in starts if j <= i)
            last = min([j for j in starts if j > i], default=len(ids) - 1)
        end = min(first + seq_len, last)
        while end <= i:
            end = min(end + stride, last)
        window = ids[max(first, end - seq_len) : end]
        logits = torch.func.functional_call(gpt, weights, (window[None],))[0]
        at = i - max(first, end - seq_len)
        nats.append(float(F.cross_entropy(logits[at], ids[i + 1])))
    return nats


@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize(("seq_len", "stride"), [(16, 4), (16, 5), (16, 16), (40, 7), (16, 1)])
@torch.inference_mode()
def test_sliding_equals_the_naive_loop(
    seq_len: int, stride: int, by_document: bool, stream: TokenStream, weights: dict
) -> None:
    asked = {"seq_len": seq_len, "stride": stride, "by_document": by_document}
    expected = naive(stream, weights, seq_len, stride, by_document)
    for batch_tokens in (8, 100, 10_000):
        subject = scorer(stream, **asked, batch_tokens=batch_tokens)
        found = np.full(NUM_TOKENS - 1, np.nan)
        for batch, logits_NV in subject.forward(weights, "test"):
            assert np.isnan(found[batch.positions]).all()
            found[batch.positions] = F.cross_entropy(logits_NV, batch.targets, reduction="none")
        assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)  # float32
        score = subject.score(weights, "test")
        assert score.num_tokens == NUM_TOKENS - 1
        assert score.val_loss == pytest.approx(np.mean(expected), abs=1e-6)
        assert score.num_bytes == int((stream.take(1, NUM_TOKENS - 1) != BOS_ID).sum())
        assert score.val_bpb == pytest.approx(sum(expected) / score.num_bytes / math.log(2))


@pytest.mark.parametrize("tail", [1, 5, 16])
@torch.inference_mode()
def test_the_tail_of_the_logits_is_that_of_all(tail: int, weights: dict) -> None:
    gpt, ids = GPT(SHAPE), torch.arange(32).view(2, 16) % 24
    whole = torch.func.functional_call(gpt, weights, (ids,))
    assert torch.func.functional_call(gpt, weights, (ids,), {"tail": tail}).allclose(
        whole[:, -tail:], atol=1e-6
    )


@torch.inference_mode()
def test_a_documents_score_does_not_depend_on_its_neighbours(
    stream: TokenStream, weights: dict, tmp_path: Path
) -> None:
    ids = stream.take(0, len(stream))
    starts = np.flatnonzero(ids == BOS_ID)
    order = [3, 0, 2, 1]
    pieces = [ids[starts[i] : starts[i + 1]] for i in order]
    writer = ShardWriter(tmp_path, "val")
    writer.write(np.concatenate([*pieces, ids[starts[4] :]]).tolist())
    writer.close()
    shuffled = TokenStream(sorted(tmp_path.glob("*.bin")), "data.val_files")
    for by_document in (True, False):
        losses = [
            scorer(s, stride=3, by_document=by_document).score(weights, "test").val_loss
            for s in (stream, shuffled)
        ]
        assert (losses[0] == pytest.approx(losses[1], abs=1e-6)) is by_document


def test_impossible_windows_are_refused(stream: TokenStream) -> None:
    with pytest.raises(UserError, match=r"eval.seq_len = 300: the validation text"):
        scorer(stream, seq_len=300)
    with pytest.raises(UserError, match=r"eval.stride = 17: must be at most eval.seq_len = 16"):
        scorer(stream, stride=17)


def test_documents_without_a_single_bos_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "val")
    writer.write(np.arange(2, 24).tolist() * 3)
    writer.close()
    silent = TokenStream(sorted(tmp_path.glob("*.bin")), "data.val_files")
    assert scorer(silent).windows.num_targets
    with pytest.raises(UserError, match=r"^data\.val_files: BOS \(id 1\), which starts a document"):
        scorer(silent, by_document=True)


@pytest.mark.slow
def test_train_scores_in_the_windows_asked_for(train) -> None:
    done = train("qat=none", "max_steps=2", "eval.stride=8", "eval.seq_len=48", "run_name=r")
    assert done.code == 0, done.err
    again = train("qat=none", "max_steps=2", "run_name=plain")
    assert again.code == 0
    folders = [Path("logs/runs") / name for name in ("r", "plain")]
    bpb = [result_of(folder)["val_bpb_artifact"] for folder in folders]
    assert bpb[0] != bpb[1]
    for asked, message in (
        (("eval.stride=33",), "eval.stride = 33: must be at most eval.seq_len = 32"),
        (("eval.stride=0",), "eval.stride = 0: give 1 or more"),
        (("eval.seq_len=16", "eval.stride=17"), "at most eval.seq_len = 16"),
    ):
        done = train("qat=none", *asked)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert message in done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "asked"),
    [(2, ()), (3, ("eval.stride=8",)), (3, ("eval.stride=8", "eval.by_document=true"))],
)
def test_ranks_share_the_windows(
    ranks: int, asked: tuple[str, ...], finished: Path, cache_dir: Path, tmp_path: Path, program
) -> None:
    """The same sums as of one process: no window twice and none left out."""
    asked = (f"artifact={finished / 'artifact.qat'}", f"data.cache_dir={cache_dir}",
             "eval.batch_tokens=512", *asked)  # fmt: skip
    one = program("eval.py", *asked)
    many = torchrun(*asked, cwd=tmp_path, ranks=ranks, script="eval.py")
    assert (one.code, many.returncode) == (0, 0), one.err + many.stderr
    outputs = [dict(line.split() for line in text.splitlines()) for text in (one.out, many.stdout)]
    for other in outputs[1:]:
        assert other.keys() == outputs[0].keys()
        assert float(other["val_loss"]) == pytest.approx(float(outputs[0]["val_loss"]), abs=1e-9)
        assert other["tokens"] == outputs[0]["tokens"]
        assert other["text_bytes"] == outputs[0]["text_bytes"]


def test_what_takes_long_is_said_beforehand(
    stream: TokenStream, weights: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qat.evaluation.score.SAID_SECONDS", 0.0)
    subject = replace(scorer(stream, batch_tokens=16), console=Console(file=io.StringIO()))
    subject.score(weights, "float weights")
    assert isinstance(told := subject.console.file, io.StringIO)
    assert told.getvalue() == "scoring float weights: 128 tokens, about 0 s\n"


def test_on_a_cpu_a_part_is_scored_and_said(train, program, cache_dir: Path) -> None:
    """One default for train.py and eval.py; a row tells what it is of, and equal weights have one
    score."""
    for asked, found in (("auto", CPU_EVAL_TOKENS), (None, None), (7, 7)):
        settings = EvalTaskSettings(
            artifact="a.qat",
            eval=FullEvalSettings(max_tokens=asked),
            logger=LoggerSettings("csv"),
            data=DataSettings("from_artifact"),
        )
        assert resolve_eval(settings, {}).eval.max_tokens == found
    score, scored = Scorer.score, []

    def counted(self: Scorer, weights: dict, title: str) -> Score:
        scored.append(title)
        return score(self, weights, title)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "score", counted)
        same = ("averaging=ema", "averaging.decay=0")  # the average is the last weights
        done = train("eval.max_tokens=1000", "run_name=r", "max_steps=2", "qat=int6", *same)
    assert done.code == 0, done.err
    assert scored == ["float weights", "snapped weights"]
    row = result_of(Path("logs/runs/r"))
    assert row["val_tokens"] == 992 < row["val_tokens_there"]
    assert row["val_bpb_last_snapped"] == row["val_bpb_artifact"] == row["val_bpb_snapped"]
    assert row["val_bpb_last_float"] == row["val_bpb_float"]
    said = f"scored on 992 of {row['val_tokens_there']:,} tokens"
    assert said in " ".join(done.out.replace("│", " ").split())
    assert "validation tokens (992 are scored; all: eval.max_tokens=null)" in done.err
    cache = f"data.cache_dir={cache_dir}"
    again = program("eval.py", "run=r", cache, "eval.max_tokens=1000")
    assert f"{row['val_bpb_artifact']:.10f}" in again.out
    assert f"tokens         992 of {row['val_tokens_there']} (eval.max_tokens)" in again.out
    refused = program("eval.py", "task=submission", "run=r", "out=sub")
    assert refused.code == 2
    assert "992 of " in refused.err
    assert "eval.max_tokens=null" in refused.err
