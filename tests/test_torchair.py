"""What stands in for ops that torchair has no converter for, against those ops. The graphs themselves: tests/npu."""

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis import given

from moe_ops.integrations.torchair import decompositions

ATEN = torch.ops.aten
DTYPES = st.sampled_from([torch.int32, torch.int64, torch.float32, torch.bool])
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3)
PLACES = st.integers(0, 8)


def draw_values(shape: list[int], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Few values, so that some are equal, and as many below 0 as above it."""
    values = torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed))
    return values > 0 if dtype is torch.bool else values.to(dtype)


def assert_same(op: Any, x: torch.Tensor, *args: Any) -> None:
    found, expected = decompositions()[op](x, *args), op(x, *args)
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected)


@given(shape=SHAPES, places=PLACES, mask=st.integers(0, 15), seed=st.integers(0, 999))
def test_bits(shape: list[int], places: int, mask: int, seed: int) -> None:
    for dtype in (torch.int32, torch.int64):
        x = draw_values(shape, seed, dtype) * 37
        assert_same(ATEN.__rshift__.Scalar, x, places)
        assert_same(ATEN.__lshift__.Scalar, x, places)
        assert_same(ATEN.bitwise_and.Scalar, x, mask)
    bytes_ = draw_values(shape, seed, torch.int32).to(torch.uint8)
    assert_same(ATEN.__rshift__.Scalar, bytes_, min(places, 7))
    assert_same(ATEN.bitwise_and.Scalar, bytes_, mask)


@given(shape=SHAPES, data=st.data(), keepdim=st.booleans(), dtype=DTYPES, seed=st.integers(0, 999))
def test_amax(shape: list[int], data: st.DataObject, keepdim: bool, dtype: torch.dtype, seed: int) -> None:
    axes = st.integers(-len(shape), len(shape) - 1)
    dim = data.draw(st.lists(axes, max_size=3, unique_by=lambda axis: axis % len(shape)))
    assert_same(ATEN.amax.default, draw_values(shape, seed, dtype), dim, keepdim)


@given(shape=SHAPES, data=st.data(), descending=st.booleans(), dtype=DTYPES, seed=st.integers(0, 999))
def test_sort(shape: list[int], data: st.DataObject, descending: bool, dtype: torch.dtype, seed: int) -> None:
    """A CPU's topk takes any of equals first, so places are those of the values, each once."""
    x, dim = draw_values(shape, seed, dtype), data.draw(st.integers(-len(shape), len(shape) - 1))
    values, places = decompositions()[ATEN.sort.stable](x, stable=True, dim=dim, descending=descending)
    expected = torch.sort(x, stable=True, dim=dim, descending=descending)
    assert values.dtype is dtype and places.dtype is torch.int64
    assert torch.equal(values, expected.values)
    assert torch.equal(x.gather(dim, places), values)
    assert torch.equal(places.sort(dim=dim).values, expected.indices.sort(dim=dim).values)
