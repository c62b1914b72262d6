# Every target sets up what it needs, from nothing; 'make help' lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
PORT ?= 3000
# In CI the branch coverage is printed too. A file's tests stay in one worker, so that its fixtures are made once; files go in
# the order of conftest.py, the longest first, and not by their number of tests. A worker that dies is not replaced: xdist
# would run the test that killed it again and again. One worker more than there are cores: the pages mostly wait.
WORKERS ?= $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2) + 1 )))
PYTEST_ARGS ?= -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0 $(if $(CI),--cov --cov-report=term --durations=25)

VENV := .venv
STAMP := $(VENV)/.installed
DEMO := $(VENV)/.installed-demo
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar off
# On disk as measured on Linux; what is downloaded is an estimate.
CPU_SIZES := 0.5 GB to download, 1.8 GB on disk,
CUDA_SIZES := 2.5 GB and 4.6 GB
# Dagster's own, about its own command: the one it names comes with another package.
QUIET := ignore:Function `dev_command` is superseded

# A virtual environment does not survive a move: the stamp holds the folder it was made for.
ifneq ($(shell cat $(DEMO) 2>/dev/null),$(CURDIR))
.PHONY: $(DEMO)
endif
# The demo needs no tests' tools; where they are installed, so is all that it needs.
ifeq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
RUNNABLE := $(STAMP)
else
.PHONY: $(STAMP)
RUNNABLE := $(DEMO)
endif

.PHONY: help demo test soak ui lint types check docs screenshots clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(RUNNABLE) ## Make videos, process them through Dagster, search them by an image
	@$(BIN)/extraction demo

# Where Python is told to keep nothing that it compiled, each of the suite's many processes would compile all of it.
test: $(STAMP) ## Run the whole suite; narrow it with PYTEST_ARGS="-k words"
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest $(PYTEST_ARGS)

soak: $(STAMP) ## Run what 'make test' leaves out: real daemons under fire, about half an hour
	@EXTRACTION_TEST_PROFILE=full $(BIN)/python -m pytest -m soak -s -o timeout=2400 -o faulthandler_timeout=2700

ui: $(RUNNABLE) ## Open Dagster's UI and daemon at PORT (3000), for this machine only; on the demo's data if there is no other
	@$(BIN)/extraction status >/dev/null 2>&1 || $(BIN)/extraction demo || $(BIN)/extraction status
	@$(BIN)/extraction init
	@echo "Dagster's UI: http://127.0.0.1:$(PORT) (Ctrl+C ends it)"
	@DAGSTER_HOME="$(CURDIR)" PYTHONWARNINGS='$(QUIET)' exec $(BIN)/dagster dev -w workspace.yaml --host 127.0.0.1 --port $(PORT)

lint: $(STAMP) ## Check style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(STAMP) ## Check types
	@$(BIN)/mypy

check: lint types ## Check style, format and types

docs: $(STAMP) ## Write the pages that are generated from the code
	@$(BIN)/python docs/write_settings.py

screenshots: $(STAMP) ## Take the pictures in docs/screenshots anew, in headless Chromium, from the demo's data
	@$(BIN)/python docs/take_screenshots.py

clean: ## Remove the virtual environment, caches and builds; data (.extraction) stays
	@rm -rf $(VENV) build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Removed .venv, caches and builds. Data, if any, is still in .extraction."

# The stamps are written last: an interrupted installation is taken up again by the next call. torch comes first, by its
# version alone: by hashes, pip takes the CUDA build of an index, 3 GB of it, before a CPU build that lies on the machine.
define environment
	@if ! version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))' 2>/dev/null); then \
	  echo "This project needs Python 3.11 or newer, and $(PYTHON) is $${version:-not there}." >&2; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; \
	  exit 1; \
	fi
	@if [ "$$({ cat $(STAMP) $(DEMO) 2>/dev/null || true; } | grep -m 1 . || echo '$(CURDIR)')" != '$(CURDIR)' ] \
	  || ! $(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "Creating .venv (first time: about two minutes)"; \
	  $(PYTHON) -m venv --clear $(VENV); \
	fi
	@rm -f $@
endef

INPUTS := pyproject.toml setup.cfg constraints.txt requirements.txt

$(DEMO): $(INPUTS)
	$(environment)
	@echo "Installing what the demo needs, the versions of requirements.txt, each file by its hash."
	@echo "About $(CPU_SIZES) with torch's CPU build; on Linux, $(CUDA_SIZES) more with the build for CUDA."
	@if command -v uv >/dev/null; then \
	  echo "uv takes the build that fits this machine."; \
	  uv pip install --quiet --python $(BIN)/python --torch-backend=auto --no-deps -c constraints.txt torch \
	    || { echo "uv could not (see above): pip goes on." >&2; $(PIP_INSTALL) --no-deps -c constraints.txt torch; }; \
	else \
	  echo "There is no uv, so pip takes the build of its index: README.md says how to have the CPU build."; \
	  $(PIP_INSTALL) --no-deps -c constraints.txt torch; \
	fi
	@sed '/^# For tests/,$$d' requirements.txt > $(VENV)/requirements.txt
	@$(PIP_INSTALL) --require-hashes --no-deps -r $(VENV)/requirements.txt
	@$(PIP_INSTALL) -c constraints.txt --no-build-isolation -e .
	@echo '$(CURDIR)' > $@

$(STAMP): $(INPUTS)
	$(environment)
	@echo "Installing the versions of requirements.txt, each file by its hash"
	@$(PIP_INSTALL) --no-deps -c constraints.txt torch
	@$(PIP_INSTALL) --require-hashes --no-deps -r requirements.txt
	@$(PIP_INSTALL) -c constraints.txt --no-build-isolation -e '.[dev,transformers]'
	@echo '$(CURDIR)' > $@
