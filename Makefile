PYTHON ?= python3.11
BIN := .venv/bin
BENCH := .venv-bench/bin
NPU := .venv-npu/bin
VLLM := .venv-vllm/bin
# Tests that depend on the chip; the others run once.
OF_THE_CHIP := $(patsubst %,tests/npu/test_%.py,stand_in decisions lowerings ge_graphs capture)

.PHONY: demo demo-vllm test test-fast lint types bench bench-stage bench-vllm clean

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

# Of its own: vLLM is large, and pins other versions of what it needs.
.venv-vllm/complete: requirements/vllm.txt pyproject.toml
	$(make_environment)

# The source of vllm-ascend, apart from vLLM, which would take it for its platform.
.venv-vllm-ascend/complete: requirements/vllm_ascend.txt .venv-vllm/complete
	rm -rf $(@D)
	SOC_VERSION=ascend910_9391 COMPILE_CUSTOM_KERNELS=0 $(VLLM)/pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --target $(@D) -r $<
	touch $@

demo: .venv/complete
	$(BIN)/moe-ops demo

demo-vllm: .venv-vllm/complete
	$(VLLM)/moe-ops demo-vllm

# Then with vLLM: its engine, and its own kernel for what a stand-in for that has passed. Then over torch_npu and a stand-in for
# CANN, which is one chip in one process: Atlas A3's, and A5.
test: .venv/complete .venv-vllm/complete .venv-vllm-ascend/complete .venv-npu/complete
	$(BIN)/python -m pytest
	$(VLLM)/python -m pytest tests/vllm tests/test_packed_experts.py
	CANN_STAND_IN_SOC=Ascend910_9391 $(NPU)/python -m pytest tests/npu
	CANN_STAND_IN_SOC=Ascend950PR_9589 $(NPU)/python -m pytest $(OF_THE_CHIP)

test-fast: .venv/complete
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/complete
	$(BIN)/mypy

bench: .venv/complete
	$(BIN)/python -m benchmarks.prepare_finalize

bench-stage: .venv-bench/complete
	$(BENCH)/python -m benchmarks.stage --markdown benchmarks/stage.md --plot stage.png

bench-vllm: .venv-vllm/complete
	$(VLLM)/python -m benchmarks.vllm --markdown benchmarks/vllm.md

clean:
	rm -rf .venv .venv-bench .venv-npu .venv-vllm .venv-vllm-ascend build *.egg-info
