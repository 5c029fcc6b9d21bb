PYTHON ?= python3.11
BIN := .venv/bin
BENCH := .venv-bench/bin

.PHONY: demo test lint types bench bench-stage clean

# The environment is complete when this file exists; a changed requirement makes it anew.
.venv/complete: requirements/dev.txt pyproject.toml
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: .venv/complete
	$(BIN)/moe-ops demo

# Then again, with vLLM's own kernel, what a stand-in for it has passed.
test: .venv/complete .venv-bench/complete
	$(BIN)/python -m pytest
	$(BENCH)/python -m pytest tests/test_packed_experts.py

lint: .venv/complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/complete
	$(BIN)/mypy

bench: .venv/complete
	$(BIN)/python -m benchmarks.prepare_finalize

# Of its own: the peers pin other versions of what they need. --no-deps, because the file is complete.
.venv-bench/complete: requirements/bench.txt pyproject.toml
	rm -rf .venv-bench
	$(PYTHON) -m venv .venv-bench
	$(BENCH)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/bench.txt
	$(BENCH)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

bench-stage: .venv-bench/complete
	$(BENCH)/python -m benchmarks.stage --markdown benchmarks/stage.md --plot stage.png

clean:
	rm -rf .venv .venv-bench build *.egg-info
