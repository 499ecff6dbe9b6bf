#!/usr/bin/env bash
# The question of this project on one GPU, at the challenge's shape, in a number of seconds:
#   launch/gpu_study.sh SECONDS [settings of train.py]   # PYTHON=python3 for another than .venv's
# Whole seeds of a trunk and {none, int6, int4} from half of it on, one seed after another, as many as
# fit: compilation, scoring and the report count. The same command goes on where it was stopped.
# To bring back: logs/runs/gpu_study/gpu/ (findings, rows and curves; a megabyte).
# By default train.py reads the small text of the tests; data.train_files=... and so on name others.
# On an H100 its runs were seen, not yet its report: give it 10 minutes for two seeds.
set -uo pipefail
cd "$(dirname "$0")/.."
limit=${1:?usage: launch/gpu_study.sh SECONDS [settings of train.py]}
shift
python=${PYTHON:-.venv/bin/python}
golf=$PWD/tests/data/golf
report_seconds=45
study=(-m experiment=gpu sweep_name=gpu_study model.vocab_size=512
  "data.train_files=$golf/fineweb_train_*.bin" "data.val_files=$golf/fineweb_val_*.bin"
  "data.tokenizer=$golf/tokenizer.model" "$@")
# A seed that has no time left to end is stopped with a checkpoint, and counts in no verdict.
timeout --signal=TERM --kill-after=30 $((limit - report_seconds)) "$python" train.py "${study[@]}"
code=$?
if [ "$code" -ne 124 ] && [ "$code" -ne 143 ]; then exit "$code"; fi
exec "$python" eval.py task=report study=gpu_study
