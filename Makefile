# A fresh machine needs two commands: `make demo` and `make test`. Both set up .venv by themselves; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# Test workers and torch threads for each: two workers with all the cores apiece would only fight over them.
TEST_WORKERS ?= 2
TEST_THREADS ?= 1
PYTEST_ARGS ?=
DEMO_ARGS ?=

PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --no-input --constraint $(CONSTRAINTS)
PYTEST := OMP_NUM_THREADS=$(TEST_THREADS) $(PY) -m pytest -n $(TEST_WORKERS) --dist worksteal

# What is installed, one stamp each, inside the environment so that they vanish with it.
# `demo` and `dev` stand side by side: setting up one never invalidates the other.
VENV_STAMP := $(VENV)/.stamp-venv
TORCH_STAMP := $(VENV)/.stamp-torch
DEMO_STAMP := $(VENV)/.stamp-demo
DEV_STAMP := $(VENV)/.stamp-dev
DOCS_STAMP := $(VENV)/.stamp-docs
SCATTER_STAMP := $(VENV)/.stamp-scatter

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-slow test-wheel test-zoo check docs build clean demo-env check-env docs-env test-env

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(DEMO_STAMP) ## train a small model with and without nowcasting (DEMO_ARGS: options for scripts/demo.py)
	@$(PY) scripts/demo.py $(DEMO_ARGS)

test: test-env ## all tests but the slow ones (PYTEST_ARGS: more options for pytest)
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: test-env ## the slow tests
	@$(PYTEST) -m slow $(PYTEST_ARGS)

test-wheel: test-env ## build wheel and sdist, install them in a fresh environment, and try the commands there
	@OMP_NUM_THREADS=$(TEST_THREADS) $(PY) -m pytest -n 0 -m slow tests/docs/test_fresh_environment.py $(PYTEST_ARGS)

test-zoo: test-env ## wire and prove every architecture of transformers, timm and peft that is here (an hour or two)
	@$(PY) -c 'import timm' 2>/dev/null || $(INSTALL) --no-deps timm || true
	@OMP_NUM_THREADS=$(TEST_THREADS) $(PY) scripts/check_zoo.py

check: check-env ## formatting, lint, types and imports in circles
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo

docs: docs-env ## the documentation site into site/ (look at it: .venv/bin/python -m mkdocs serve)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@echo "site/index.html"

build: $(VENV_STAMP) ## build wheel and sdist into dist/
	@rm -rf build
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist .
	@$(INSTALL) setuptools wheel
	$(PY) -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")' > /dev/null
	@rm -rf build *.egg-info

clean: ## remove build outputs and caches; the environment stays (rm -r .venv starts that afresh)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find nino callbacks pretrained scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

# What demo, check and test need, without running them.
demo-env: $(DEMO_STAMP)
check-env: $(DEV_STAMP)
docs-env: $(DOCS_STAMP)
test-env: $(DEV_STAMP) $(SCATTER_STAMP)

$(VENV_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Nino needs Python 3.10 or newer; choose one with: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "creating $(VENV) ..."; $(PYTHON) -m venv $(VENV); }
	@touch $@

# First of all torch alone: anything else that asks for it then finds the pinned one and pulls no other.
$(TORCH_STAMP): $(VENV_STAMP) $(CONSTRAINTS)
	@echo "installing torch into $(VENV) ..."
	@$(INSTALL) torch setuptools wheel
	@touch $@

$(DEMO_STAMP): $(TORCH_STAMP) pyproject.toml
	@echo "installing nino for the demo into $(VENV) ..."
	@$(INSTALL) --editable '.[scripts]'
	@touch $@

$(DEV_STAMP): $(TORCH_STAMP) pyproject.toml
	@echo "installing nino for its tests into $(VENV) ..."
	@$(INSTALL) --editable '.[dev]'
	@touch $@

$(DOCS_STAMP): $(TORCH_STAMP) pyproject.toml
	@echo "installing what builds the documentation into $(VENV) ..."
	@$(INSTALL) --editable '.[docs]'
	@touch $@

# Last and without build isolation: torch_scatter compiles itself against the torch that is installed. pip keeps the
# wheel it builds, which is useless once torch changes; the import finds that out.
$(SCATTER_STAMP): $(TORCH_STAMP) | $(DEV_STAMP)
	@echo "installing torch_scatter into $(VENV) (6-7 minutes of compiling, the first time) ..."
	@$(INSTALL) --no-build-isolation torch_scatter || \
		{ echo "error: torch_scatter could not be built, and the tests need it; is a C++ compiler installed?" >&2; exit 1; }
	@$(PY) -c 'import torch_scatter' 2>/dev/null || \
		$(INSTALL) --no-build-isolation --no-deps --force-reinstall --no-cache-dir torch_scatter
	@touch $@
