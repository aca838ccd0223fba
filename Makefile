# Every target does the set-up that it needs: `make test` and `make demo` work on a machine that has python, pip and make only.
# The environment's folder is named after the lock, so a second call starts at once and a changed lock gets a fresh one.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
export PIP_DISABLE_PIP_VERSION_CHECK := 1

LOCK := requirements.lock
VENV := .venv-$(shell { sha256sum $(LOCK) || shasum -a 256 $(LOCK); } 2>/dev/null | cut -c1-12)
BIN := $(VENV)/bin
SOURCES := src tests examples benchmarks docs
WORKERS ?= 2
# The lock is made with Python 3.11, so that one comes first.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: help setup test test-slow lint ruff ruff-format types format docs demo lock clean python-version

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## make the environment (about 2 minutes and 6 GB the first time)
	@echo "ready: source $(BIN)/activate"

test: $(VENV)/.ready lint types  ## lint, types and the default tests, on two workers
	@echo "== pytest"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(VENV)/.ready  ## the tests that take longer than a minute; before a release
	@$(BIN)/python -m pytest -m slow --durations 10

lint: ruff ruff-format  ## ruff: rules and layout

ruff: $(VENV)/.ready
	@echo "== ruff check"
	@$(BIN)/ruff check --quiet .

ruff-format: $(VENV)/.ready
	@echo "== ruff format --check"
	@$(BIN)/ruff format --quiet --check . || { echo "the layout of these files differs: make format"; exit 1; }

types: $(VENV)/.ready
	@echo "== mypy"
	@$(BIN)/mypy

format: $(VENV)/.ready  ## mend what ruff can mend by itself
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

docs: $(VENV)/.ready  ## build the documentation into site/, warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "built: site/index.html"

demo: $(VENV)/.ready  ## train on the procedural rooms and compare the fusions: about five minutes on two cores
	@[[ -e data/rooms ]] || $(BIN)/tokenfusion prepare rooms --out data/rooms
	@$(BIN)/tokenfusion study demo --seeds 1 --jobs 2 --out runs/demo
	@$(BIN)/tokenfusion report runs/demo/fusion/tokenfusion-seed0

# Upgrade with an early 3.11 (PYTHON=...): some packages want a later patch release than Debian 12 has, 3.11.2.
lock: .venv-lock/bin/pip-compile  ## write requirements.lock again from pyproject.toml (UPGRADE=1: newest versions)
	@echo "resolving and hashing (a few minutes) ..."
	@CUSTOM_COMPILE_COMMAND="make lock" $< --quiet $(if $(UPGRADE),--upgrade) --extra dev --strip-extras \
		--generate-hashes --no-emit-options --unsafe-package tokenfusion --output-file $(LOCK) pyproject.toml 2>&1 \
		| { grep -vE "is ignored: it is neither|may be rejected by pip install" || true; }
	@# pip-tools warns that it left tokenfusion itself out; that is what is wanted
	@sed -i -e '/^# WARNING: The following packages were not pinned/,$$d' \
		-e '1i # For Linux x86-64 and CPython 3.11: continuous integration and make. Elsewhere the bounds in pyproject.toml hold.' $(LOCK)

clean:  ## remove caches, builds and the environments of earlier locks (never runs/)
	@rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .venv-lock
	@find $(wildcard $(SOURCES)) -name __pycache__ -type d -prune -exec rm -rf {} +
	@for old in .venv-*; do if [[ -e $$old/.locked && $$old != $(VENV) ]]; then rm -rf "$$old"; fi; done

python-version:
	@[[ -n "$(PYTHON)" ]] && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "tokenfusion needs Python 3.11 or newer; found: $$($(or $(PYTHON),python3) --version 2>&1 | tail -1)." \
			"Install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }

# Debian's python has no ensurepip without python3-venv: then its own pip puts one into the environment.
define make_venv
	rm -rf $(1); \
	$(PYTHON) -m venv $(1) >/dev/null 2>&1 \
		|| { $(PYTHON) -m venv --clear --without-pip $(1) && $(PYTHON) -m pip --python $(1)/bin/python install -qq pip; }
endef

# A broken-off installation leaves no .locked, and the next call starts afresh.
$(VENV)/.locked: | python-version
	@echo "[1/3] environment $(VENV) with $$($(PYTHON) --version)"
	@$(call make_venv,$(VENV))
	@total=$$(grep -c '^[A-Za-z0-9].*==' $(LOCK)); \
	echo "[2/3] installing $$total locked packages (about 2 minutes, 6 GB)"; \
	$(BIN)/python -m pip install --require-hashes -r $(LOCK) 2>&1 | tee $(VENV)/install.log | awk -v total=$$total ' \
		/^(Collecting|Processing) / && ++n % 20 == 0 {print "      " n " of " total " fetched"; fflush()} \
		/^Installing collected/ {print "      unpacking"; fflush()}' \
		|| { tail -20 $(VENV)/install.log >&2; echo "the installation failed; the whole log: $(VENV)/install.log" >&2; exit 1; }
	@touch $@

$(VENV)/.ready: $(VENV)/.locked pyproject.toml
	@echo "[3/3] tokenfusion itself"
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

.venv-lock/bin/pip-compile: | python-version
	@$(call make_venv,.venv-lock)
	@.venv-lock/bin/python -m pip install -qq 'pip-tools>=7.6'
