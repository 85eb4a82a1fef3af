# make demo   trains the demo's two models on the embedded scenes; writes runs/demo/
# make test   formatting, types, CUDA compile check where nvcc exists, all tests
# make test-fast   for daily work: the tests of the CPU's kernels, a sample of them, and of the rest what is quick
# make docs   the documentation as a site, warnings being errors: build/docs/html
# make dist   sdist and wheel, tried without a compiler under several Pythons and torches: dist/
# make test-arm   the CPU kernels compiled for aarch64, the operators' tests under qemu, where Debian's packages for it are
# make test-peers   fuse on segmentation_models_pytorch and transformers, in an environment of their own, .venv-peers
# They set themselves up: a virtual environment in .venv with the pinned torch, and the compiled kernels.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
PROCESSES ?= 2
PARALLEL = -n $(PROCESSES) --dist worksteal
CSRC := $(wildcard csrc/*.* csrc/*/*.*)
SITE := 'import sysconfig; print(sysconfig.get_path("purelib"))'

# .ci/run: a number that chooses a sample of the cases of each test
SAMPLE ?=

.PHONY: demo test tests test-fast test-peers docs dist lint types compile-cuda check-cuda bench test-abi test-arm format clean

demo: .venv/installed
	$(BIN)/python -m pspnet_fast.demo --out runs/demo

# two architectures are enough every day, the oldest and the one whose machine code is read
test tests: ARCHITECTURES = 80 90
test: check-cuda types docs lint tests

tests: .venv/installed compile-cuda
	@echo "tests: on 2 cores some 26 minutes, of a sample 16"
	OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 $(BIN)/python -m pytest $(PARALLEL) --durations=15 $(SAMPLE:%=--sample=%)

test-fast: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) --fast

docs: .venv/installed
	$(BIN)/python -m sphinx -b html -W --keep-going --fresh-env -q docs build/docs/html

dist: .venv/installed
	$(BIN)/python scripts/dist.py

test-peers: .venv-peers/installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) .venv-peers/bin/python -m pytest $(PARALLEL) $(SAMPLE:%=--sample=%) tests/peers

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

types: .venv/installed
	@echo "types: a minute the first time"
	$(BIN)/mypy

# needs nvcc alone: beside the downloads of .venv there is a core for it
compile-cuda:
	@ARCHITECTURES="$(ARCHITECTURES)" scripts/compile_cuda.sh || [ $$? -eq 3 ]

# no GPU is needed, and no CUDA build of torch in the environment; downloads two, a gigabyte, into build/
check-cuda: .venv/installed compile-cuda
	@SAMPLE=$(SAMPLE) ARCHITECTURES="$(ARCHITECTURES)" PYTHON=$(BIN)/python scripts/check_cuda.sh || { [ $$? -eq 3 ] && echo "check-cuda: skipped"; }

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks

# the wheel under another torch and Python: make test-abi OTHER_TORCH=torch==2.14.1 OTHER_PYTHON=python3.13
test-abi: .venv/installed
	scripts/test_abi.sh $(OTHER_TORCH) $(OTHER_PYTHON)

test-arm: .venv/installed
	@$(BIN)/python scripts/test_arm.py || { [ $$? -eq 3 ] && echo "test-arm: skipped"; }

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf build dist *.egg-info pspnet_fast/*.so .venv/installed

.venv/installed: setup.py pyproject.toml scripts/build_backend.py $(CSRC)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "needs Python >= 3.10: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile "$(TORCH)"
	@echo "Compiling the kernels: 2 to 10 minutes"
	$(BIN)/pip install --no-compile --editable ".[dev]"
	touch $@

# Its own packages come first; what they need and .venv has, torch above all, is .venv's, the kernels built in place too.
.venv-peers/installed: tests/peers/requirements.txt tests/peers/no_deps.txt pyproject.toml .venv/installed
	$(PYTHON) -m venv .venv-peers
	$(BIN)/python -c $(SITE) >"$$(.venv-peers/bin/python -c $(SITE))/venv.pth"
	.venv-peers/bin/pip install --no-compile --no-deps --requirement tests/peers/no_deps.txt
	.venv-peers/bin/pip install --no-compile --requirement tests/peers/requirements.txt
	touch $@
