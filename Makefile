PYTHON ?= python3.11
BIN := .venv/bin
BENCH := .venv-bench/bin
NPU := .venv-npu/bin
# Tests that depend on the chip; the others run once.
OF_THE_CHIP := $(patsubst %,tests/npu/test_%.py,stand_in decisions lowerings ge_graphs capture)

.PHONY: demo test lint types bench bench-stage clean

# An environment is complete when its file exists; a changed requirement makes it anew. --no-deps, because the files are complete.
define make_environment
rm -rf $(@D)
$(PYTHON) -m venv $(@D)
$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<
$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
touch $@
endef

.venv/complete: requirements/dev.txt pyproject.toml
	$(make_environment)

# Of its own: the peers pin other versions of what they need.
.venv-bench/complete: requirements/bench.txt pyproject.toml
	$(make_environment)

# Of its own: torch_npu changes torch where it is installed.
.venv-npu/complete: requirements/npu.txt pyproject.toml
	$(make_environment)

demo: .venv/complete
	$(BIN)/moe-ops demo

# Then again, with vLLM's own kernel, what a stand-in for it has passed. Then over torch_npu and a stand-in for CANN, which is
# one chip in one process: Atlas A3's, and A5.
test: .venv/complete .venv-bench/complete .venv-npu/complete
	$(BIN)/python -m pytest
	$(BENCH)/python -m pytest tests/test_packed_experts.py
	CANN_STAND_IN_SOC=Ascend910_9391 $(NPU)/python -m pytest tests/npu
	CANN_STAND_IN_SOC=Ascend950PR_9589 $(NPU)/python -m pytest $(OF_THE_CHIP)

lint: .venv/complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/complete
	$(BIN)/mypy

bench: .venv/complete
	$(BIN)/python -m benchmarks.prepare_finalize

bench-stage: .venv-bench/complete
	$(BENCH)/python -m benchmarks.stage --markdown benchmarks/stage.md --plot stage.png

clean:
	rm -rf .venv .venv-bench .venv-npu build *.egg-info
