# make demo: from nothing to a compressed, evaluated model.  make test: from nothing to a passed test suite.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := $(VENV)/.docs
# Idle threads yield instead of spinning, so that two processes can share few cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-slow lint bench docs clean

demo: $(READY)
	rm -rf krony-demo
	$(BIN)/krony demo krony-demo

# A process a core, so a thread a process.
test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -o faulthandler_timeout=3600

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/decomposition.py
	$(BIN)/python benchmarks/speed.py

# The documentation as a site in site/. Building needs no network once mkdocs is installed.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) krony-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis site

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	touch $(READY)

$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	touch $(DOCS)
