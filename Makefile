# Everything CI does, as targets. A bare clone with Python 3.11 (or 3.12) needs nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/quickstart.yaml
DRILL ?= tests
WORKERS ?= 2
# Quick tests share the cores, file by file. Slow ones start clusters and servers, which would fight for them.
PARALLEL := -n $(WORKERS) --dist loadfile
SOURCES := flows stages unclip_models cluster tests

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-fast chaos bench-data bench-train lint format types lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed ## create .venv and install exactly what requirements.lock says

$(VENV)/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	# Compiled once here: where PYTHONDONTWRITEBYTECODE is set, every worker would compile torch at every start.
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip sync --quiet --compile-bytecode requirements.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --editable .
	touch $@

quickstart: setup ## the whole pipeline, small and real, then open runs/quickstart/report.html
	$(BIN)/unclip run $(CONFIG)

test: setup ## all tests but the kill drill
	$(BIN)/pytest $(PARALLEL) -m "not slow and not chaos"
	$(BIN)/pytest -m "slow and not chaos"

test-fast: setup ## the tests that take seconds
	$(BIN)/pytest $(PARALLEL) -m "not slow"

chaos: setup ## the drills: kills, faults and lost nodes, up to a whole run killed ten times on S3
	# All of them: then the quickstart by Ray Jobs goes on to its very end, too.
	$(if $(filter tests,$(DRILL)),UNCLIP_TEST_UNTIL=evaluate) $(BIN)/pytest -m chaos $(DRILL)

# Rivals live in environments of their own; see the benchmarks' --help.
bench-data: setup ## the data plane against other software: ratios, side by side (CLIP_RETRIEVAL=python SKLEARN=python)
	$(BIN)/python -m tests.benchmarks.bench_embed $(if $(CLIP_RETRIEVAL),--clip-retrieval-python $(CLIP_RETRIEVAL))
	$(BIN)/python -m tests.benchmarks.bench_pca $(if $(SKLEARN),--sklearn-python $(SKLEARN))
	for name in lists download near_duplicates decisions resume requests scale; do $(BIN)/python -m tests.benchmarks.bench_$$name || exit 1; done

bench-train: setup ## the training plane against other software, likewise
	for name in loader models degradation train; do $(BIN)/python -m tests.benchmarks.bench_$$name || exit 1; done

lint: setup ## ruff: rules and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: setup ## rewrite to the house format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: setup ## mypy
	$(BIN)/mypy

lock: ## resolve anew and write requirements.lock (versions only)
	$(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11 \
		--no-annotate --no-header --no-emit-index-url --upgrade --output-file requirements.lock

clean: ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
