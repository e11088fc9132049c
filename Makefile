# `make` or `make help` lists the targets. Everything runs in .venv, which `make setup` creates.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
PYTEST := $(PY) -m pytest
# Much of a whole run is the start of Ray and of engines, one thread's work: two at a time keep two cores busy.
SIDE_BY_SIDE := -n 2 --dist worksteal

.PHONY: help setup quickstart test test-fast test-all drills seeds docs lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## create or mend .venv (minutes the first time, at once after that)
	@command -v python3 >/dev/null || { echo "setup: python3 not found. Debian or Ubuntu: apt-get install python3.11 python3.11-venv python3.11-dev" >&2; exit 1; }
	@python3 setup_env.py

quickstart: setup ## the whole loop on a small real model, on this machine
	.venv/bin/rlhf run configs/quickstart.yaml

lint: setup ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup ## rewrite the files in the project's style
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

test: lint ## style, types and every test but the long ones; cheap tests first
	$(PYTEST) -m "not slow" --fail-early

test-fast: setup ## tests that start no engine: seconds
	$(PYTEST) -m "not slow and not engine"

test-all: test ## everything: the long drills and learning runs, too
	$(PYTEST) -m slow $(SIDE_BY_SIDE)

drills: setup ## whole runs under faults: workers killed, judge down, signals in every stage
	$(PYTEST) tests/drills $(SIDE_BY_SIDE)

seeds: setup ## the quickstart with three seeds and the null arm, as a table; goes on where it stopped
	$(PY) -m cluster.seeds

docs: setup ## write docs/config.md from the configuration classes, and the dashboard from its table
	$(PY) -m cluster.reference docs/config.md
	$(PY) -m cluster.dashboard

clean: ## remove caches; keeps .venv and runs/
	rm -rf .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build
	find rlhf actors cluster tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
