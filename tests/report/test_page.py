"""The report of a study: what it says, and that it needs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat.report import number_text
from qat.report import page as report_page
from qat.report.page import write_report
from qat.report.picture import ARMS, DARK, LIGHT
from qat.report.plots import pictures
from qat.report.tables import answer_table, audit_table, equal_bytes_table, faults, verdict_table
from qat.study.findings import Findings
from qat.study.headline import ALIKE, AS_LARGE, Ledger
from qat.study.significance import Effect, holm
from tests.report.made_findings import make_findings, make_row

EVIL = "<script>alert(1)</script> $x^2$ | \"&'\n"
NAMES = {"waterfall", "curves", "pareto", "seeds"}


def with_evil_names() -> Findings:
    made = make_findings(num_treatments=1)
    treatments = [
        replace(
            t, name=EVIL, arm=EVIL, grid=EVIL, missing_seeds={9: EVIL},
            alike=t.alike and replace(t.alike, against=EVIL),
        )
        for t in made.treatments
    ]  # fmt: skip
    return Findings(
        name=EVIL, question=EVIL, headline=EVIL, baseline=EVIL, seeds=made.seeds,
        budget_seconds=None, hardware=[EVIL], commits=[EVIL], commands=[EVIL],
        treatments=treatments, ledgers=[replace(e, name=EVIL, basis=EVIL) for e in made.ledgers],
        curves=[replace(c, arm=EVIL) for c in made.curves],
        rows=[make_row(EVIL, EVIL, 1, note=EVIL, status="failed")],
        details=[EVIL], beside={EVIL: {EVIL: made.ledgers[0].total}},
    )  # fmt: skip


def without_qat() -> Findings:
    made = make_findings(num_treatments=1)
    return replace(made, treatments=made.treatments[:1], ledgers=[], curves=made.curves[:1])


CASES: dict[str, Callable[[], Findings]] = {
    "plain": lambda: make_findings(num_treatments=2),
    "one seed": lambda: make_findings(num_seeds=1, num_treatments=1),
    "no ledgers": lambda: make_findings(num_treatments=1, ledgers=[]),
    "no QAT": without_qat,
    "nothing": lambda: make_findings(treatments=[], ledgers=[], curves=[], rows=[], seeds=[]),
    "evil": with_evil_names,
    "8 treatments": lambda: make_findings(num_treatments=8),
    "200 rows": lambda: make_findings(num_treatments=1, num_rows=200),
}
SHOWN = {"no ledgers": NAMES - {"waterfall"}, "no QAT": {"curves", "pareto"}, "nothing": set()}


def page(findings: Findings) -> str:
    return report_page.page(findings, pictures(findings))


def markdown(findings: Findings) -> str:
    return report_page.markdown(findings, pictures(findings))


@cache
def page_of(case: str) -> str:
    return page(CASES[case]())


class Reader(HTMLParser):
    """Elements, ids and table cells; an element that is not closed in turn is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_whole_and_alone(case: str) -> None:
    text = page_of(case)
    read = Reader(text)
    assert len(read.ids) == len(set(read.ids))
    tags = [tag for tag, _ in read.tags]
    assert not {"script", "img", "link", "iframe", "object", "image"} & set(tags)
    for tag, attributes in read.tags:
        assert not {"src", "srcset", "xlink:href"} & attributes.keys(), tag
        assert (attributes.get("href") or "#").startswith("#"), tag
        if (attributes.get("href") or "").startswith("#"):
            assert (attributes["href"] or "")[1:] in read.ids
    assert "http" not in text
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*[\"']?(.)", text))
    assert all(target in read.ids for target in re.findall(r"url\(#([^)]*)\)", text))
    shown = {i.removeprefix("figure-") for i in read.ids if i.startswith("figure-")} & NAMES
    assert shown == SHOWN.get(case, NAMES)
    figures = [attributes for tag, attributes in read.tags if tag == "svg"]
    assert len(figures) == len(shown) == tags.count("figcaption")
    assert all(f["role"] == "img" and f["aria-label"] for f in figures)
    assert [a.get("scope") for tag, a in read.tags if tag == "th"].count(None) == 0
    assert tags.count("h1") == 1
    assert ("html", {"lang": "en"}) in read.tags
    assert "viewport" in [a.get("name") for tag, a in read.tags if tag == "meta"]


