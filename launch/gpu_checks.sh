#!/usr/bin/env bash
# Everything that only a GPU can say about bits, QAT's price, the engine and GPTQ, in one go (9 minutes at
# most are meant; never run by us):
#   launch/gpu_checks.sh            # tables on stdout, JSON in logs/
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" -m pytest -q tests/quantize tests/training -p no:cacheprovider -n 0
"$python" benchmarks/snap.py
"$python" benchmarks/gptq.py
"$python" benchmarks/qat_price.py golf --compile
"$python" benchmarks/train_step.py golf --compile --peak-tflops "${PEAK_TFLOPS:-989}"
