"""A study whose runs take all GPUs of this node: its arms and seeds, one torchrun after another.

    python launch/study.py GPUS experiment=NAME [arm=A,B] [seed=1,2] [setting=value ...]
    python launch/study.py 8 experiment=pr145 arm=none,int8,int6 seed=1,2,3

Again, it goes on where it stopped. A run that fails is a row of the table, and the others go on.
On one GPU ``python train.py -m experiment=NAME`` does the same without this.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from qat.errors import UserError
from qat.runs.result import Result
from qat.settings import machine
from qat.settings.options import read_study
from qat.study.study import run_name

ROOT = Path(__file__).resolve().parents[1]
USAGE = "usage: python launch/study.py GPUS experiment=NAME [arm=A,B] [seed=1,2] [setting=value]"


def run_once(ranks: int, folder: Path, asked: list[str]) -> int:
    """One arm with one seed: left alone where it has a score, gone on with where it has begun."""
    result = Result.read(folder)
    if result is not None and result.status != "failed":
        return result.exit_code
    if folder.is_dir():
        asked = [f"resume={folder}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc_per_node={ranks}", str(ROOT / "train.py"), *asked]
    code = subprocess.run(command, check=False).returncode
    if code:
        print(f"{folder}: exit code {code}", file=sys.stderr)
    return code


def main(arguments: list[str]) -> int:
    """The exit code: the largest of all runs and the report."""
    ranks, *settings = arguments or [""]
    typed = dict(setting.partition("=")[::2] for setting in settings)
    if not (ranks.isdecimal() and int(ranks)) or not all("=" in setting for setting in settings):
        raise UserError(USAGE)
    experiment = typed.get("experiment", "")
    study = read_study(experiment)
    if study is None:
        raise UserError(f"experiment={experiment}: it has no arms; see conf/experiment/")
    arms = typed.get("arm", ",".join(study.arms)).split(",")
    seeds = typed.get("seed", ",".join(map(str, study.seeds))).split(",")
    if not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"seed={typed['seed']}: give numbers, seed=1,2")
    parent = Path(typed.get("runs_dir", "logs/runs"), experiment).expanduser()
    own = ("experiment", "arm", "seed", "runs_dir")
    rest = [setting for setting in settings if setting.partition("=")[0] not in own]
    codes = []
    for seed in seeds:
        for arm in arms:
            name = run_name(arm, int(seed))
            asked = [f"experiment={experiment}", f"arm={arm}", f"seed={seed}",
                     f"runs_dir={parent}", f"run_name={name}", *rest]  # fmt: skip
            codes.append(run_once(int(ranks), parent / name, asked))
    report = [sys.executable, str(ROOT / "eval.py"), "task=report", f"study={parent}"]
    return max(*codes, subprocess.run(report, check=False).returncode)


if __name__ == "__main__":
    machine.speak_utf8()
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
