"""The counted code is what scoring an artifact really imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from qat.artifact.bundle import ROOT, code_files, count_code_bytes

SPY = """
import runpy, sys
sys.argv = ["eval.py", "artifact=" + sys.argv[1], "data.cache_dir=" + sys.argv[2]]
try:
    runpy.run_path(r"{root}/eval.py", run_name="__main__")
except SystemExit as stop:
    code = stop.code
files = sorted(m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None))
print("\\n".join(f for f in files if f.startswith(r"{root}/qat/")), file=sys.stderr)
sys.exit(code)
"""


def test_count_equals_what_scoring_imports(finished: Path, cache_dir: Path) -> None:
    spy = SPY.format(root=ROOT)
    done = subprocess.run(
        [sys.executable, "-c", spy, str(finished / "artifact.qat"), str(cache_dir)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )
    assert done.returncode == 0, done.stderr
    imported = {Path(line) for line in done.stderr.splitlines() if line.startswith(str(ROOT))}
    # Imported only when the artifact's text comes from the hub, and counted always.
    on_demand = {ROOT / "qat" / "language" / "hub.py"}
    assert imported | {ROOT / "eval.py"} | on_demand == set(code_files())
    assert not imported & on_demand


def test_count_is_the_size_of_those_files() -> None:
    assert count_code_bytes() == sum(len(path.read_bytes()) for path in code_files())
    names = {str(path.relative_to(ROOT)) for path in code_files()}
    assert "eval.py" in names
    assert "qat/quantize/grid.py" in names
    assert not any(name.startswith(("qat/training", "qat/study", "tests")) for name in names)
