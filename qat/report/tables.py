"""The tables of a study's report: cells of text, the same for the page and for REPORT.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from qat.quantize.gradients import rule_kinds
from qat.report import number_text as text
from qat.runs.tables import COLUMNS, TEXTS, cells
from qat.study.findings import Contrast, Findings, Ledger, Treatment
from qat.study.headline import calls
from qat.study.significance import BAR_NATS, MAX_SEEDS, Effect, holm

Row = dict[str, Any]


@dataclass(frozen=True)
class ReportTable:
    """The first cell of a row names it."""

    caption: str
    columns: dict[str, bool]  # title -> whether its cells are numbers
    rows: list[list[str]]
    bad_rows: frozenset[int] = frozenset()  # their second cell says in words what is wrong


def answer_table(findings: Findings) -> ReportTable:
    """QAT as it stored itself, beside each way to store its baseline."""
    called = {way: calls(effects) for way, effects in findings.beside.items()}
    arms = dict.fromkeys(name for effects in findings.beside.values() for name in effects)
    rows = []
    for arm in arms:
        row = [arm]
        for way, effects in findings.beside.items():
            effect = effects.get(arm)
            said = text.NOTHING if effect is None else (
                f"{text.difference_mbpb(effect.mean)} {_bounds_mbpb(effect)} {called[way][arm]}"
            )  # fmt: skip
            row.append(said.strip())
        rows.append(row)
    columns = {"QAT": False} | dict.fromkeys(findings.beside, True)
    caption = (
        "QAT less its baseline, by the way that one is stored, in mbpb with 95 % intervals; "
        "decided after Holm where it says better or worse"
    )
    return ReportTable(caption, columns, rows)


def verdict_table(findings: Findings) -> ReportTable:
    """Every treatment, against the baseline stored in the same way where that is another one."""
    return _verdicts(
        "Stored alike: against the baseline stored in the same way",
        [(treatment, treatment.alike) for treatment in findings.treatments],
    )


def equal_bytes_table(findings: Findings) -> ReportTable:
    """Treatments that were compared with a baseline of as many bytes."""
    return _verdicts(
        "At equal bytes: against the baseline stored by the solver in as many bytes",
        [(t, t.equal_bytes) for t in findings.treatments if t.equal_bytes],
    )


def stores_table(findings: Findings) -> ReportTable:
    """QAT as it stored itself, against the baseline by each of the study's stores."""
    return _verdicts(
        "In place of QAT: QAT as it stored itself, against the baseline by each of the stores",
        [(t, contrast) for t in findings.treatments for contrast in t.by_store.values()],
    )


def _verdicts(caption: str, compared: Sequence[tuple[Treatment, Contrast | None]]) -> ReportTable:
    p_values = [c.verdict.p_value for _, c in compared if c]
    adjusted = iter(holm([p for p in p_values if p is not None]))
    rows = []
    for treatment, comparison in compared:
        bpb, num_bytes = treatment.val_bpb.values(), treatment.total_bytes.values()
        row = [
            treatment.name,
            treatment.grid,
            text.mean_and_spread(list(bpb)),
            text.count(mean(num_bytes) if num_bytes else None),
            text.count(len(bpb)),
        ]
        if comparison is None:
            rows.append([*row, *[text.NOTHING] * 8])
            continue
        v = comparison.verdict
        if v.num_seeds < len(bpb):
            row[-1] = f"{v.num_seeds} of {len(bpb)}"
        rows.append([
            *row,
            comparison.against,
            text.difference_bpb(v.mean),
            text.bounds(v.low, v.high) or text.NOTHING,
            text.p(v.p_value),
            text.p(None if v.p_value is None else next(adjusted)),
            text.p(v.p_over_bar),
            text.bpb(v.detectable),
            _seeds_needed(comparison),
        ])  # fmt: skip
    columns = {
        "treatment": False, "grid": False, "artifact bpb": True, "artifact + code, bytes": True,
        "seeds": True, "against": False, "difference, bpb": True, "95 % interval": True,
        "p": True, "p (Holm)": True, f"p over {BAR_NATS} nats": True, "detectable, bpb": True,
        "seeds needed": True,
    }  # fmt: skip
    return ReportTable(caption, columns, rows)


def _seeds_needed(comparison: Contrast) -> str:
    v = comparison.verdict
    if v.seeds_needed is None and v.num_seeds > 1:
        return f"> {MAX_SEEDS:,}"
    return text.count(v.seeds_needed)


def missing_seeds(findings: Findings) -> list[str]:
    """One line for each run that was started and is in no comparison, with the reason."""
    return _by_seed((treatment.name, treatment.missing_seeds) for treatment in findings.treatments)


def notes(findings: Findings) -> list[str]:
    """What to know of pairs: those of other code, and means over several runs."""
    return _by_seed((treatment.name, treatment.notes) for treatment in findings.treatments)


