#!/usr/bin/env bash
# Compiles every CUDA source and binding without a GPU: warnings, stack frames and register spills are errors.
# Links them for CUDA builds of torch, the oldest and the newest, and imports the result there (check_torch.py).
# Prints what each kernel uses on each architecture and judges its machine code (check_cuda.py), executes that on the CPU
# for some of the benchmarks' cases, predicts their time and compares their instructions with a budget (sass/predict.py).
# A source is compiled again when it, what it includes, the flags or nvcc have changed (build/check_cuda/NAME.key).
# usage: scripts/check_cuda.sh [REPORT.json, else build/cuda_static.json]   (exit 3: there is no nvcc)
# environment: CUDA_HOME, PYTHON, ARCHITECTURES="80 90 100 120": 90 must be among them, whose machine code is read
set -euo pipefail
cd "$(dirname "$0")/.."

cuda=${CUDA_HOME:-/usr/local/cuda}
[ -x "$cuda/bin/nvcc" ] || cuda=$(dirname "$(dirname "$(command -v nvcc || echo /none/bin/nvcc)")")
if [ ! -x "$cuda/bin/nvcc" ]; then
  echo "check_cuda: no nvcc on PATH or in CUDA_HOME: the CUDA sources were not compiled" >&2
  exit 3
fi

# as torch's extension builder compiles
torch_flags="--expt-relaxed-constexpr"
for what in HALF_OPERATORS HALF_CONVERSIONS BFLOAT16_CONVERSIONS HALF2_OPERATORS; do
  torch_flags+=" -D__CUDA_NO_${what}__"
done

ARCHITECTURES=${ARCHITECTURES:-80 90 100 120}
out=build/check_cuda
mkdir -p "$out"
for log in "$out"/*.log; do  # of sources that are gone
  name=$(basename "$log" .log)
  [ -e "csrc/cuda/$name.cu" ] || rm -f "$out/$name".*
done
common=$(echo "$ARCHITECTURES" | cat - scripts/check_cuda.sh csrc/*.h csrc/cuda/*.cuh <("$cuda/bin/nvcc" --version) | sha256sum)
compile() {
  name=$(basename "$1" .cu)
  key=$(echo "$common" | cat - "$1" | sha256sum)
  [ "$key" != "$(cat "$out/$name.key" 2>/dev/null)" ] || return 0
  rm -f "$out/$name".*
  echo "check_cuda: $1"
  gencode=()
  for arch in $ARCHITECTURES; do gencode+=(-gencode "arch=compute_$arch,code=sm_$arch"); done
  # shellcheck disable=SC2086  # several options
  if ! "$cuda/bin/nvcc" -std=c++17 -O3 $torch_flags "${gencode[@]}" -lineinfo -Werror all-warnings -Xcompiler -fPIC,-Wall,-Wextra \
    -Xptxas -v,-warn-spills,-warn-lmem-usage -c "$1" -o "$out/$name.o" >"$out/$name.log" 2>&1; then
    grep -E "error|warning" "$out/$name.log" | c++filt >&2
    exit 1
  fi
  echo "$key" >"$out/$name.key"
}
export -f compile
export ARCHITECTURES cuda out torch_flags common
# shellcheck disable=SC2012  # names without spaces; the longest first, so that all cores are busy until the end
ls -S csrc/cuda/*.cu | tr '\n' '\0' | xargs -0 -P "$(nproc)" -I{} bash -c 'set -euo pipefail; compile {}'

python=${PYTHON:-python3}
check_torch() {
  "$python" scripts/check_torch.py "$out" --cuda "$cuda" || {
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
