#!/usr/bin/env bash
# Everything that only a GPU can say, the most valuable first, each part bounded, under 10 minutes in
# all; works with torch 2.11 and without wandb, gguf and bitsandbytes:
#   launch/gpu_checks.sh [settings of train.py]   # PYTHON=python3 for another than .venv's
# A table on stdout, all of it in logs/gpu_checks.json, what each part said in logs/gpu_checks/.
# By default train.py reads the small text of the tests; data.train_files=... and so on name others.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
said=logs/gpu_checks
rm -rf "$said" logs/runs/gpu_cold logs/runs/gpu_warm && mkdir -p "$said"
golf=$PWD/tests/data/golf
run=(profile=golf qat=int6 qat.start_step=20 max_steps=40 budget_seconds=null
  schedule.warmdown_steps=10 model.vocab_size=512 "data.train_files=$golf/fineweb_train_*.bin"
  "data.val_files=$golf/fineweb_val_*.bin" "data.tokenizer=$golf/tokenizer.model" "$@")

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" 2>&1 | tee "$said/$name.log" | tail -n 30
  printf '%s %s %s\n' "$name" "${PIPESTATUS[0]}" $((SECONDS - started)) >> "$said/parts"
}

part train_step 230 "$python" benchmarks/train_step.py golf --compile --steps 5 --turns 3 \
  --micro-tokens 131072,262144 --peak-tflops "${PEAK_TFLOPS:-989}"
part tests 150 "$python" -m pytest -q -n 8 -W default -p no:cacheprovider -m cuda tests/cuda
part train_cold 90 "$python" train.py run_name=gpu_cold "${run[@]}"
part train_warm 60 "$python" train.py run_name=gpu_warm "${run[@]}"
part snap 40 "$python" benchmarks/snap.py
"$python" - "$said" << 'PYTHON'
import json, pathlib, sys

said = pathlib.Path(sys.argv[1])
parts = {}
for line in (said / "parts").read_text().splitlines():
    name, code, seconds = line.split()
    text = (said / f"{name}.log").read_text(errors="replace")
    parts[name] = {"exit_code": int(code), "seconds": int(seconds), "said": text[-20_000:]}
    verdict = {"0": "ok", "124": "out of time"}.get(code, f"FAILED ({code})")
    print(f"{name:12} {seconds:>4} s  {verdict}")
pathlib.Path("logs/gpu_checks.json").write_text(json.dumps(parts, indent=1) + "\n")
sys.exit(any(part["exit_code"] for part in parts.values()))
PYTHON
