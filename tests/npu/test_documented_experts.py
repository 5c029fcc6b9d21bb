"""The lowerings of the experts over kernels that do what the vendor's pages say, beside the portable ones."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import moe_ops as mo
from moe_ops import Quant
from moe_ops.experts import run_experts
from moe_ops.types import WeightLayout

from .documented import FLOATS, HALVES, calls
from .documented_chip import A3, A5, lowered, on_chip, portable

SEEDS = st.integers(0, 2**32)


@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=1, max_size=4),
    spare=st.sampled_from([0, 1, 3]),
    sizes=st.sampled_from([(8, 8), (5, 12), (16, 3)]),
    has_bias=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    is_widened=st.booleans(),
    seed=SEEDS,
)
@settings(max_examples=150)
def test_grouped_linear(
    counts: list[int],
    spare: int,
    sizes: tuple[int, int],
    has_bias: bool,
    dtype: torch.dtype,
    is_widened: bool,
    seed: int,
) -> None:
    """Rows of float32 may have weights of float16: then the rows are cast, as are the results back."""
    generator = torch.Generator().manual_seed(seed)
    (num_inputs, num_outputs), used = sizes, sum(counts)
    rows = torch.full((used + spare, num_inputs), torch.nan)
    rows[:used] = torch.randn(used, num_inputs, generator=generator)
    weight = torch.randn(len(counts), num_outputs, num_inputs, generator=generator).to(dtype)
    rows = rows.to(torch.float32 if is_widened and dtype is torch.float16 else dtype)
    bias = torch.randn(len(counts), num_outputs, generator=generator).to(rows.dtype) if has_bias else None
    arguments = rows, torch.tensor(counts), weight, bias
    found = lowered("grouped_linear", *arguments, op="npu_grouped_matmul")
    expected = portable("grouped_linear", *arguments)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    tolerance = {} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found[:used], expected[:used], **tolerance)


EXPERTS = {
    "w8a8": (A3, Quant.W8A8, False, ["npu_grouped_matmul", "npu_dynamic_quant", "npu_swiglu"]),
    "w8a8-packed": (A3, Quant.W8A8, True, ["npu_grouped_matmul", "npu_grouped_matmul_swiglu_quant_v2"]),
    "w8a8-a5": (A5, Quant.W8A8, False, ["npu_grouped_matmul", "npu_dynamic_quant", "npu_swiglu"]),
    "mxfp8": (A5, Quant.MXFP8, False, ["npu_grouped_matmul", "npu_grouped_matmul_swiglu_quant_v2"]),
    "none": (A3, Quant.NONE, False, ["npu_grouped_matmul", "npu_swiglu"]),
    "none-packed": (A3, Quant.NONE, True, ["npu_grouped_matmul", "npu_swiglu"]),
}


@pytest.mark.parametrize(("chip", "quant", "is_packed", "ops"), EXPERTS.values(), ids=EXPERTS)
@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 5]), min_size=1, max_size=4),
    spare=st.sampled_from([0, 3]),
    sizes=st.sampled_from([(64, 64), (192, 128)]),
    comes_quantized=st.booleans(),
    dtype=st.sampled_from(HALVES),
    seed=SEEDS,
)
@settings(max_examples=25)
def test_experts(
    chip: int,
    quant: Quant,
    is_packed: bool,
    ops: list[str],
    counts: list[int],
    spare: int,
    sizes: tuple[int, int],
    comes_quantized: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Beside the portable products of the values that the weights stand for. What the rows past the groups hold matters not."""
    generator = torch.Generator().manual_seed(seed)
    (hidden, inner), used = sizes, sum(counts)
    rows = torch.randn(used + spare, hidden, generator=generator).to(dtype)
    w13 = (torch.randn(len(counts), 2 * inner, hidden, generator=generator) * hidden**-0.5).to(dtype)
    w2 = (torch.randn(len(counts), hidden, inner, generator=generator) * inner**-0.5).to(dtype)
    experts, exact, scale, payload = mo.ExpertWeights(w13, w2), mo.ExpertWeights(w13, w2), None, rows.clone()
    payload[used:] = torch.nan
    if quant is not Quant.NONE:
        w13, w13_scale = mo.quantize_weights(w13, quant=quant)
        w2, w2_scale = mo.quantize_weights(w2, quant=quant)
        experts = mo.ExpertWeights(w13, w2, w13_scale=w13_scale, w2_scale=w2_scale)
        exact = mo.ExpertWeights(
            mo.dequantize_weights(w13, w13_scale, num_inputs=hidden),
            mo.dequantize_weights(w2, w2_scale, num_inputs=inner),
        )
        if comes_quantized:
            payload, scale = mo.quantize_activations(rows, quant=quant)
            payload.view(torch.uint8)[used:], scale[used:].view(torch.uint8)[:] = 255, 255
    arguments = payload, torch.tensor(counts)
    expected = run_experts(rows, torch.tensor(counts), exact, quant=quant, dtype=dtype)[:used]
    with on_chip(chip):
        if is_packed:
            experts = mo.prepack_experts(experts)
            assert experts.layout is WeightLayout.NPU
        found = run_experts(*arguments, experts, scale=scale, quant=quant, dtype=dtype)[:used]
        assert all(calls[op] for op in ops), f"{ops} were to be called, got {calls}"
    assert found.dtype is dtype
    largest = float(expected.abs().max()) if used else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-2 * largest)
