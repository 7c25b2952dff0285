PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
DOCS_STAMP := $(VENV)/.installed-docs
BENCHMARKS := loss losses data payload overlap scheduler control_plane step scale_out tune
LOG := $(VENV)/install.log

.DEFAULT_GOAL := help
.PHONY: help install quickstart quickstart-vision test test-more test-all test-wheel test-all-layouts test-architectures test-netns soak lint docs bench bench-tune compare compare-gap clean

help:
	@echo "make install     create $(VENV) and install taid-ray with its development tools"
	@echo "make quickstart  distil the bundled model on a local Ray (installs first if needed)"
	@echo "make quickstart-vision  distil a bundled model that answers questions on pictures"
	@echo "make test        a strong test of every property: on two cores about 10 minutes"
	@echo "make test-more   the others: searches, jobs, scaling, further failures, a wheel (about 25 minutes)"
	@echo "make test-all    both"
	@echo "make test-wheel  a wheel in an empty environment runs the quickstart (part of test-more)"
	@echo "make test-all-layouts  one trajectory in every layout of workers, ZeRO stages, pools and micro-batches (by hand)"
	@echo "make test-architectures  every language model that transformers knows is refused or exact (by hand; 15 minutes)"
	@echo "make test-netns  a run on three hosts that are network namespaces (Linux, root; ten minutes)"
	@echo "make soak        kills parts of runs at random for MINUTES=10, and counts what is lost"
	@echo "make lint        ruff, mypy, import rules (import-linter), declared dependencies (deptry)"
	@echo "make docs        the documents as a site, in site/; a dead link is an error"
	@echo "make bench       all benchmarks, or one: make bench ONLY=loss (see benchmarks/README.md)"
	@echo "make bench-tune  what a search costs beside one run (some minutes)"
	@echo "make compare     12 methods on TinyStories and 4 on Dolly, three seeds each (by hand; up to two hours)"
	@echo "make compare-gap four methods under three teachers of growing size (by hand; up to two hours)"
	@echo "make clean       remove $(VENV) and caches (runs/ stays)"

# `$(WATCH) command` runs the command into the log and says every 3 s how far it is, so that the terminal never falls
# silent; if the command fails, the end of the log follows.
WATCH := bash -c '"$$@" >>$(LOG) 2>&1 & job=$$!; trap "kill $$job 2>/dev/null; exit 130" INT TERM; \
	while sleep 3; kill -0 $$job 2>/dev/null; do \
	printf "  [%3d s] %s\n" $$SECONDS "$$(grep -av WARNING $(LOG) | tail -n 1 | tr -cd " -~" | cut -c 1-100)"; done; \
	wait $$job || { tail -n 30 $(LOG); echo "failed: $$* (whole log: $(LOG))"; exit 1; }' watch

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or later is needed, \
	$(PYTHON) is {v.major}.{v.minor}. Try: make install PYTHON=python3.11")'
	@mkdir -p $(VENV) && : >$(LOG)
	@test -x $(BIN)/pip || { echo "Creating $(VENV) ..."; $(WATCH) $(PYTHON) -m venv $(VENV); }
	@echo "Installing torch ..."
	@$(WATCH) $(BIN)/python -m pip install -c constraints.txt torch
	@echo "Installing taid-ray and everything else it needs ..."
	@$(WATCH) $(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@$(WATCH) $(BIN)/python tests/support/torchvision_beside_cpu_torch.py
	@touch $@
	@echo "Installed."

quickstart: install
	@$(BIN)/taid-ray quickstart

quickstart-vision: install
	@$(BIN)/taid-ray quickstart --vision

# Tests in one process each go first, on two processes; those that share a Ray follow. Each closes with the slowest ten and
# the time by folder.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=10 tests/unit tests/fuzz
	$(BIN)/python -m pytest --durations=10 tests/integration tests/chaos

test-more: install
	$(BIN)/python -m pytest -m more --durations=10

test-all: test test-more

test-wheel: install
	$(BIN)/python -m pytest -m more tests/wheel

test-all-layouts: install
	$(BIN)/python -m pytest -m layouts --durations=10 tests/integration

test-architectures: install
	$(BIN)/python -m pytest -n 2 -m architectures --durations=10 tests/architectures

test-netns: install
	$(BIN)/python -m pytest -m netns tests/netns

soak: install
	TAID_SOAK_MINUTES=$(or $(MINUTES),10) $(BIN)/python -m pytest -m soak --durations=0 tests/chaos tests/integration/test_prepare.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry taid_ray
	$(BIN)/deptry . --ignore DEP004

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The site is in site/; to read it: $(BIN)/mkdocs serve"

$(DOCS_STAMP): $(STAMP)
	@echo "Installing what the site is built with ..."
	@$(WATCH) $(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	@touch $@

# One after another, each in a process of its own; a failure does not keep the others from running.
bench: $(BENCH_STAMP)
	@failed=; for name in $(or $(ONLY),$(BENCHMARKS)); do echo "== $$name"; \
	$(BIN)/python -m benchmarks.$$name || failed="$$failed $$name"; done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

compare: install
	$(BIN)/python -m benchmarks.compare

compare-gap: install
	$(BIN)/python -m benchmarks.compare_gap

bench-tune: install
	$(BIN)/python -m benchmarks.tune

$(BENCH_STAMP): $(STAMP)
	@echo "Installing what the benchmarks compare with ..."
	@$(WATCH) $(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find taid_ray tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
