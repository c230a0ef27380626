# Everything needed is built into .venv by the targets that use it; Python 3.11-3.13 and make suffice.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test check lint types imports test-fast test-failed test-slow chaos fix up down clean

BIN := .venv/bin
DATA_DIR ?= .noisemill

# The first Python that fits; override with `make PYTHON=/path/to/python3.12 ...`.
FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(FITS)' 2>/dev/null && echo $$python && break; done)

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/demo-installed ## train a model on handwritten digits and draw new ones, through every real part
	$(BIN)/noisemill demo

# A process for each core, each with servers of its own; the tests of a file stay together, for what they share.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile

test: .venv/dev-installed ## run the test suite against real servers
	$(BIN)/python -m pytest -m "not long" $(SIDE_BY_SIDE)

check: lint types imports test-fast ## lint, types, import rules and the fast tests: before every commit

lint: .venv/dev-installed ## style and common mistakes (ruff)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/dev-installed ## type annotations (pyright)
	$(BIN)/pyright

imports: .venv/dev-installed ## who may import whom (import-linter)
	$(BIN)/lint-imports

test-fast: .venv/dev-installed ## the tests that take seconds at most
	$(BIN)/python -m pytest -q -m "not slow and not long" $(SIDE_BY_SIDE)

MOST_FAILED := 5
FAILED := import json, sys; failed = json.load(open(".pytest_cache/v/cache/lastfailed")); \
	print("once more:", *failed, sep="\n  "); sys.exit(not 0 < len(failed) <= $(MOST_FAILED))
test-failed: .venv/dev-installed ## once more, alone, the tests that failed in the last run, if they are few and timed
	$(BIN)/python -c '$(FAILED)'
	$(BIN)/python -m pytest -m "not long" --last-failed --last-failed-no-failures none --second-trial

test-slow: .venv/dev-installed ## the long forms: drills, and a wider search of what can happen to a job
	$(BIN)/python -m pytest -m long

chaos: .venv/dev-installed ## kill, stop and cut off everything under load, and check that nothing was lost or done twice
	$(BIN)/python -m tests.chaos $(CHAOS)

fix: .venv/dev-installed ## repair what ruff can repair by itself
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

up: .venv/demo-installed ## start the local stack in the background; its data stay in .noisemill
	$(BIN)/noisemill up --detach --data-dir $(DATA_DIR)

down: .venv/demo-installed ## stop the local stack
	$(BIN)/noisemill down --data-dir $(DATA_DIR)

clean: ## remove what can be built again; the data in .noisemill stay
	@if [ -x $(BIN)/noisemill ] && [ -e $(DATA_DIR)/stack.json ]; then $(BIN)/noisemill down --data-dir $(DATA_DIR); fi
	@if [ -x $(BIN)/noisemill ] && [ -e demo/.stack/stack.json ]; then $(BIN)/noisemill down --data-dir demo/.stack; fi
	rm -rf .venv demo/.stack build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/demo-installed: pyproject.toml constraints.txt
	$(call install,demo)

.venv/dev-installed: pyproject.toml constraints.txt
	$(call install,dev)
	@touch .venv/demo-installed

define install
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with its venv module is needed" \
		"(Debian: apt install python3 python3-venv), or name one: make PYTHON=/path/to/python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing noisemill[$(1)] into .venv, once; this takes some minutes"
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null && [ -z "$$PIP_EXTRA_INDEX_URL" ]; then \
		echo "  (no NVIDIA GPU? PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU wheels> saves 3 GB of CUDA)"; fi
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(1)]"
	@touch $@
endef
