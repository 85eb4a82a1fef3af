#!/usr/bin/env bash
# One wheel for every torch and Python: builds it with the torch of this checkout's environment, then runs the
# tests of scripts/installed_tests.py on the installed wheel under another torch, and another Python if one is given.
# usage: scripts/test_abi.sh OTHER_TORCH [PYTHON]   e.g. scripts/test_abi.sh torch==2.14.1 python3.13
set -euo pipefail
[ $# -ge 1 ] || { sed -n 's/^# usage: /usage: /p' "$0" >&2; exit 2; }
cd "$(dirname "$0")/.."
build_python=${BUILD_PYTHON:-$PWD/.venv/bin/python} other_torch=$1 other_python=${2:-python3}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$build_python" -m pip wheel --quiet --no-deps --wheel-dir "$work" .
wheel=$(echo "$work"/pspnet_fast-*-cp310-abi3-*.whl)
"$other_python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "$other_torch" "$wheel" numpy pytest

tests=$("$build_python" scripts/installed_tests.py "$work")
cd "$work"
built_with=$("$build_python" -c 'import torch, platform; print(f"torch {torch.__version__}, Python {platform.python_version()}")')
echo "test_abi: $(basename "$wheel"), built with $built_with; running as"
venv/bin/pspnet-fast info
venv/bin/python -c "import pspnet_fast, sys; sys.exit('$work/venv' not in pspnet_fast.__file__)"
# shellcheck disable=SC2086  # names of files
venv/bin/python -m pytest -q -p no:cacheprovider -k "not cuda" $tests
