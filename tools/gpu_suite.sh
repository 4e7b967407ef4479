#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than ten minutes: tests, kernel and decoding benchmarks.
#
#   bash tools/gpu_suite.sh [folder]           # results: JSON, plots and logs (default: $OUT, or benchmarks/inference)
#   bash tools/gpu_suite.sh --smoke [folder]   # the same commands at their smallest, without a GPU
#
# Needs torch, triton, transformers and pytest alone: no network, no deepspeed, no wandb. A step that fails or takes too
# long does not stop the next one; the exit status says whether one did.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
smoke=
if [ "${1:-}" = --smoke ]; then
    smoke=yes
    shift
fi
out=${1:-${OUT:-benchmarks/inference}}
mkdir -p "$out"
: >"$out/suite.log"
failed=0

# step SECONDS NAME COMMAND...: run it within its time; all it says goes to suite.log, the end of it to the screen.
step() {
    local seconds=$1 name=$2 began=$SECONDS status
    shift 2
    timeout --signal=INT --kill-after=10 "$seconds" "$@" 2>&1 | tee -a "$out/suite.log" | tail -n 15
    status=${PIPESTATUS[0]}
    echo "--- $name: $((SECONDS - began)) s, status $status" | tee -a "$out/suite.log"
    [ "$status" -eq 0 ] || failed=1
}

if [ -n "$smoke" ]; then
    step 200 tests "$python" -m pytest -q --collect-only -m gpu tests/kernels/test_gpu.py tests/inference/test_graphs.py
    step 200 kernels "$python" tools/bench_kernels.py --help
    step 200 decode "$python" tools/bench_inference.py --profile smoke --order alone --presets split dense-engine \
        --dense dynamic --output "$out/smoke.json"
else
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    step 60 environment "$python" tools/environment.py --json
    step 200 tests "$python" -m pytest -q -m gpu tests/kernels tests/inference tests/models
    step 60 kernels "$python" tools/bench_kernels.py --budget-seconds 40 --output "$out/kernels.json"
    step 190 decode-1b "$python" tools/bench_inference.py --profile gpu --shape 1b --budget-seconds 150 --window 512 \
        --dense dynamic --presets dense-engine graft-cells --longest-encoding 32768 --output "$out/gpu-1b.json"
    step 140 decode-8b "$python" tools/bench_inference.py --profile gpu --shape 8b --budget-seconds 100 --window 512 \
        --dense dynamic --presets dense-engine graft-cells --longest-encoding 16384 --output "$out/gpu-8b.json"
fi
exit $failed
