#!/usr/bin/env bash
# Proves the CUDA side on a machine with a GPU, in under nine minutes: tests, then benchmarks, everything under one folder.
#   tools/gpu_check.sh [FOLDER]     (default: gpu_check)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_check}
python=${PYTHON:-python}
mkdir -p "$out"
status=0

if ! "$python" -c "import linzoo.ops" 2>/dev/null; then  # not installed
  export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
fi

step() {  # step SECONDS NAME COMMAND...: runs it with a limit, its output to NAME.txt; all end within 530 seconds
  local limit=$1 name=$2 start=$SECONDS left=$((530 - SECONDS))
  shift 2
  [ $left -gt 5 ] || { printf '%-24s no time left\n' "$name" | tee -a "$out/summary.txt"; status=1; return; }
  [ $limit -lt $left ] || limit=$left
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1
  local rc=$?
  printf '%-24s exit %3d  %4d s\n' "$name" $rc $((SECONDS - start)) | tee -a "$out/summary.txt"
  [ $rc -eq 0 ] || status=1
}

: >"$out/summary.txt"
rm -f "$out/benchmark.json"
step 30 environment nvidia-smi
step 60 compile "$python" -m linzoo.ops.compile_cuda  # what the tests launch, on every core at once
step 100 doctor "$python" -c "from linzoo.tools.cli import main; raise SystemExit(main(['doctor']))"
step 120 tests "$python" -m pytest -q -m gpu tests/ops
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step 40 "$tool" compute-sanitizer --tool $tool --error-exitcode 1 "$python" -m pytest -q -m gpu tests/ops/test_cuda.py \
      -k "equals_reference and float32 and (selective_scan-0 or selective_scan-5 or wkv-3)"
  done
fi
for op in selective_scan bi_wkv wkv6 wkv7 rational deform_conv causal_conv1d diagonal_scan ssd; do  # a file each: none is lost
  step 40 "ops-$op" "$python" tools/benchmark.py ops --op "$op" --device cuda --budget 0.2 --json "$out/benchmark.json"
done
for model in groupmamba_t vmamba_t vssd_t vrwkv_t swin_tiny_patch4_window7_224 convnext_tiny; do
  step 30 "train-$model" "$python" tools/benchmark.py models --device cuda --models "$model" --batch 128 --train \
    --budget 0.2 --json "$out/benchmark.json"
done
for model in vmamba_t groupmamba_t swin_tiny_patch4_window7_224; do
  step 60 "compiled-$model" "$python" tools/benchmark.py models --device cuda --models "$model" --batch 128 --compile \
    --budget 0.2 --json "$out/benchmark.json"
done
exit $status
