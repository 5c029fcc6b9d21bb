"""What each lowering takes, and what it leaves to the portable kernels: a row of a table for each condition."""

from typing import Any

import pytest
import torch

import moe_ops as mo
from moe_ops import Quant, WeightLayout
from moe_ops.backends import npu, npu_experts, npu_mc2
from moe_ops.experts import run_experts

from .documented_chip import A3, A5, on_chip

A2 = 220
BF16, F16, F32, INT8, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("scoring", "num_experts", "num_groups", "takes"),
    [
        ("softmax", 16, 1, True),
        ("sigmoid", 16, 4, True),
        ("sqrtsoftplus", 16, 1, False),
        ("softmax", 9, 3, True),
        ("softmax", 6, 3, False),  # groups of two
        ("softmax", 2048, 1, True),
        ("softmax", 2049, 1, False),
        ("sigmoid", 32 * 33, 32, True),  # 64 experts a group when they are aligned: 2048
        ("sigmoid", 33 * 33, 33, False),
    ],
)
def test_gating(scoring: str, num_experts: int, num_groups: int, takes: bool) -> None:
    assert npu.gating_can_route(scoring, num_experts, num_groups) == takes


@pytest.mark.parametrize(
    ("chip", "quant", "dtype", "width", "takes"),
    [
        (A2, Quant.W8A8, BF16, 64, True),
        (A3, Quant.W8A8, F16, 64, True),
        (A3, Quant.W4A8, BF16, 64, True),
        (A3, Quant.W8A8, F32, 64, False),
        (A3, Quant.MXFP8, BF16, 64, False),
        (A3, Quant.MXFP4, BF16, 64, False),
        (A5, Quant.MXFP8, BF16, 64, True),
        (A5, Quant.MXFP4, F16, 64, True),
        (A5, Quant.NONE, BF16, 64, False),
        (A5, Quant.MXFP8, F32, 32, True),
        (A5, Quant.MXFP8, F32, 31, False),
        (A5, Quant.MXFP8, BF16, 31, True),
        (A5, Quant.MXFP4, F32, 30, False),
        (A5, Quant.MXFP4, BF16, 30, True),
        (A5, Quant.MXFP4, BF16, 63, False),
        (A5, Quant.MXFP4, F32, 63, False),
    ],
)
def test_quantisation(chip: int, quant: Quant, dtype: torch.dtype, width: int, takes: bool) -> None:
    with on_chip(chip):
        assert npu.can_quantize(torch.empty(2, width, dtype=dtype), quant) == takes


def make_experts(dtype: torch.dtype, **changes: Any) -> mo.ExpertWeights:
    """Two experts with the shapes of H 128 and I 64, but for what changes."""
    experts = mo.ExpertWeights(torch.zeros(2, 128, 128).to(dtype), torch.zeros(2, 128, 64).to(dtype))
    return experts._replace(**changes)


PRODUCTS: list[tuple[int, Quant, torch.dtype, torch.dtype, dict[str, Any], bool]] = [
    (A2, Quant.W8A8, INT8, BF16, {}, True),
    (A3, Quant.W8A8, INT8, F16, {}, True),
    (A3, Quant.W8A8, INT8, F32, {}, False),
    (A3, Quant.W8A8, E4M3, BF16, {}, False),
    (A3, Quant.W4A8, INT8, BF16, {}, False),
    (A3, Quant.NONE, BF16, BF16, {}, False),
    (A3, Quant.W8A8, INT8, BF16, {"activation": "gelu"}, False),
    (A3, Quant.W8A8, INT8, BF16, {"w13_bias": torch.zeros(2, 128)}, False),
    (A3, Quant.W8A8, INT8, BF16, {"w2_bias": torch.zeros(2, 128)}, False),
    (A3, Quant.W8A8, INT8, BF16, {"w2": torch.zeros(2, 128, 64).to(E4M3)}, False),
    (A3, Quant.MXFP8, E4M3, BF16, {}, False),
    (A5, Quant.MXFP8, E4M3, BF16, {}, True),
    (A5, Quant.MXFP8, INT8, BF16, {}, False),
    (A5, Quant.MXFP8, E4M3, BF16, {"w2": torch.zeros(2, 128, 64, dtype=INT8)}, False),
    (A5, Quant.MXFP8, E4M3, BF16, {"w13": torch.zeros(2, 128, 96).to(E4M3)}, False),  # an odd number of blocks
    (A5, Quant.MXFP8, E4M3, BF16, {"w2": torch.zeros(2, 128, 96).to(E4M3)}, False),
]


