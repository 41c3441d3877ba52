# make test   makes the environment, installs, lints, type-checks and tests
# make bench  measures the attention op on this machine and renders docs/results
# make docs   builds the documentation into build/site, every link checked
# make gpu    tests the GPU kernels on this machine's CUDA card, measures them and renders docs/results
# make demo   makes the environment and compares three attention structures on real text
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: test demo bench docs gpu lint clean

# torch goes first and alone: whatever pulls it later must find it there, or it brings its largest build.
$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" numpy
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2

demo: $(VENV)/installed
	$(BIN)/structattn compare language --attentions standard mlr swa:64 --data stdlib --preset demo --out runs/demo
	@echo; echo "The best model writes:"
	$(BIN)/structattn generate --run runs/demo --prompt "def " --length 300
	@echo; echo "report: runs/demo/report.html"

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.attention

docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[docs]"
	touch $@

# A card wants the CUDA build of torch, which brings its own Triton: run it in an environment that has them.
gpu: GPU_PYTHON ?= $(PYTHON)
gpu:
	@$(GPU_PYTHON) -c "import torch; torch.cuda.is_available() or exit('no CUDA device')"
	PYTHONPATH=src $(GPU_PYTHON) -m pytest tests/ops/test_triton.py
	PYTHONPATH=src:. $(GPU_PYTHON) -m benchmarks.gpu --out docs/results/attention-gpu.json

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
