"""The HTML page of a cabinet says what its REPORT.md says."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

from qat.cabinet.report import write_report
from tests.cabinet.cabinet_rows import CEILINGS, make_float, make_row, unavailable

ROWS = [
    make_float(latency_ms=18.0), make_row("rtn_int6", "rounding", 1_900_000, 0.0075),
    make_row("gptq_int6", "gptq", 1_850_000, 0.0029), unavailable("bnb", "bitsandbytes", "| <b>"),
]  # fmt: skip


def test_it_has_all_of_the_report(program, tmp_path: Path) -> None:
    write_report(ROWS, CEILINGS, {"machine": "made <up>"}, tmp_path)
    done = program("eval.py", "task=report", f"cabinet={tmp_path}")
    assert done.code == 0, done.err
    page = (tmp_path / "report.html").read_text()
    report = (tmp_path / "REPORT.md").read_text()
    shown = unescape(re.sub(r"<[^>]+>", " ", page))
    for title in re.findall(r"^## (.*)$", report, re.M):
        assert f">{title}</h2>" in page
    for line in report.splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            for cell in re.split(r" (?<!\\)\| ", line.strip("| ")):
                assert cell.replace("\\|", "|").strip() in shown, cell
    assert page.count("data:image/png;base64,") == report.count("![") == 5
    assert "<b>" not in page
    assert "made <up>" in shown
    assert 'src="http' not in page


def test_without_a_report_one_line(program, tmp_path: Path) -> None:
    done = program("eval.py", "task=report", f"cabinet={tmp_path}")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "REPORT.md: No such file" in done.err
    both = program("eval.py", "task=report", f"cabinet={tmp_path}", "study=x")
    assert (
        "give study=NAME or a glob of run folders, runs='logs/runs/*', or cabinet=FOLDER"
        in both.err
    )
