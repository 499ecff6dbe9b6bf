"""The report says what its rows say: other rows, other sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat.cabinet.labelled import MACRO_F1
from qat.cabinet.plots import MAX_VARIANTS, spread_over
from qat.cabinet.report import as_markdown, write_report
from qat.cabinet.roofline import Ceilings
from qat.cabinet.summary import roof_seconds, summarise
from tests.cabinet.cabinet_rows import CEILINGS, make_float, make_row, unavailable

ROWS = [
    make_row("rtn_int6", "rounding", 1_900_000, 0.0075),
    make_row("gptq_int6", "gptq", 1_850_000, 0.0029, latency_ms=6.0, latency_speedup=3.0),
    make_row("rtn_int8", "rounding", 2_400_000, 0.0002),
    make_float(latency_ms=18.0),
    make_row("gptq_int4", "gptq", 1_200_000, 0.0551),
    make_row("rtn_int4", "rounding", 1_200_000, 0.1378),
    make_row("rtn_int3", "rounding", 900_000, 0.84),
    unavailable("gptq_int3", "gptq", "no data | at all"),
    unavailable("bnb_nf4", "bitsandbytes", "needs CUDA"),
]


def tell(rows: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Report and summary, without pictures."""
    summary = summarise(rows, CEILINGS)
    return as_markdown(rows, summary, {}, []), summary


def write(rows: list[dict[str, Any]], folder: Path) -> tuple[str, dict[str, Any]]:
    write_report(rows, CEILINGS, {"machine": "made up"}, folder)
    return (folder / "REPORT.md").read_text(), json.loads((folder / "summary.json").read_text())


def test_report_and_summary(tmp_path: Path) -> None:
    report, summary = write(ROWS, tmp_path)
    assert summary["frontier"] == ["rtn_int3", "gptq_int4", "gptq_int6", "rtn_int8", "fp32"]
    assert summary["best_per_family"]["rounding"] == {
        "least_val_bpb": "rtn_int8", "smallest_within_gap": "rtn_int8"
    }  # fmt: skip
    bought = summary["gptq_over_rounding"]
    assert bought["int4"]["bpb_bought"] == pytest.approx(0.0827)
    assert bought["int6"]["bytes_added"] == -50_000
    assert "int8" not in bought  # no GPTQ row
    assert bought.get("int3") is None
    stop = summary["where_to_stop"]
    assert (stop["variant"], stop["next_smaller"]["variant"]) == ("gptq_int6", "gptq_int4")
    assert stop["next_smaller"]["bytes_saved"] == 650_000
    assert stop["times_smaller"] == pytest.approx(10_600_000 / 1_850_000)
    assert stop["max_gap_nats_per_token"] == pytest.approx(0.003 * 1.7)
    assert "**gptq_int6**: 1,850,000 bytes, 5.73 times smaller than fp32" in report
    assert "GPTQ is better on 2 of 2 grids, and buys most on int4: +0.08270 bpb" in report
    assert "Fastest measured: gptq_int6, 3.00 times" in report
    assert "7 variants measured, 2 not available here" in report
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert len(pictures) == 5
    assert all(f"({name})" in report for name in pictures)


def test_all_rows_in_one_table_by_family_then_bytes() -> None:
    report, _ = tell(ROWS)
    table = report.split("## All variants")[1].split("## Measured on")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [
        "fp32", "rtn_int3", "rtn_int4", "rtn_int6", "rtn_int8", "gptq_int4", "gptq_int6",
        "gptq_int3", "bnb_nf4",
    ]  # fmt: skip
    columns = table.split("|\n")[0].count(" | ")
    assert {line.replace("\\|", "").count(" | ") for line in lines} == {columns}
    assert any("needs CUDA" in line for line in lines)
    assert {line.split(" | ")[0] for line in lines if "frontier" in line} == {
        "| fp32", "| rtn_int3", "| rtn_int8", "| gptq_int4", "| gptq_int6"
    }  # fmt: skip


