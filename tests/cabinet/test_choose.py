"""``eval.py task=choose``: the choice, the runner-up, and one line for every mistake."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.cabinet.choose_task import AT_LEAST, choose, least_move
from qat.cabinet.labelled import MACRO_F1
from qat.settings.schema import ConstraintSettings
from tests.cabinet.cabinet_rows import make_float, make_row, unavailable

ROWS = [
    make_float(latency_ms=14.0),
    make_row("fast", "torchao", 2_000_000, 0.05, latency_ms=8.0),
    make_row("small", "gptq", 1_000_000, 0.02, latency_ms=12.0),
    make_row("best", "rounding", 2_400_000, 0.001, latency_ms=12.0),
    make_row("beaten", "torchao", 2_500_000, 0.06, latency_ms=9.0),
    unavailable("bnb", "bitsandbytes", "needs [CUDA]"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(ROWS))
    return tmp_path


def test_as_typed_on_the_command_line(program, folder: Path) -> None:
    done = program(
        "eval.py", "task=choose", f"cabinet={folder}",
        "constraints={latency_ms: 10, artifact_bytes: 16000000, val_bpb: 1.9}",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "artifact_bytes <= 16,000,000" in done.out
    assert "meet all: fast, beaten" in done.out
    assert "of these beaten: beaten" in done.out
    assert "chosen: fast, of least val_bpb (1.40000) among 1" in done.out
    assert "runner-up: small (val_bpb 1.37000)" not in done.out  # best is as near and better
    assert "runner-up: best (val_bpb 1.35100) if latency_ms may be 12.0 instead of 10" in done.out
    assert "(+20.0%)" in done.out
    assert "fails latency_ms" in done.out
    assert "unavailable: needs [CUDA]" in done.out


def test_where_nothing_is_left(program, folder: Path) -> None:
    done = program("eval.py", "task=choose", f"cabinet={folder}", "constraints={latency_ms: 5}")
    assert done.code == 0, done.err
    assert "chosen: none; no variant meets all constraints" in done.out
    assert "runner-up: fast (val_bpb 1.40000) if latency_ms may be 8.0" in done.out
    done = program(
        "eval.py", "task=choose", f"cabinet={folder}", "constraints={peak_memory_bytes: 5}"
    )
    assert "not known !" in done.out
    assert "runner-up: none" in done.out


def test_a_speed_is_needed_at_least(tmp_path: Path, program) -> None:
    rows = [make_float(), make_row("quick", "torchao", 900, 0.1, latency_speedup=1.5),
            make_row("slow", "gptq", 900, 0.01, latency_speedup=0.9)]  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(rows))
    asked = ("constraints={latency_speedup: 1.2, throughput_speedup: 1.1}",)
    done = program("eval.py", "task=choose", f"cabinet={tmp_path}", *asked)
    assert done.code == 0, done.err
    assert "chosen: quick" in done.out


def test_a_quality_is_needed_at_least(tmp_path: Path, program) -> None:
    """And it moves downwards for another choice."""
    rows = [
        make_float(macro_f1=0.80, ece=0.09), make_row("a", "gptq", 900, macro_f1=0.72, ece=0.05),
        make_row("b", "gptq", 800, macro_f1=0.60, ece=0.02),
    ]  # fmt: skip
    twins = [
        make_row(name, "gptq", 900, macro_f1=0.7, items_per_second=speed)
        for name, speed in (("slow", 100.0), ("quick", 200.0))
    ]
    assert choose(twins, {"items_per_second": 50.0}, MACRO_F1).candidates == twins[1:]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    wanted = {"macro_f1": 0.75, "ece": 0.06}
    found = choose(rows, wanted, MACRO_F1)
    assert found.chosen is None
    assert least_move(rows, wanted, MACRO_F1) == ("macro_f1", 0.72, rows[1])  # 4 % down, not 50 up
    (tmp_path / "manifest.json").write_text(json.dumps({"objective": asdict(MACRO_F1)}))
    done = program(
        "eval.py", "task=choose", f"cabinet={tmp_path}", "constraints={macro_f1: 0.75, ece: 0.06}"
    )
    assert "if macro_f1 may be 0.72 instead of 0.75 (-4.0%)" in done.out, done.err


def test_ties_go_to_fewer_bytes() -> None:
    twins = [
        make_row("large", "torchao", 900, latency_ms=1.0),
        make_row("compact", "torchao", 800, latency_ms=2.0),
    ]
    found = choose(twins, {"latency_ms": 3.0})
    assert len(found.candidates) == 2
    assert found.chosen is twins[1]
    move = least_move(twins, {"latency_ms": 1.0})
    assert move == ("latency_ms", 2.0, twins[1])


few = st.integers(1, 4).map(float)
LIMITS = st.dictionaries(st.sampled_from(["latency_ms", "artifact_bytes", "val_bpb"]), few,
                         min_size=1)  # fmt: skip
TABLES = st.lists(st.tuples(few, few, few), max_size=6)


@given(TABLES, LIMITS)
def test_choice_and_runner_up_against_their_definition(
    table: list[tuple[float, float, float]], limits: dict[str, float]
) -> None:
    rows = [
        make_row(str(i), "torchao", int(size), bpb - 1.35, latency_ms=ms, val_bpb=bpb)
        for i, (ms, size, bpb) in enumerate(table)
    ]
    names = ("latency_ms", "artifact_bytes", "val_bpb")

    def winner(most: dict[str, float]) -> tuple[float, float] | None:
        fit = [v for v in table if all(v[names.index(n)] <= most[n] for n in most)]
        return min(((bpb, size) for _, size, bpb in fit), default=None)

    def name(row: dict | None) -> tuple[float, float] | None:
        return row and (row["val_bpb"], row["disk_bytes"])

    now = winner(limits)
    assert name(choose(rows, limits).chosen) == now
    # Every quantity is 1, 2, 3 or 4, so these are all the places to which a constraint can move.
    moves = [
        (to / limits[n], n) for n in limits for to in (1.0, 2.0, 3.0, 4.0)
        if to > limits[n] and winner({**limits, n: to}) != now
    ]  # fmt: skip
    found = least_move(rows, limits)
    assert (found is None) == (not moves)
    if found is not None:
        assert found.to / limits[found.constraint] == min(moves)[0]
        assert winner({**limits, found.constraint: found.to}) == name(found.winner)


@pytest.mark.parametrize("name", vars(ConstraintSettings()))
def test_every_quantity_is_in_a_row(name: str) -> None:
    row = make_float(peak_memory_bytes=10, **dict.fromkeys(AT_LEAST, 0.7))
    met, unmet = (1e-12, 1e12) if name in AT_LEAST else (1e12, 1e-12)
    assert choose([row], {name: met}).chosen is row
    assert choose([row], {name: unmet}).chosen is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("cabinet=HERE",),
            "constraints = null: give the most of something, constraints='{latency",
        ),
        (("constraints={latency_ms: 1}",), "cabinet = null: give the folder of a cabinet"),
        (("cabinet=HERE", "constraints={speed: 3}"), "constraints.speed: unknown setting; "),
        (("cabinet=HERE", "constraints={latency: 3}"), "did you mean constraints.latency_ms?"),
        (("cabinet=HERE", "constraints={ece: 0}"), "constraints.ece = 0: give a number above 0"),
        (("cabinet=HERE", "constraints={ece: -1}"), "constraints.ece = -1: give"),
        (("cabinet=HERE", "constraints={ece: nan}"), "constraints.ece = nan"),
        (("cabinet=HERE", "constraints.ece=inf"), "constraints.ece = inf"),
        (("cabinet=HERE", "constraints={ece: low}"), "constraints={ece: low}: Value 'low'"),
        (("cabinet=HERE", "constraints={ece: [1]}"), "constraints={ece: [1]}: "),
        (("cabinet=HERE", "constraints={ece: null}"), "constraints = null"),
        (("cabinet=HERE", "constraints=3"), "constraints=3: "),
        (("cabinet=HERE", "constraints=null"), "constraints=null: "),
        (
            ("cabinet=nowhere", "constraints={ece: 1}"),
            "cabinet=nowhere: results.json: No such file",
        ),
    ],
)
def test_mistakes(program, folder: Path, arguments: tuple[str, ...], message: str) -> None:
    done = program("eval.py", "task=choose", *(a.replace("HERE", str(folder)) for a in arguments))
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err + done.out
    assert message in done.err


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("{}", "no rows"), ("[1]", "no rows"), ('[{"a": 1}]', "no rows")],
)
def test_files_of_something_else(program, folder: Path, text: str, message: str) -> None:
    (folder / "results.json").write_text(text)
    done = program("eval.py", "task=choose", f"cabinet={folder}", "constraints={ece: 1}")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert message in done.err
