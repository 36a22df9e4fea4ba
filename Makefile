PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test check proto proto-check bench bench-gpu setup clean
.DEFAULT_GOAL := run

setup: $(VENV)/.installed

# Reinstalled only when the dependencies or compiled sources change; the package itself is linked, not copied.
$(VENV)/.installed: pyproject.toml setup.py $(wildcard disagg/routing/*.[ch] disagg/transfer/*.c)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -m disagg.model.native.library
	touch $@

run: setup
	$(BIN)/disagg serve

test: setup
	$(BIN)/pytest

check: setup proto-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/unit/test_layers.py

proto: setup
	$(BIN)/python proto/generate.py

proto-check: setup
	$(BIN)/python proto/generate.py --check

bench: setup
	$(BIN)/python benchmarks/kv_transfer.py

# Uses the python that has a GPU's torch and triton, not the virtual environment.
bench-gpu:
	$(PYTHON) benchmarks/gpu.py --json gpu.json --plot gpu.png

clean:
	rm -rf $(VENV) build dist *.egg-info