def test_where_to_stop_moves_with_the_rows() -> None:
    worse = [r if r["variant"] != "gptq_int6" else {**r, "gap_bpb": 0.0031} for r in ROWS]
    assert tell(worse)[1]["where_to_stop"]["variant"] == "rtn_int8"
    smaller = make_row("qat_int4", "qat", 800_000, -0.001)
    report, summary = tell([*ROWS, smaller])
    assert summary["where_to_stop"]["variant"] == "qat_int4"
    assert summary["frontier"] == ["qat_int4"]
    assert "Nothing on the frontier is smaller." in report


def test_what_cannot_be_answered_says_why(tmp_path: Path) -> None:
    rows = [unavailable("fp32", "float", "lost"), make_row("gptq_int4", "gptq", 5, 0.1)]
    report, summary = write(rows, tmp_path)
    assert summary["where_to_stop"] is None
    assert "cannot be applied: fp32 is unavailable (lost)" in report
    assert "No speed-up can be said: fp32 was not measured." in report
    assert "no grid was measured both rounded (rtn_*) and with GPTQ" in report
    report, _ = tell(rows[1:])
    assert "there is no fp32" in report
    assert "No variant on the frontier meets it." in tell([make_float(gap_bpb=1.0)])[0]
    (tmp_path / "none").mkdir()
    report, summary = write(rows[:1], tmp_path / "none")
    assert summary["frontier"] == []
    assert "no variant was measured" in report
    assert not list((tmp_path / "none").glob("*.png"))


def test_what_qat_buys_where_damage_lands_and_temperature() -> None:
    told, _ = tell([*ROWS, make_row("qat_int4", "qat", 1_300_000, 0.0123)])
    assert "| int4 | +0.13780 (1,200,000) | +0.05510 (1,200,000) | +0.01230 (1,300,000) |" in told
    # head: 0.8 of the gap of 0.1378, planted with 0.002 to either side
    line = next(line for line in told.splitlines() if line.startswith("| rtn_int4 | +0.1102"))
    assert "+0.1102 (+0.1082 to +0.1122), 6,890 flips" in line
    assert line.endswith("| head, mid, tail, all |")
    line = next(line for line in told.splitlines() if line.startswith("| rtn_int8 | +0.0002"))
    assert line.endswith("| none |")
    # ECE is 0.01 + gap / 10, and 0.008 at the temperature: better for all 8
    assert "smaller for 8 of 8 variants" in told
    worse = [{**row, "ece_at_temperature": 0.5} for row in ROWS if row["status"] == "measured"]
    told, _ = tell(worse)
    assert "smaller for 0 of 7 variants" in told
    assert "## What QAT buys" not in told


def test_of_a_quality_more_is_better() -> None:
    """The same rows by macro F1: signs turn round, and so does who is beaten."""

    def row(variant: str, family: str, size: int, f1: float) -> dict[str, Any]:
        return make_row(variant, family, size, macro_f1=f1, gap_macro_f1=f1 - 0.8, tiers=None)

    rows = [
        row("fp32", "float", 10_000, 0.8), row("rtn_int8", "rounding", 3_000, 0.801),
        row("gptq_int6", "gptq", 2_000, 0.797), row("rtn_int6", "rounding", 2_100, 0.78),
        row("rtn_int4", "rounding", 1_000, 0.5),
    ]  # fmt: skip
    summary = summarise(rows, CEILINGS, MACRO_F1)
    assert summary["frontier"] == ["rtn_int4", "gptq_int6", "rtn_int8"]
    stop = summary["where_to_stop"]
    assert stop["variant"] == "gptq_int6"  # 0.003 lost, of 0.005 that may be
    assert stop["gap_macro_f1"] == pytest.approx(-0.003)
    assert stop["next_smaller"]["variant"] == "rtn_int4"
    assert summary["best_per_family"]["rounding"] == {
        "most_macro_f1": "rtn_int8", "smallest_within_gap": "rtn_int8"
    }  # fmt: skip
    assert summary["gptq_over_rounding"]["int6"]["macro_f1_bought"] == pytest.approx(0.017)
    told = as_markdown(rows, summary, {}, [], MACRO_F1)
    assert "gap_macro_f1 >= -0.005" in told
    assert "**gptq_int6**: 2,000 bytes, 5.00 times smaller than fp32, gap -0.00300" in told
    assert "GPTQ is better on 1 of 1 grids, and buys most on int6: +0.01700 macro_f1" in told


