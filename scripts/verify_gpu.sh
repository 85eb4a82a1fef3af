#!/usr/bin/env bash
# Builds, tests and measures the CUDA kernels on this machine's GPU; without one, does what can be done and says what not.
# usage: scripts/verify_gpu.sh OUTDIR [build|test|twice|sanitize|kernels|network|bench ...]   (all parts; PYTHON, CUDA_HOME)
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/verify_gpu.py" "$@"
