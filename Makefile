# Every target works on a machine with nothing but Python >= 3.10, git and make: it builds .venv first.

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
BUILD   := build
BIN     := $(VENV)/bin

DEMO_OUT  := $(BUILD)/resnet50-gn.safetensors
# What `make demo` verifies. Random weights exist nowhere but in the file, so it is compared with its own original.
DEMO_PAIR := $(DEMO_OUT)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint format types docs bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# One stamp for each set of extras: installing runs once, and again when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.$(if $(filter base,$*),,[$*])'
	@touch $@

demo: $(VENV)/.installed-base  ## convert a ResNet-50 to GroupNorm and verify it
	@mkdir -p $(BUILD)
	$(BIN)/normswap convert resnet50 --weights none --to gn --groups 32 -o $(DEMO_OUT) --force
	$(BIN)/normswap verify $(DEMO_PAIR)

test: $(VENV)/.installed-dev  ## run the quick tests
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-all: $(VENV)/.installed-dev  ## run every test
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/.installed-dev  ## check style and formatting
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(VENV)/.installed-dev  ## mend what `make lint` can mend by itself
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

types: $(VENV)/.installed-dev  ## check the types
	$(BIN)/python -m mypy

docs: $(VENV)/.installed-docs  ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.installed-dev  ## run every script in benchmarks/
	@set -e; for script in $(sort $(wildcard benchmarks/[a-z]*.py)); do echo "== $$script"; $(BIN)/python $$script; done

clean:  ## remove what the targets made, except the environment
	rm -rf $(BUILD) dist .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
