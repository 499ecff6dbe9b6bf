"""Vocabularies: which of them can count bytes, what is said of the others, and that it is true."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qat.errors import UserError
from qat.evaluation.sample_task import sample
from qat.model.gpt import GPT
from qat.model.spec import ModelSpec
from qat.text import byte_table as vocabulary
from qat.text.byte_table import SPACE, byte_piece
from qat.text.shards import ShardWriter, TokenStream
from qat.text.tokenizer import BOS_ID, Tokenizer
from tests.conftest import GOLF, TINY, Done

TEXTS = [f"the quick brown fox, {n} of them; na\u00efve \u4e2d\u6587" for n in range(200)]
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
NEUTRAL = {
    "model_type": "bpe", "vocab_size": 340, "byte_fallback": True, "required_chars": SPACE,
    "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2,
}  # fmt: skip


def trained(path: Path, **settings: object) -> Path:
    """A vocabulary trained on TEXTS that keeps text as it is, but for ``settings``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, **(NEUTRAL | settings)
    )
    path.write_bytes(model.getvalue())
    return path


def _field(number: int, value: bytes | int) -> bytes:
    """One field of a protobuf message; numbers and lengths below 2^14."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n % 128 + 128, n // 128])

    if isinstance(value, int):
        return varint(8 * number) + varint(value)
    return varint(8 * number + 2) + varint(len(value)) + value


def assembled(path: Path, more: list[tuple[str, int]]) -> Path:
    """A BPE model of the specials, byte pieces, and ``more`` (piece, type)."""
    pieces = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    pieces += [(byte_piece(byte), BYTE) for byte in range(256)] + more
    model = b"".join(
        _field(1, _field(1, piece.encode()) + _field(3, kind)) for piece, kind in pieces
    )
    trainer = _field(3, 2) + _field(4, len(pieces)) + _field(35, 1)
    normalizer = _field(3, 1) + _field(4, 0) + _field(5, 1)
    path.write_bytes(model + _field(2, trainer) + _field(3, normalizer))
    return path


@pytest.fixture(scope="module", params=["bpe", "unigram", "byte-level", "runs of spaces"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    if request.param == "byte-level":
        assembled(path, [(SPACE, NORMAL)])
    elif request.param == "runs of spaces":
        assembled(path, [(SPACE * n, NORMAL) for n in (1, 2, 4)] + [(f"a{SPACE}", NORMAL)])
    else:
        trained(path, model_type=request.param, vocab_size=310)
    return Tokenizer(path)


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
spaced = st.text(f"ab \t\n\r.{SPACE}\u00e9\u4e2d\U0001f600\u0301\x00", max_size=60)


@given(text=any_text | spaced)
@example(text="")
@example(text=" ")
@example(text=SPACE)
@example(text=f"{SPACE} {SPACE}{SPACE}a {SPACE}b{SPACE}")
@example(text=f" {SPACE}")
@example(text="   leading,  in a   run and trailing   ")
@example(text="tabs\t\tand\r\nlines\n\n\x00")
@example(text="<s> <unk> <0x41> </s>")
@example(text="\U0001f469\u200d\U0001f4bb \u4e2d\u6587 e\u0301 \ufb01 \u3000\u00a0")
def test_bytes_add_up_and_text_comes_back(sound: Tokenizer, text: str) -> None:
    ids = sound.encode_document(text)
    assert sound.encode_documents([text, "other", text]) == [
        ids,
        sound.encode_document("other"),
        ids,
    ]
    assert sound.decode(ids) == text
    assert ids[0] == BOS_ID
    assert sound.count_bytes(ids) == len(text.encode())
    twice = ids + sound.encode_document(f" {text}")
    assert sound.count_bytes(twice) == 2 * len(text.encode()) + 1


def test_sound_ones_have_no_faults(sound: Tokenizer) -> None:
    assert vocabulary.faults(sound.pieces) == []
    assert sound.warning is None


@pytest.mark.parametrize(
    ("settings", "fault", "text"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "replaces or drops characters", "\ufb01\t\r\n"),
        ({"normalization_rule_name": "nfkc"}, "replaces or drops characters", "\u00bd"),
        ({"normalization_rule_name": "nfkc_cf"}, "replaces or drops characters", "\u212a"),
        ({"remove_extra_whitespaces": True}, "drops spaces", "two  spaces "),
        ({"add_dummy_prefix": False}, "puts no space in front", " a"),
        ({"treat_whitespace_as_suffix": True}, "puts a space behind", "a"),
        ({"byte_fallback": False, "vocab_size": 80}, "no byte fallback", "\u0416"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value)[:20],
)
def test_a_fault_is_found_and_real(settings: dict, fault: str, text: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(trained(tmp_path / "t.model", **settings))
    found = vocabulary.faults(tokenizer.pieces)
    assert [line for line in found if fault in line], found
    assert tokenizer.count_bytes(tokenizer.encode_document(text)) != len(text.encode())


@pytest.mark.parametrize("more", [[("a", NORMAL)], [(SPACE, UNUSED)], [(f"{SPACE}a", NORMAL)]])
def test_without_a_space_piece_nothing_is_counted(
    more: list[tuple[str, int]], tmp_path: Path
) -> None:
    """Byte fallback would spell a space as U+2581, in 3 bytes; older versions of sentencepiece use
    an unused piece all the same, which counts for none."""
    tokenizer = Tokenizer(assembled(tmp_path / "t.model", more))
    assert vocabulary.faults(tokenizer.pieces) == [vocabulary.NO_SPACE_PIECE]
    ids = torch.tensor(tokenizer.encode_document("b c"))
    counts = vocabulary.byte_table(tokenizer.pieces).count(ids[:-1], ids[1:])
    uses_unused = SPACE in (tokenizer.pieces.id_to_piece(token) for token in ids.tolist())
    assert int(counts.sum()) < len("b c") if uses_unused else int(counts.sum()) > len("b c")
    with pytest.raises(UserError, match=r"data\.tokenizer=.*t\.model: it has no piece for a"):
        _ = tokenizer.byte_table


def test_unknown_tokens_in_a_stream_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(trained(tmp_path / "t.model", byte_fallback=False, vocab_size=80))
    for name, text in (("known", "the quick fox"), ("lost", "the \u0416 and \u0416\u0416 fox")):
        writer = ShardWriter(tmp_path, name, shard_tokens=3)
        writer.write(tokenizer.encode_document(text))
        writer.close()
    known, lost = (
        TokenStream(list(tmp_path.glob(f"{name}_*.bin")), "data.val_files")
        for name in ("known", "lost")
    )
    tokenizer.check_unknown(known)
    with pytest.raises(UserError, match=r"data\.val_files: 3 tokens are the unknown piece"):
        tokenizer.check_unknown(lost)


SCORE = ("eval.py", f"artifact={GOLF}/final_model.int8.ptz", "eval.seq_len=128")


def test_scoring_refuses_what_cannot_be_counted(
    program: Callable[..., Done], tmp_path: Path
) -> None:
    model = (GOLF / "tokenizer.model").read_bytes()
    entry = b"\n\x03"
    assert model.count(entry + SPACE.encode()) == 1
    (tmp_path / "t.model").write_bytes(model.replace(entry + SPACE.encode(), entry + b"qzq"))
    shards = f"data.val_files={GOLF}/fineweb_val_*.bin"
    done = program(*SCORE, shards, "data.tokenizer=t.model")
    assert done.code == 2
    assert done.err.startswith("error: data.tokenizer=t.model: it has no piece for a single space")

    tokens = TokenStream([GOLF / "fineweb_val_000000.bin"], "data").take(0, 1000)
    writer = ShardWriter(tmp_path, "val")
    writer.write([*tokens.tolist(), Tokenizer(GOLF / "tokenizer.model").pieces.unk_id()])
    writer.close()
    done = program(*SCORE, "data.val_files=val_*.bin", f"data.tokenizer={GOLF}/tokenizer.model")
    assert done.code == 2
    assert done.err.startswith("error: data.val_files: 1 tokens are the unknown piece of ")


def test_a_normalising_vocabulary_is_said_in_one_line(
    program: Callable[..., Done], tmp_path: Path
) -> None:
    tokens = TokenStream([GOLF / "fineweb_val_000000.bin"], "data").take(0, 1000)
    for side in ("val", "train"):
        writer = ShardWriter(tmp_path, side)
        writer.write(tokens.tolist()[side == "train" :])
        writer.close()
    data = ("data.val_files=val_*.bin", f"data.tokenizer={GOLF}/tokenizer.model")
    done = program(*SCORE, *data)
    assert done.code == 0
    (line,) = done.err.splitlines()
    assert line == f"warning: {Tokenizer(GOLF / 'tokenizer.model').warning}"
    more = ("data.train_files=train_*.bin", "model.vocab_size=512", "max_steps=1", "run_name=r")
    assert program("train.py", *TINY, *data, *more).code == 0
    assert line in Path("logs/runs/r/train.log").read_text()


def test_the_challenges_own_normalises_and_that_is_said() -> None:
    tokenizer = Tokenizer(GOLF / "tokenizer.model")
    (fault,) = vocabulary.faults(tokenizer.pieces)
    assert "replaces or drops characters" in fault
    assert "drops spaces" in fault
    assert tokenizer.warning is not None
    assert tokenizer.warning.endswith(f"{fault}")
    assert fault.endswith("bytes of the normalised text")
    assert "\n" not in tokenizer.warning


@pytest.mark.parametrize("ids", [{"bos_id": 2, "eos_id": 1}, {"bos_id": 0, "unk_id": 1}])
def test_bos_is_the_vocabularys_own(ids: dict, tmp_path: Path) -> None:
    tokenizer = Tokenizer(trained(tmp_path / "t.model", **ids))
    assert tokenizer.bos_id == ids["bos_id"]
    assert tokenizer.encode_document("a fox") == [ids["bos_id"], *tokenizer.pieces.encode("a fox")]
    assert tokenizer.encode_documents(["a", SPACE])[1][0] == ids["bos_id"]


def test_without_bos_what_needs_it_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(trained(tmp_path / "t.model", bos_id=-1))
    assert tokenizer.bos_id is None
    with pytest.raises(UserError, match=r"t\.model: its vocabulary has no BOS"):
        tokenizer.encode_documents(["a fox"])


@pytest.mark.slow
def test_programs_take_the_bos_of_the_tokenizer(
    program: Callable[..., Done], tmp_path: Path
) -> None:
    """Windows by document, the audit and samples; then a vocabulary without one."""
    for name, ids in (("two", {"bos_id": 2, "eos_id": 1}), ("none", {"bos_id": -1})):
        tokenizer = Tokenizer(trained(tmp_path / f"{name}.model", **ids))
        for side, texts in (("val", TEXTS[:40]), ("train", TEXTS[40:])):
            writer = ShardWriter(tmp_path, f"{name}_{side}")
            for text in texts:
                start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
                writer.write([*start, *tokenizer.pieces.encode(text)])
            writer.close()
        data = [f"data.train_files={name}_train_*.bin", f"data.val_files={name}_val_*.bin",
                f"data.tokenizer={name}.model"]  # fmt: skip
        size = f"model.vocab_size={tokenizer.vocab_size}"
        asked = ("train.py", *TINY, *data, size, "max_steps=1", "eval.by_document=true")
        audited = program("eval.py", "task=audit", *data)
        if name == "two":
            assert audited.code == 0, audited.out
            assert re.search(r"documents +40 +160", audited.out)
            assert program(*asked, "run_name=two").code == 0
            done = program("eval.py", "task=sample", "run=two", *data, "prompt=the quick")
            assert done.code == 0, done.err
        else:
            assert audited.code == 2
            assert "none.model: its vocabulary has no BOS" in audited.err
            done = program(*asked)
            assert done.code == 2
            assert "error: data.tokenizer: its vocabulary has no BOS" in done.err
            assert program(*asked[:-1], "run_name=none").code == 0  # nothing needs it
            done = program("eval.py", "task=sample", "run=none", *data)
            assert "none.model: its vocabulary has no BOS" in done.err


@pytest.mark.parametrize(("bos_id", "expected"), [(0, [0]), (1, [1, 0, 0, 0])])
def test_a_sample_ends_where_the_next_document_starts(bos_id: int, expected: list[int]) -> None:
    """Weights of zero find all tokens alike, and 0 comes first."""
    spec = ModelSpec(8, 1, 16, 2, 1, 2, True)
    weights = {name: torch.zeros_like(w) for name, w in GPT(spec).named_parameters()}
    assert sample(spec, weights, [bos_id], 3, 16, 0.0, seed=1) == expected
