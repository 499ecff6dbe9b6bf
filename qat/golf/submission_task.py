"""``eval.py task=submission run=RUN out=DIR``: a finished run as the challenge wants it handed in.

DIR holds ``train_gpt.py`` (all the code, see ``qat/golf/bundle.py``), the artifact,
``train.log``, ``submission.json`` and a README.md. The total is that of the files as written.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tomllib
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.artifact.container import ARTIFACT, read_artifact
from qat.errors import UserError
from qat.golf.bundle import NAME, ROOT, bundle
from qat.runs.result import Result, row_of
from qat.runs.run_folder import LOG, read_config, read_overrides
from qat.runs.tables import as_markdown
from qat.settings.replay import replayed, score_arguments
from qat.settings.schema import TrainSettings, from_yaml

if TYPE_CHECKING:
    from qat.budget.budget import Budget
    from qat.settings.schema import EvalTaskSettings, SubmissionSettings

README = """\
# {name}

{blurb}

| | |
| --- | --- |
| val_bpb of the artifact | {row.val_bpb_artifact:.5f} (val_loss {row.val_loss_artifact:.5f}) |
| of the float weights | {row.val_bpb_float:.5f}, so storing cost {row.quant_gap_bpb:+.5f} |
| artifact + code | {row.artifact_bytes:,} + {code_bytes:,} = {total_bytes:,} bytes |
| limit | {row.limit_bytes:,} bytes |
| training | {row.steps:,} steps in {row.train_seconds:.1f} s |
| seeds | {row.seed} |
| hardware | {row.hardware} |

{table}
## Run it

`train_gpt.py` is all the code; its size is what is counted. Python 3.11 or newer, and:

```sh
pip install {packages}
```

Train again, with the settings below; what is typed after the name replaces them:

```sh
{train}
```

Score the artifact:

```sh
{score}
```

Paths in these settings are those of the machine it was trained on; elsewhere give them again.
`python train_gpt.py --unpack DIR` writes the sources.

## Settings

```
{settings}
```
"""


def pinned_packages() -> list[str]:
    """The packages that pyproject.toml asks for to train and score, in the versions installed here.
    UserError if one is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["train"]
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in asked]
    try:
        # "+cpu" names a build that the package index does not have.
        return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]
    except metadata.PackageNotFoundError as missing:
        raise UserError(f"{missing.name} is not installed; run `make setup`") from None


def _finished(folder: Path) -> Result:
    """The row of a run that can be handed in. UserError says why another one cannot."""
    row = Result.read(folder)
    if row is None:
        raise UserError(f"run={folder}: it has no result; wait until it is finished, or resume it")
    if row.status == "oversize":
        total = (row.artifact_bytes or 0) + (row.code_bytes or 0)
        raise UserError(
            f"run={folder}: artifact and code have {total} bytes and limit_bytes = "
            f"{row.limit_bytes}; take a smaller model or a coarser grid"
        )
    if (row.val_tokens or 0) < (row.val_tokens_there or 0):
        raise UserError(
            f"run={folder}: its val_bpb is that of {row.val_tokens:,} of {row.val_tokens_there:,} "
            "validation tokens; give a run with eval.max_tokens=null"
        )
    if row.status != "finished":
        raise UserError(f"run={folder}: it {row.status} ({row.error}); give a finished run")
    return row


def _settings(folder: Path) -> tuple[TrainSettings, list[str]]:
    """(settings of the run, the overrides that give them again)."""
    yaml, choices = read_config(folder, "run")
    settings = from_yaml(yaml, f"run={folder}")
    if settings.model.init_from is not None:
        raise UserError(
            f"run={folder}: it began from model.init_from = {settings.model.init_from}, which a "
            "submission does not hold; give a run that began from random weights"
        )
    return settings, replayed(read_overrides(folder), settings, choices)