@pytest.mark.parametrize("case", ["plain", "evil"])
def test_all_colours_of_pictures_follow_the_theme(case: str) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", page_of(case), re.DOTALL))
    assert re.findall(r"#[0-9a-fA-F]{6}\b", pictures) == []
    assert set(re.findall(r"var\(--(\w+)\)", pictures)) <= LIGHT.keys()
    texts = re.findall(r"<text[^>]*>", pictures)
    assert len(texts) > 20
    assert all("fill: var(--ink)" in text for text in texts)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_contrast(theme: dict[str, str]) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(theme[a]), luminance(theme[b])))
        return (high + 0.05) / (low + 0.05)

    assert theme.keys() == LIGHT.keys()
    assert len(set(theme.values())) == len(theme)
    for ground in ("surface", "raised"):
        assert all(contrast(role, ground) >= 4.5 for role in ("ink", "muted", "bad", "blue"))
        assert all(contrast(role, ground) >= 3 for role in (*ARMS, "rule"))


def test_the_same_findings_give_the_same_bytes() -> None:
    assert page(CASES["plain"]()) == page_of("plain")


def test_names_are_escaped() -> None:
    text = page_of("evil")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "$x^2$" in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    report = markdown(with_evil_names())
    outside = report.split("```")[0] + report.split("```")[2]
    assert "<script" not in outside
    assert "&lt;script&gt;" in outside
    for block in outside.split("\n\n"):
        lines = [re.sub(r"\\\|", "", line) for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_the_printed_ledger_adds_up_everywhere() -> None:
    findings = CASES["8 treatments"]()
    ledger_rows = [row for row in Reader(page_of("8 treatments")).rows if "measured" in row[-1]]
    ledger_rows += [row for row in Reader(page_of("8 treatments")).rows if "estimated" in row[-1]]
    assert len(ledger_rows) == 8
    picture = page_of("8 treatments").split("</svg>")[0]
    report = markdown(findings)
    for row in ledger_rows:
        *parts, total = (Decimal(cell.split(" ")[0]) for cell in row[1:5])
        assert sum(parts) == total
        assert " | ".join(row) in report
        assert all(f">{cell.split(' ')[0]}<" in picture for cell in row[1:5])


@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=6))
def test_rounded_parts_add_up_and_are_near(parts: list[float]) -> None:
    rounded = number_text.rounded_parts(parts, sum(parts))
    assert sum(rounded) == round(sum(parts))
    assert all(abs(a - b) <= 1 for a, b in zip(rounded, parts, strict=True))


def test_a_ledger_that_does_not_add_up_is_refused() -> None:
    part = Effect(0.001, None, None)
    with pytest.raises(ValueError, match="do not add up"):
        number_text.ledger_mbpb(Ledger("a", True, part, part, part, part, part, "b"))


@pytest.mark.parametrize(
    ("value", "written"),
    [(None, "–"), (0.0, "< 1e-4"), (9.99e-5, "< 1e-4"), (1e-4, "0.00010"), (0.0026, "0.0026"),
     (0.05, "0.050"), (0.114, "0.11"), (0.999, "1.0"), (1.0, "1.0")],
)  # fmt: skip
def test_p(value: float | None, written: str) -> None:
    assert number_text.p(value) == written


def test_the_first_table_answers_arm_by_arm() -> None:
    """In mbpb; a word where it is decided."""
    table = answer_table(make_findings(num_treatments=2))
    assert [*table.columns] == ["QAT", ALIKE, AS_LARGE]
    assert table.rows == [
        ["int8 QAT from 0.5", "-6.12 [-6.98, -5.26] better", "-2.12 [-2.98, -1.26] better"],
        ["int6 QAT from 0.55", "+0.43 [-0.16, +1.01]", "–"],
    ]
    assert "-6.12 [-6.98, -5.26] better" in page_of("plain")


