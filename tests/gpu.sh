#!/usr/bin/env bash
# Everything that needs a GPU, in one run: builds the operator for this machine's GPU alone, runs the GPU tests, the
# benchmark, and compute-sanitizer on a few tests. Needs torch with CUDA, nvcc, a C++ compiler, and pytest; OpenMMLab's
# packages only for the models of the benchmark.
#
#   tests/gpu.sh OUT [build] [test] [bench] [sanitize]      default: all steps, in this order
#
# Writes OUT/STEP.log, OUT/benchmark.json and OUT/summary.txt. A step that fails does not stop the next ones; the exit
# status is 1 if any failed. STEP_SECONDS limits each step (default: 540). MMCV_SDIST names mmcv's source distribution,
# whose kernel is compared as well.
set -uo pipefail
out=$(realpath -m "${1:?usage: tests/gpu.sh OUT [STEP...]}")
shift
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
status=0

run() {  # NAME COMMAND...
  local name=$1 start=$SECONDS code=0
  shift
  timeout "${STEP_SECONDS:-540}" "$@" >"$out/$name.log" 2>&1 || code=$?
  echo "$name: exit status $code after $((SECONDS - start)) s; $(tail -n 1 "$out/$name.log")" | tee -a "$out/summary.txt"
  [ "$code" = 0 ] || status=1
}

step_build() {
  MSDA_CUDA_ARCHS=$("$PYTHON" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))') || return
  export MSDA_CUDA_ARCHS
  "$PYTHON" csrc/build.py --cuda on --verbose
}

step_test() {
  "$PYTHON" -m pytest -p no:cacheprovider -rs tests/ops/test_operator_gpu.py tests/tools/benchmarks/test_benchmark_gpu.py
}

step_bench() {
  "$PYTHON" -m msda_plugin benchmark gpu --json "$out/benchmark.json" ${MMCV_SDIST:+--mmcv-sdist "$MMCV_SDIST"}
}

step_sanitize() {
  local tool code=0
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m pytest -p no:cacheprovider \
      tests/ops/test_operator_gpu.py -k 'test_float64 and 4-4 and (32 or 71) or test_dtypes and False' || code=1
  done
  return $code
}

export -f step_build step_test step_bench step_sanitize
export PYTHON out
for step in "${@:-build test bench sanitize}"; do
  for name in $step; do run "$name" bash -c "step_$name"; done
done
exit $status