@pytest.mark.parametrize(("chip", "quant", "weights", "dtype", "changes", "takes"), PRODUCTS)
def test_quantised_products(
    chip: int, quant: Quant, weights: torch.dtype, dtype: torch.dtype, changes: dict[str, Any], takes: bool
) -> None:
    with on_chip(chip):
        assert npu_experts.can_run_quantized_experts(make_experts(weights, **changes), quant, dtype) == takes


@pytest.mark.parametrize(
    ("chip", "quant", "dtype", "width", "common", "top_k", "takes"),
    [
        (A3, Quant.NONE, BF16, 1024, 512, 16, True),
        (A3, Quant.W8A8, F16, 8192, 1, 1, True),
        (A3, Quant.W4A8, BF16, 1024, 8, 2, True),
        (A5, Quant.MXFP8, BF16, 64, 8, 2, True),
        (A2, Quant.NONE, BF16, 1024, 8, 2, False),  # its mask is one flag a row, for all choices
        (A3, Quant.MXFP8, BF16, 1024, 8, 2, False),
        (A5, Quant.MXFP4, BF16, 1024, 8, 2, False),
        (A3, Quant.NONE, F32, 1024, 8, 2, False),
        (A3, Quant.NONE, BF16, 1024, 0, 2, False),
        (A3, Quant.NONE, BF16, 1024, 513, 2, False),
        (A5, Quant.NONE, BF16, 1024, 513, 2, False),
        (A3, Quant.NONE, BF16, 1024, 8, 17, False),
        (A5, Quant.NONE, BF16, 1024, 8, 17, False),
        (A3, Quant.NONE, BF16, 1023, 8, 2, False),
        (A3, Quant.NONE, BF16, 8193, 8, 2, False),
        (A5, Quant.NONE, BF16, 1023, 8, 2, True),
        (A5, Quant.NONE, BF16, 8193, 8, 2, True),
    ],
)
def test_exchange(
    chip: int, quant: Quant, dtype: torch.dtype, width: int, common: int, top_k: int, takes: bool
) -> None:
    with on_chip(chip):
        assert npu_mc2.can_exchange(torch.empty(1, width, dtype=dtype), common, top_k, quant) == takes


def test_the_exchange_of_another_device_is_the_portable_one() -> None:
    assert not npu_mc2.can_exchange(torch.empty(1, 1024, dtype=BF16), 8, 2, Quant.NONE)


@pytest.mark.parametrize(
    ("chip", "weights", "changes", "layout"),
    [
        (A3, BF16, {}, WeightLayout.NPU),
        (A5, F16, {}, WeightLayout.NPU),
        (A3, F32, {}, WeightLayout.PLAIN),
        (A3, BF16, {"w2": torch.zeros(2, 128, 64, dtype=F16)}, WeightLayout.PLAIN),
        (A3, INT8, {}, WeightLayout.NPU),
        (A5, INT8, {}, WeightLayout.PLAIN),
        (A3, INT8, {"activation": "gelu"}, WeightLayout.PLAIN),
        (A5, E4M3, {}, WeightLayout.PLAIN),
    ],
)
def test_packing(chip: int, weights: torch.dtype, changes: dict[str, Any], layout: WeightLayout) -> None:
    with on_chip(chip):
        assert mo.prepack_experts(make_experts(weights, **changes)).layout is layout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w2": torch.zeros(3, 128, 64, dtype=INT8)}, "w13, w2 and counts must be of as many experts"),
        ({"w13": torch.zeros(2, 127, 128, dtype=INT8)}, "w13 must have a gate and an up row"),
        ({"w13": torch.zeros(128, 128, dtype=INT8)}, "w13 must"),
        ({}, "w13_scale and w2_scale must be given"),
    ],
)
def test_quantised_experts_have_to_fit(changes: dict[str, Any], message: str) -> None:
    rows, scale, counts = torch.zeros(3, 128, dtype=INT8), torch.ones(3), torch.tensor([1, 2])
    with on_chip(A3), pytest.raises(ValueError, match=message):
        run_experts(rows, counts, make_experts(INT8, **changes), scale=scale, quant=Quant.W8A8, dtype=BF16)
