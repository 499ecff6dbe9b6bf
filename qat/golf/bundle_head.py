"""A training run of the project qat in one file: it trains again, or scores the artifact.

    python train_gpt.py                        train with the settings of the run (OVERRIDES below)
    python train_gpt.py seed=2 max_steps=100   ... and with others; what is typed wins
    torchrun --standalone --nproc_per_node=8 train_gpt.py
    python train_gpt.py artifact=artifact.qat  score an artifact on its validation text
    python train_gpt.py --unpack DIR           write the sources and settings that are packed here

Needs Python 3.11 or newer and the packages that the README.md beside this file names. PACKED is
base85 of LZMA of a JSON object, path -> text: train.py, eval.py, conf/ and the modules they import.
They are unpacked into a temporary folder and run from there.
"""

from __future__ import annotations

import base64
import json
import lzma
import sys
import tempfile
from importlib import import_module
from pathlib import Path


def unpack(folder: Path) -> None:
    """Write the sources into ``folder``."""
    sources = json.loads(lzma.decompress(base64.b85decode(PACKED.replace("\n", ""))))
    for name, text in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def unpack_for_reading(arguments: list[str]) -> str | None:
    """``--unpack DIR``; returns what is wrong, None if nothing is."""
    if len(arguments) != 1:
        return "--unpack: give one folder, --unpack DIR"
    folder = Path(arguments[0])
    try:
        if folder.exists() and any(folder.iterdir()):
            return f"--unpack {folder}: there are files in it already; give another folder"
        unpack(folder)
    except OSError as error:
        return f"--unpack {folder}: {error.strerror}"
    return None


def command(typed: list[str]) -> tuple[str, list[str]]:
    """(train or eval, its arguments). A setting that is typed replaces the run's own."""
    names = {argument.lstrip("+").partition("=")[0] for argument in typed}
    if "artifact" in names:
        return "eval", typed
    if "resume" in names:  # takes everything from the run that it goes on with
        return "train", typed
    kept = [setting for setting in OVERRIDES if setting.lstrip("+").partition("=")[0] not in names]
    return "train", kept + typed


def main() -> int:
    """Returns the exit code."""
    if sys.argv[1:2] == ["--unpack"]:
        if mistake := unpack_for_reading(sys.argv[2:]):
            print(f"error: {mistake}", file=sys.stderr)
        return 2 if mistake else 0
    # Each rank of torchrun has a folder of its own; the current folder stays the user's.
    with tempfile.TemporaryDirectory(prefix="train_gpt-", ignore_cleanup_errors=True) as folder:
        unpack(Path(folder))
        sys.path.insert(0, folder)
        name, sys.argv[1:] = command(sys.argv[1:])
        return import_module("qat.settings.command_line").main(import_module(name).PROGRAM)


OVERRIDES: list[str] = []
PACKED = ""

if __name__ == "__main__":
    sys.exit(main())
