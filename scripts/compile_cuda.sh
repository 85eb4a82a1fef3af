#!/usr/bin/env bash
# Compiles every CUDA source without a GPU, and without torch: warnings, stack frames and register spills are errors.
# A source is compiled again when it, what it includes, the flags or nvcc have changed (build/check_cuda/NAME.key).
# usage: scripts/compile_cuda.sh   (exit 3: there is no nvcc)
# environment: CUDA_HOME, ARCHITECTURES="80 90 100 120": 90 must be among them, whose machine code is read
set -euo pipefail
cd "$(dirname "$0")/.."

cuda=${CUDA_HOME:-/usr/local/cuda}
[ -x "$cuda/bin/nvcc" ] || cuda=$(dirname "$(dirname "$(command -v nvcc || echo /none/bin/nvcc)")")
if [ ! -x "$cuda/bin/nvcc" ]; then
  echo "compile_cuda: no nvcc on PATH or in CUDA_HOME: the CUDA sources were not compiled" >&2
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
common=$(echo "$ARCHITECTURES" | cat - scripts/compile_cuda.sh csrc/*.h csrc/cuda/*.cuh <("$cuda/bin/nvcc" --version) | sha256sum)
compile() {
  name=$(basename "$1" .cu)
  key=$(echo "$common" | cat - "$1" | sha256sum)
  [ "$key" != "$(cat "$out/$name.key" 2>/dev/null)" ] || return 0
  rm -f "$out/$name".*
  echo "compile_cuda: $1"
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
