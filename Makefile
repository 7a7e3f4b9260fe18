# The two commands a newcomer needs: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export MPLCONFIGDIR ?= $(CURDIR)/.cache/matplotlib

# Tests start hundreds of processes: without cached bytecode each compiles all it imports.
unexport PYTHONDONTWRITEBYTECODE

PEERS := build/peers

.PHONY: results quickstart test lint types contracts format check docs measure benchmark benchmark-peers clean

quickstart: $(VENV)/.package
	$(BIN)/certifl quickstart --out runs/quickstart

# One process more than there are cores, since some tests wait for processes of their own.
# loadgroup: the tests of one running federation stay in one process.
WORKERS ?= $(shell expr $$(nproc) + 1)

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadgroup $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests examples benchmarks docs
	$(BIN)/ruff format --check src tests examples benchmarks docs

types: $(VENV)/.dev
	$(BIN)/basedpyright

contracts: $(VENV)/.dev
	$(BIN)/lint-imports

check: test lint types contracts

format: $(VENV)/.dev
	$(BIN)/ruff check --fix src tests examples benchmarks docs
	$(BIN)/ruff format src tests examples benchmarks docs

docs: $(VENV)/.dev
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_algorithms.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Every table, figure and page of docs/results from the runs published there, without training.
results: $(VENV)/.dev
	$(BIN)/python docs/results/figures.py

measure: $(VENV)/.dev
	$(BIN)/python benchmarks/code.py

# GOLDEN names a file of published vote counts: ten counts an image, then the label.
benchmark: $(VENV)/.dev benchmark-peers
	$(BIN)/python benchmarks/certification.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/training.py --workers 2 --rounds 6
	$(BIN)/python benchmarks/participation.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/scan.py
	test -z "$(GOLDEN)" || $(BIN)/python benchmarks/votes_to_curve.py --golden $(GOLDEN) --repetitions 20

# certifl beside its peers, in an environment of their own.
benchmark-peers: $(PEERS)/.done
	$(PEERS)/bin/python benchmarks/peers/compare.py

$(PEERS)/.done: benchmarks/peers/requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
		--editable . --requirement benchmarks/peers/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) runs .cache build dist

# The range of torch in pyproject.toml takes the CPU build where one is at hand.
$(VENV)/.package: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@
