#!/usr/bin/env bash
# Proves the CUDA side on a machine with a GPU, in under nine minutes: tests, then benchmarks, everything under one folder.
#   tools/gpu_check.sh [FOLDER]     (default: gpu_check)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu_check}
python=${PYTHON:-python}
mkdir -p "$out"
status=0

if ! "$python" -c "import linzoo.ops" 2>/dev/null; then  # not installed: the package is these folders under one name
  package=$(mktemp -d)
  mkdir "$package/linzoo"
  for part in ops backbones configs tools; do ln -s "$PWD/$part" "$package/linzoo/$part"; done
  export PYTHONPATH=$package${PYTHONPATH:+:$PYTHONPATH}
fi

step() {  # step SECONDS NAME COMMAND...: runs it with a limit, its output to NAME.txt
  local limit=$1 name=$2 start=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1
  local rc=$?
  printf '%-12s exit %3d  %4d s\n' "$name" $rc $((SECONDS - start)) | tee -a "$out/summary.txt"
  [ $rc -eq 0 ] || status=1
}

: >"$out/summary.txt"
rm -f "$out/benchmark.json"
step 30 environment nvidia-smi
step 30 doctor "$python" -c "from linzoo.tools.cli import main; raise SystemExit(main(['doctor']))"
step 150 tests "$python" -m pytest -q -m gpu tests/ops
if command -v compute-sanitizer >/dev/null; then
  step 60 sanitizer compute-sanitizer --error-exitcode 1 "$python" -m pytest -q -m gpu tests/ops/test_cuda.py \
    -k "equals_reference and float32 and selective_scan-0"
fi
step 150 ops "$python" tools/benchmark.py ops --device cuda --budget 0.3 --json "$out/benchmark.json"
models=(groupmamba_t vmamba_t vssd_t vrwkv_t swin_tiny_patch4_window7_224 convnext_tiny deit_small_patch16_224)
step 90 models "$python" tools/benchmark.py models --device cuda --models "${models[@]}" --batch 128 --compile \
  --budget 0.3 --json "$out/benchmark.json"
step 60 train "$python" tools/benchmark.py models --device cuda --models "${models[@]}" --batch 128 --train \
  --budget 0.3 --json "$out/benchmark.json"
exit $status