def test_the_verdict_table_says_what_the_verdicts_say() -> None:
    findings = make_findings(num_treatments=3)
    table = verdict_table(findings)
    titles = list(table.columns)
    rows = [dict(zip(titles, row, strict=True)) for row in table.rows]
    assert rows[0]["difference, bpb"] == rows[0]["p (Holm)"] == "–"
    first = findings.treatments[1].alike.verdict
    assert rows[1]["difference, bpb"] == f"{first.mean:+.5f}"
    assert rows[1]["95 % interval"] == f"[{first.low:+.5f}, {first.high:+.5f}]"
    assert rows[1]["artifact + code, bytes"] == "1,826,938"
    assert re.fullmatch(r"1\.\d{5} ± 0\.\d{5}", rows[1]["artifact bpb"])
    assert len(equal_bytes_table(findings).rows) == 2
    many = make_findings(num_treatments=8)
    p_values = [t.alike.verdict.p_value for t in many.treatments if t.alike]
    adjusted = [row[9] for row in verdict_table(many).rows[1:]]
    assert adjusted == [number_text.p(p) for p in holm(p_values)]
    assert adjusted != [number_text.p(p) for p in p_values]
    alone = verdict_table(make_findings(num_seeds=1)).rows[1]
    assert alone[7:] == ["–"] * 6
    report = page_of("plain")
    assert "seed 9: the clock ended before the first step" in report
    assert "To know of runs" not in report
    noted = replace(findings.treatments[1], notes={2: "trained by commit a, none_s2 by b"})
    assert f"{noted.name}, seed 2: trained by commit a, none_s2 by b" in markdown(
        replace(findings, treatments=[noted])
    )


def test_what_is_wrong_with_a_run_is_said() -> None:
    assert faults(make_row("a", "b", 1)) == []
    off = {"on_grid_share": 1 - 1e-9}
    assert faults(make_row("a", "b", 1, **off)) == ["OFF THE GRID: 1.0e-09 of the weights"]
    assert faults(make_row("a", "b", 1, **off, gradient="noise")) == []
    assert faults(make_row("a", "b", 1, qat_never_started=True)) == ["QAT NEVER STARTED"]
    assert faults(make_row("a", "b", 1, status="failed", note="no disk")) == ["FAILED: no disk"]
    late = make_row("a", "b", 1, overshoot_seconds=0.123, ms_per_step=61.5)
    assert faults(late) == ["CLOCK OVERRUN by 2.0 steps"]
    died = {"arm": "?", "run_name": "d", "status": "unfinished", "exported": False, "note": "x"}
    rows = [make_row("a", "b", 1, exported=True), make_row("a", "b", 1, **off), late, died]
    table = audit_table(rows)
    assert (len(table.rows), table.bad_rows) == (3, {0, 1, 2})
    assert table.rows[0][list(table.columns).index("on grid")] == "0.999999"  # never rounded to 1
    text = page(make_findings(num_treatments=1, rows=rows))
    assert text.count("<tr class=bad>") == 3 + 1  # of the table of runs: the one that died
    assert "3 of 3 runs have a finding" in text
    assert "All 12 runs finished" in page_of("plain")


def test_files(tmp_path: Path) -> None:
    findings = CASES["plain"]()
    names = write_report(findings, tmp_path)
    assert set(names) == {path.name for path in tmp_path.iterdir()}
    assert set(names) == {"REPORT.md", "report.html", "findings.json"} | {f"{n}.png" for n in NAMES}
    report = (tmp_path / "REPORT.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+)\.png\)", report)) == NAMES
    assert findings.headline in report
    assert report == markdown(findings)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page_of("plain")
    stored = json.loads((tmp_path / "findings.json").read_text())
    assert stored["ledgers"][0]["total"]["mean"] == findings.ledgers[0].total.mean
    assert all((tmp_path / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in NAMES)