def _blurb(row: Result) -> str:
    return (
        f"qat={row.qat} on grid {row.grid}, profile {row.profile}: "
        f"{row.steps} steps in {row.train_seconds:.0f} s."
    )


def _as_json(row: Result, asked: SubmissionSettings, code_bytes: int) -> dict[str, Any]:
    assert row.artifact_bytes is not None
    return {
        "author": asked.author,
        "github_id": asked.github_id,
        "name": asked.name or row.run_name,
        "blurb": asked.blurb or _blurb(row),
        "date": date.today().isoformat(),
        "val_loss": row.val_loss_artifact,
        "val_bpb": row.val_bpb_artifact,
        "bytes_total": row.artifact_bytes + code_bytes,
        "bytes_code": code_bytes,
        "seeds": [row.seed],
        "hardware": row.hardware,
    }


def _contents(folder: Path, asked: SubmissionSettings) -> dict[str, bytes]:
    """File name -> bytes. UserError if the run cannot be handed in."""
    row = _finished(folder)
    settings, overrides = _settings(folder)
    artifact = folder / ARTIFACT
    read_artifact(artifact)
    try:
        files = {
            NAME: bundle(overrides),
            ARTIFACT: artifact.read_bytes(),
            LOG: (folder / LOG).read_bytes(),
        }
    except OSError as error:
        raise UserError(f"run={folder}: cannot read {error.filename} ({error.strerror})") from None
    if len(files[ARTIFACT]) != row.artifact_bytes:
        raise UserError(f"run={folder}: {ARTIFACT} is not the file that its result is about")
    described = _as_json(row, asked, len(files[NAME]))
    if described["bytes_total"] > row.limit_bytes:
        raise UserError(
            f"limit_bytes = {row.limit_bytes}: the artifact has {row.artifact_bytes} bytes and the "
            f"code, as it is now, {len(files[NAME])}; take a smaller model or a coarser grid"
        )
    files["submission.json"] = (json.dumps(described, indent=2) + "\n").encode()
    score = ["python", NAME, f"artifact={ARTIFACT}", *score_arguments(settings)]
    ranks = re.search(r"^(\d+)x |, (\d+) ranks$", row.hardware)  # as provenance.hardware has it
    num_ranks = int(ranks[1] or ranks[2]) if ranks else 1
    launcher = "python"
    if num_ranks > 1:
        launcher = f"torchrun --standalone --nproc_per_node={num_ranks}"
    files["README.md"] = README.format(
        row=row,
        name=described["name"],
        blurb=described["blurb"],
        code_bytes=described["bytes_code"],
        total_bytes=described["bytes_total"],
        table=as_markdown([row_of(row) | {"total_bytes": described["bytes_total"]}]),
        packages=" ".join(pinned_packages()),
        train=f"{launcher} {NAME}",
        score=shlex.join(score),
        settings="\n".join(overrides),
    ).encode()
    return files


def _write(out: Path, files: dict[str, bytes]) -> None:
    """All of them or none: in a folder beside ``out`` that then takes its name."""
    out = out.resolve()
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        os.replace(temporary, out)  # refuses a folder that has files in it by now
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run(s: EvalTaskSettings, budget: Budget) -> int:
    assert s.run is not None  # asked for by the checks of the settings
    assert s.out is not None
    out = Path(s.out)
    if os.path.exists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out={out}: it is there already; give another name, or an empty folder")
    files = _contents(Path(s.run), s.submission)
    try:
        _write(out, files)
    except OSError as error:
        raise UserError(f"out={out}: cannot write there ({error.strerror or error})") from None
    described = json.loads(files["submission.json"])
    print(f"submission  {out}")
    for key in ("val_bpb", "bytes_total", "bytes_code"):
        print(f"{key:11} {described[key]}")
    if missing := [key for key in ("author", "github_id") if not described[key]]:
        print("fill in     " + ", ".join(f"submission.{key}" for key in missing))
    return 0
