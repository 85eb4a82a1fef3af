#!/usr/bin/env bash
# Checks the CUDA sources without a GPU, once scripts/compile_cuda.sh has compiled them.
# Links them for CUDA builds of torch, the oldest and the newest, and imports the result there (check_torch.py).
# Prints what each kernel uses on each architecture and judges its machine code (check_cuda.py), executes that on the CPU
# for some of the benchmarks' cases, predicts their time and compares their instructions with a budget (sass/predict.py).
# usage: scripts/check_cuda.sh [REPORT.json, else build/cuda_static.json]   (exit 3: there is no nvcc)
# environment: CUDA_HOME, PYTHON, ARCHITECTURES; SAMPLE=NUMBER: one of the two torches, which one goes by the number
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/compile_cuda.sh
out=build/check_cuda
cuda=${CUDA_HOME:-/usr/local/cuda}
[ -x "$cuda/bin/nvcc" ] || cuda=$(dirname "$(dirname "$(command -v nvcc)")")
python=${PYTHON:-python3}
check_torch() {
  "$python" scripts/check_torch.py "$out" --cuda "$cuda" ${SAMPLE:+--sample "$SAMPLE"} || {
    [ $? -eq 3 ] || exit 1
    torch_include=$("$python" -c "import torch.utils.cpp_extension as e; print(*('-isystem ' + p for p in e.include_paths()))")
    for source in csrc/*.cpp; do
      echo "check_cuda: $source, its syntax"
      # shellcheck disable=SC2086  # several options
      "${CXX:-g++}" -std=c++20 -fsyntax-only -Wall -Wextra -Wno-missing-field-initializers -Werror \
        -DPSPNET_FAST_WITH_CUDA -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000 $torch_include \
        -isystem "$cuda/include" "$source"
    done
  }
}
check_torch &  # its downloads leave time to what has one process
torch=$! report=${1:-build/cuda_static.json} status=0
"$python" scripts/check_cuda.py "$out" --json "$report" || status=$?
if [ $status -eq 0 ]; then "$python" scripts/sass/predict.py --budgets --blocks 6 --json "$report" || status=$?; fi
wait $torch
[ $status -eq 0 ] || [ $status -eq 3 ]