def _by_seed(said: Iterable[tuple[str, dict[int, str]]]) -> list[str]:
    return [
        f"{name}, seed {seed}: {words}"
        for name, by_seed in said
        for seed, words in sorted(by_seed.items())
    ]


def ledger_table(findings: Findings) -> ReportTable:
    rows = []
    for ledger in findings.ledgers:
        parts = (*text.ledger_parts(ledger), ledger.total)
        cells = [
            f"{number} {_bounds_mbpb(part)}".strip()
            for number, part in zip(text.ledger_mbpb(ledger), parts, strict=True)
        ]
        equal = ledger.at_equal_steps
        cells.append(f"{text.difference_mbpb(equal.mean)} {_bounds_mbpb(equal)}".strip())
        rows.append([ledger.name, *cells, ledger.against, _throughput_basis(ledger)])
    columns = {
        "treatment": False, "throughput": True, "training": True, "gap": True, "total": True,
        "training + gap": True, "against": False, "throughput is": False,
    }  # fmt: skip
    return ReportTable(
        "In mbpb (thousandths of a bit per byte), with 95 % intervals", columns, rows
    )


def _bounds_mbpb(part: Effect) -> str:
    if part.low is None or part.high is None:
        return ""
    return text.bounds(1000 * part.low, 1000 * part.high, 2)


def _throughput_basis(ledger: Ledger) -> str:
    return f"{'measured' if ledger.is_measured else 'estimated'}: {ledger.basis}"


def runs_table(rows: Sequence[Row]) -> ReportTable:
    """The columns that are printed too, without those of the audit."""
    of_audit = ("train s", "limit", "QAT steps")
    titles = [t for t in dict.fromkeys(("run", "note", *COLUMNS)) if t not in of_audit]
    columns = {title: title not in TEXTS for title in titles}
    shown = [
        [found[t] or (text.NOTHING if columns[t] else "") for t in titles]
        for found in map(cells, rows)
    ]
    bad = frozenset(at for at, row in enumerate(rows) if row["status"] != "finished")
    return ReportTable("Every run", columns, shown, bad)


def audit_table(rows: Sequence[Row]) -> ReportTable:
    """Did QAT happen, and did the clock hold? Runs that trained; exports of them are left out."""
    trained = [row for row in rows if not row["exported"]]
    found = [faults(row) for row in trained]
    shown = [
        [
            row["run_name"],
            "; ".join(what) if what else "ok",
            row["arm"],
            text.count(row.get("seed")),
            _share(row.get("on_grid_share")),
            _share(row.get("nonzero_gradient_share")),
            _share(row.get("movable_share")),
            _qat_steps(row),
            _qat_share(row),
            text.fixed(row.get("tokens_per_parameter_byte"), 2),
            text.fixed(row.get("train_seconds"), 2),
            text.fixed(row.get("overshoot_seconds"), 3),
            row["status"],
        ]
        for row, what in zip(trained, found, strict=True)
    ]
    columns = {
        "run": False, "finding": False, "arm": False, "seed": True, "on grid": True,
        "with gradient": True, "movable": True, "QAT steps": True, "QAT share": True,
        "tokens / parameter byte": True, "training s": True,
        "overshoot s": True, "status": False,
    }  # fmt: skip
    bad = frozenset(at for at, what in enumerate(found) if what)
    return ReportTable("Liveness of QAT and the training clock, run by run", columns, shown, bad)


def _share(value: float | None) -> str:
    """Six decimals: a share of 1 is a promise, and one weight of a million breaks it."""
    if value is None:
        return text.NOTHING
    return "1" if value == 1.0 else f"{min(value, 0.999999):.6f}"


def _qat_steps(row: Row) -> str:
    first, last = row.get("qat_first_step"), row.get("qat_last_step")
    return text.NOTHING if first is None else f"{first:,}..{text.count(last)}"


def _qat_share(row: Row) -> str:
    steps, on = row.get("steps"), row.get("qat_steps")
    return text.NOTHING if not steps or on is None else f"{100 * on / steps:.1f} %"


def _off_grid_by_nature(row: Row) -> bool:
    """Its gradient rule shows the model weights beside the grid."""
    rule = rule_kinds().get(row.get("gradient", ""))
    return rule is not None and not rule.is_on_grid


def faults(row: Row) -> list[str]:
    """What makes a run doubtful, in words."""
    found = []
    if row["status"] != "finished":
        found.append(row["status"].upper() + (f": {row['note']}" if row.get("note") else ""))
    if row.get("qat_never_started"):
        found.append("QAT NEVER STARTED")
    share = row.get("on_grid_share")
    if share is not None and share < 1 and not _off_grid_by_nature(row):
        found.append(f"OFF THE GRID: {1 - share:.1e} of the weights")
    over, step = row.get("overshoot_seconds"), row.get("ms_per_step")
    if over is not None and step is not None and over > step / 1000:
        found.append(f"CLOCK OVERRUN by {1000 * over / step:.1f} steps")
    return found
