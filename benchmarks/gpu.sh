#!/usr/bin/env bash
# Every GPU check and benchmark that exists, one after the other, each ending well inside ten minutes.
# Usage: benchmarks/gpu.sh [folder for logs]
set -uo pipefail
cd "$(dirname "$0")/.."
logs="${1:-benchmarks/results/gpu-logs}"
mkdir -p "$logs"
failed=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"     # jaxml as it lies here, where it is not installed
export XLA_PYTHON_CLIENT_PREALLOCATE=false               # torch wants memory too

step() {
  local name="$1"
  shift
  echo "== $name"
  timeout 540 "$@" >"$logs/$name.log" 2>&1 || { echo "   FAILED ($?), see $logs/$name.log"; failed=1; }
  tail -n 6 "$logs/$name.log"
}

step devices python3 -c "import jax; d = jax.devices(); print(d); assert d[0].platform == 'gpu', d"
step lm python3 benchmarks/lm.py --repeats 2 --warm 5
step attention python3 benchmarks/attention.py --lengths 1024 4096 8192
step attention_correct python3 benchmarks/attention_gpu.py --subjects correct
step attention_grid python3 benchmarks/attention_gpu.py --subjects grid
step attention_rest python3 benchmarks/attention_gpu.py --subjects models packed lengths decoding
step optim python3 benchmarks/optim.py --subjects refresh compile
step optim_time python3 benchmarks/optim.py --subjects time --size 350M
step kan python3 benchmarks/kan.py --subjects layer parameters
step kan_kernel python3 benchmarks/kan.py --subjects kernel
step feed_forward python3 benchmarks/feed_forward.py --subjects gpu
step adapters python3 benchmarks/adapters.py --subjects training matmul many
step adapters_qlora python3 benchmarks/adapters_gpu.py --methods qlora
step adapters_lora python3 benchmarks/adapters_gpu.py --methods lora
step prompts python3 benchmarks/prompts.py --subjects choices starts
step prompts_methods python3 benchmarks/prompts.py --subjects methods
step rag python3 benchmarks/rag.py --subjects encoding search words
step r_tuning python3 benchmarks/r_tuning.py --subjects proof
step r_tuning_variants python3 benchmarks/r_tuning.py --subjects variants --seeds 0
step optim_training python3 benchmarks/optim_training.py --minutes 8
exit $failed
