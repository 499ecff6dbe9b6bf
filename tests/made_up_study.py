"""A study's findings, made up, with every number easy to recognise."""

from __future__ import annotations

from dataclasses import replace

from qat.study.findings import Contrast, Curve, Findings, Ledger, Treatment
from qat.study.significance import Effect, verdict

NO_INTERVAL = Effect(0.0, None, None)


def comparison(by_seed: dict[int, float]) -> Contrast:
    found = verdict(list(by_seed.values()), [0.0] * len(by_seed), 3)
    return Contrast("the same", dict.fromkeys(by_seed, 1.0), {1: 70}, by_seed, found)


def made_up(**changed: object) -> Findings:
    """Three treatments, one of them without any file, and a row of each kind."""
    base = Treatment("none", "none", None, "int8", False, {1: 1.25, 2: 1.5}, {1: 100, 2: 200}, {},
                     None, None)  # fmt: skip
    int4 = replace(base, name="int4", arm="int4", grid="int4", is_qat=True, store="as trained",
                   val_bpb={1: 1.125, 2: 1.25}, total_bytes={1: 50, 2: 60},
                   alike=comparison({1: -0.125, 2: -0.25}),
                   equal_bytes=comparison({1: 0.5}))  # fmt: skip
    dead = replace(base, name="dead", val_bpb={}, total_bytes={}, missing_seeds={1: "diverged"})
    ledger = Ledger("int4", True, Effect(0.01, 0.005, 0.015), Effect(0.02, None, None),
                    Effect(-0.05, -0.06, -0.04), NO_INTERVAL, Effect(-0.03, -0.04, -0.02),
                    "equal steps")  # fmt: skip
    rows = [
        {"run_name": "a", "qat": "int4", "val_bpb_artifact": 1.125, "data": {"val": "0"},
         "settings": {"secret": 1}},
        {"run_name": "b", "status": "unfinished", "note": "it died"},
    ]  # fmt: skip
    curves = [Curve("none", [1.0, 2.0], [3.5, 2.5], None, 1.2, 1.25),
              Curve("int4", [1.0, 2.0, 3.0], [3.25, 2.25, 2.0], 2.0, None, None)]  # fmt: skip
    findings = Findings(
        "night-1", "does it pay?", "It pays.", "none", [1, 2], 60.0, ["2 cores"], ["abc"],
        # Longer than a block of the file, so that a message in several fragments is read too.
        ["python train.py " + "a=1 " * 20_000],
        [base, int4, dead], [ledger], curves, rows,
    )  # fmt: skip
    return replace(findings, **changed)
