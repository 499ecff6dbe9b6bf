#!/usr/bin/env bash
# One node, 1..8 GPUs (or CPU ranks): launch/node.sh RANKS [settings...]
#   launch/node.sh 8 qat=int6 qat.start_fraction=0.85
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=${1:?usage: launch/node.sh RANKS [settings...]}
shift
exec .venv/bin/torchrun --standalone --nproc_per_node="$ranks" train.py "$@"
