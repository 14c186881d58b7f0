# Every target works on a machine with nothing but Python >= 3.10, git and make: it builds .venv first.

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
BUILD   := build
BIN     := $(VENV)/bin

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

demo: $(VENV)/.installed-plot  ## show the whole story on handwritten digits, in under a minute
	@mkdir -p $(BUILD)
	$(BIN)/normswap demo --output $(BUILD)/demo.png --force

test: $(VENV)/.installed-dev  ## run the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

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

bench: $(VENV)/.installed-dev  ## run every script in benchmarks/; DATA=FOLDER for those that need images
	@set -e; for script in $(sort $(wildcard benchmarks/[a-z]*.py)); do \
		echo "== $$script"; \
		if ! grep -q '"--data"' $$script; then $(BIN)/python $$script; \
		elif [ -n "$(DATA)" ]; then $(BIN)/python $$script --data "$(DATA)"; \
		else echo "left out: it needs DATA=FOLDER"; fi; done

clean:  ## remove what the targets made, except the environment
	rm -rf $(BUILD) dist .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
