PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint types bench clean

# The environment is complete when this file exists; a changed requirement makes it anew.
.venv/complete: requirements/dev.txt pyproject.toml
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: .venv/complete
	$(BIN)/moe-ops demo

test: .venv/complete
	$(BIN)/python -m pytest

lint: .venv/complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/complete
	$(BIN)/mypy

bench: .venv/complete
	$(BIN)/python -m benchmarks.prepare_finalize

clean:
	rm -rf .venv build *.egg-info
