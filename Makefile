# Every target with a line of its own: make help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install run live test test-engines check bench matrix soak constraints clean types

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F '\t' '{printf "  make %-12s %s\n", $$1, $$2}'

install: .venv/.installed  ## make .venv and install the project with its tools, at the versions of constraints.txt

run: install  ## run the built-in flights pipeline: 336,776 real flights into data/  (ARGS="--from=2013-06-01")
	$(BIN)/python -m pipelines.run --pipeline=flights $(ARGS)

LIVE := data/demo
live: install  ## watch the flights arrive: a replayer sends them sped up, a speed layer follows, the table is live
	@rm -rf $(LIVE) && mkdir -p $(LIVE)
	@$(BIN)/pipelines replay --pipeline=flights --live=$(LIVE)/log.db --speedup=14400 --shuffle=30m --late=0.001 \
	  --duplicate=0.01 --corrupt=0.001 > $(LIVE)/replay.log 2>&1 & replayer=$$!; trap 'kill $$replayer 2>/dev/null' EXIT; \
	$(BIN)/python -m pipelines.run --pipeline=flights --mode=micro-batch --live=$(LIVE)/log.db --state=$(LIVE)/state \
	  --store=$(LIVE)/store.db --dead_letters=$(LIVE)/dead_letters --report=$(LIVE)/run.json $(ARGS)

test: install  ## run the tests  (ARGS="tests/io -k delta" for some of them)
	$(BIN)/python -m pytest $(ARGS)

test-engines: install  ## run the tests on real engines: Flink, Spark, Prism and Dataflow's staging; needs Java, Maven, Go
	$(BIN)/python -m pytest -m engine -o timeout=900 tests/engines $(ARGS)

check: install types  ## ruff, mypy strict, and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd .types && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache .
	cd .types && ../$(BIN)/lint-imports --config ../pyproject.toml --cache-dir ../.import_linter_cache --no-logo

bench: install  ## measure against DuckDB, Polars, PySpark and per-row Beam; writes docs/benchmarks.md
	$(BIN)/uv pip install -q --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks $(ARGS)
	$(BIN)/python -m benchmarks.live $(ARGS)

matrix: install  ## every mode on every engine that is up (pipelines cluster up flink|spark|prism); writes docs/engines.md
	$(BIN)/uv pip install -q --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.matrix $(ARGS)

soak: install  ## kill members of the Flink cluster under a stream, 50 times; writes docs/engines.md  (half an hour)
	$(BIN)/python -m benchmarks.soak $(ARGS)

constraints: install  ## pin the newest versions that setup.py allows, of everything, into constraints.txt
	$(BIN)/uv pip compile -q --upgrade --universal --python-version 3.11 --all-extras --no-annotate --no-header setup.py -o constraints.txt

clean:  ## remove what was made: the environment, caches, builds (data/ stays)
	rm -rf .venv .types build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# The packages laid out as Python sees them, by links: mypy and import-linter read files and do not follow __path__.
# They run in there: next to the folder io, mypy would take that for Python's io.
types:
	@for folder in . examples transforms io runners serving; do mkdir -p .types/pipelines/$$folder; done
	@find -L .types -type l -delete
	@ln -sfn $(CURDIR)/tests $(CURDIR)/benchmarks $(CURDIR)/setup.py .types
	@ln -sf $(CURDIR)/pipelines/*.py $(CURDIR)/pipelines/py.typed .types/pipelines
	@ln -sf $(CURDIR)/pipelines/examples/*.py .types/pipelines/examples
	@for folder in transforms io runners serving; do ln -sf $(CURDIR)/$$folder/*.py .types/pipelines/$$folder; done

.venv/.installed: setup.py pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt uv
	@echo "installing into .venv, about a minute the first time"
	@$(BIN)/uv pip install -q --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m compileall -q pipelines transforms io runners serving
	@touch $@
