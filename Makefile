# make demo   trains the demo's two models on the embedded scenes; writes runs/demo/
# make test   formatting, types, CUDA compile check where nvcc exists, all tests
# Both set themselves up: a virtual environment in .venv with the pinned torch, and the compiled kernels.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SOURCES := setup.py pyproject.toml scripts/build_backend.py $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test lint types check-cuda bench test-abi format clean

demo: .venv/installed
	$(BIN)/python -m pspnet_fast.demo --out runs/demo

test: .venv/installed lint types check-cuda
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*.*)

types: .venv/installed
	$(BIN)/mypy

# nvcc alone; no GPU and no CUDA build of torch are needed
check-cuda: .venv/installed
	@scripts/check_cuda.sh || { status=$$?; [ $$status -eq 3 ] && echo "check-cuda: skipped, no nvcc"; }

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks

# one wheel, built against $(TORCH), under another torch: make test-abi OTHER_TORCH=torch==2.14.1
test-abi: .venv/installed
	scripts/test_abi.sh $(OTHER_TORCH)

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.* csrc/*/*.*)

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pspnet_fast needs Python >= 3.10; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/torch: .venv/bin/python
	$(BIN)/pip install "$(TORCH)" ninja
	touch $@

.venv/installed: .venv/torch $(SOURCES)
	$(BIN)/pip install --editable ".[dev]" --config-settings editable_mode=compat
	touch $@

clean:
	rm -rf build dist *.egg-info pspnet_fast/*.so
