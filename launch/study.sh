#!/usr/bin/env bash
# A study whose runs take all GPUs of this node, one run at a time; run it again to go on.
# A run that fails is a row of the table, and the others go on.
# (On one GPU: python train.py -m experiment=NAME does the same without this.)
#
#   launch/study.sh GPUS EXPERIMENT "ARMS" "SEEDS" [setting=value ...]
#   launch/study.sh 8 pr145 "none none_long_warmdown int8_percentile int8 int6" "1 2 3"
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=$1 experiment=$2 arms=$3 seeds=$4
shift 4
for seed in $seeds; do
  for arm in $arms; do
    run=logs/runs/$experiment/${arm}_s$seed
    if [ -f "$run/result.json" ] && ! grep -q '"status": "failed"' "$run/result.json"; then
      continue
    elif [ -d "$run" ]; then
      launch/node.sh "$gpus" "resume=$run" || echo "$run: exit code $?" >&2
    else
      launch/node.sh "$gpus" "experiment=$experiment" "arm=$arm" "seed=$seed" \
        "runs_dir=logs/runs/$experiment" "run_name=${arm}_s$seed" "$@" \
        || echo "$run: exit code $?" >&2
    fi
  done
done
.venv/bin/python eval.py task=report "study=$experiment"