def test_promises_are_kept_or_not() -> None:
    told, _ = tell(ROWS)
    promises = told.split("## Promises")[1].split("## The frontier")[0].strip().splitlines()
    assert promises == [  # changes are planted as real above 0.002; others are 1.5 times as fast
        "- As good: no tier with a real change: 1 of 6 (rtn_int8).",
        "- Smaller in memory than fp32 (rtn_int3: 11.78 times): 6 of 6 (rtn_int6, gptq_int6, "
        "rtn_int8, gptq_int4, rtn_int4, rtn_int3).",
        "- Faster, 1.05 times at least in three of four timings in turn with fp32: 6 of 6 "
        "(rtn_int6, gptq_int6, rtn_int8, gptq_int4, rtn_int4, rtn_int3).",
    ]
    changed = {"latency_speedup_low": 1.03, "memory_bytes": 10**9}
    slow = [{**r, **changed} for r in ROWS[:3]] + [ROWS[3]]
    told, _ = tell(slow)
    assert "in turn with fp32: 0 of 3." in told
    assert "times): 0 of 3." in told


def test_what_rounding_lost_and_whether_qat_kept_it() -> None:
    rows = [make_float()]
    for grid, gaps in {"int6": (0.001, 0.001, 0.001), "int3": (0.4, 0.1, 0.001)}.items():
        for way, gap in zip(("rtn", "gptq", "qat"), gaps, strict=True):
            family = "rounding" if way == "rtn" else way
            rows.append(make_row(f"{way}_{grid}", family, 1_000_000, gap))
    told, _ = tell(rows)
    said = told.split("## What QAT buys")[1].split("## Where")[0].strip().splitlines()[-2:]
    assert said == [
        "- int6: rounding lost nothing that is told from noise, so there was nothing to save.",
        "- int3: rounding changed it by +0.4000; QAT +0.0010 (not told from noise); "
        "GPTQ +0.1000 (real).",
    ]


def test_the_roof_is_the_slower_of_arithmetic_and_memory() -> None:
    ceilings = Ceilings(100.0, {"float32": 10.0, "int8": 1000.0}, {})
    row = make_float(flops=50, weight_traffic_bytes=150, activation_bytes=50, latency_ms=10_000.0)
    assert roof_seconds(row, ceilings, "float32") == 5.0
    assert roof_seconds(row, ceilings, "int8") == 2.0
    fast = make_row("w", "torchao", 1, flops=50, weight_traffic_bytes=50, activation_bytes=50,
                    latency_ms=20_000.0, latency_speedup=0.5)  # fmt: skip
    speed = summarise([row, fast], ceilings)["speed"]
    assert speed["fp32"]["promised"] == {"float32": 1.0, "int8": 2.5}
    assert speed["w"]["promised"] == {"float32": 1.0, "int8": 5.0}
    assert (speed["w"]["measured"], speed["w"]["of_float32_roof"]) == (0.5, 0.25)
    assert speed["w"]["is_compute_bound"]
    heavy = {**fast, "weight_traffic_bytes": 1000}
    assert not summarise([heavy], ceilings)["speed"]["w"]["is_compute_bound"]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_pictures_of_many_variants_show_a_few(count: int) -> None:
    rows = [make_row(f"v{i}", "torchao", 1000 + i, 1.0 - i / 100) for i in range(count)]
    beaten = make_row("other", "qat", 5000, 3.0)
    shown = [row["variant"] for row in spread_over([*rows, beaten], MAX_VARIANTS)]
    assert len(shown) == len(set(shown)) == min(MAX_VARIANTS, count + 1)
    assert "v0" in shown
    assert f"v{count - 1}" in shown
    assert ("other" in shown) == (count < MAX_VARIANTS)
