"""Where the text of a run is, for what is asked of the run later."""

from __future__ import annotations

from dataclasses import replace
from os.path import expanduser
from pathlib import Path

from qat.evaluation.open_model import names_text
from qat.runs.run_folder import CONFIG, read_config
from qat.settings.schema import DataSettings, from_yaml


def text_of_run(run: str, data: DataSettings) -> DataSettings:
    """``data`` as typed, or if it names no text that of the run: its shards and tokenizer, or the
    cache that it prepared its text in. UserError if the run's settings are damaged."""
    if names_text(data) or not (Path(run) / CONFIG).is_file():
        return data
    own = from_yaml(read_config(Path(run), "run")[0], f"run={run}").data
    if own.val_files:
        return replace(own, train_files=None)
    usual = DataSettings(source=data.source).cache_dir
    is_default = data.cache_dir in (usual, expanduser(usual))
    return replace(data, cache_dir=own.cache_dir) if is_default else data
