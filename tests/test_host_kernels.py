"""Ops that have a second kernel for CPUs: it computes what the one for all devices does, to the bit."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.utils._pytree import tree_leaves

from moe_ops import experts
from moe_ops._library import KERNELS, PORTABLE
from moe_ops.backends import npu_kernels
from moe_ops.dispatchers import local

from .op_cases import LEAVES, Sizes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
E, H, N = 4, 8, 16
PRODUCTS = ["grouped_linear", "grouped_outer"]


@st.composite
def ids_of(draw: st.DrawFn) -> torch.Tensor:
    rows, k = draw(st.integers(0, 9)), draw(st.integers(1, 3))
    drawn = draw(st.lists(st.integers(-1, 7), min_size=rows * k, max_size=rows * k))
    return torch.tensor(drawn, dtype=torch.int64).view(rows, k)


def floats(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def used(counts: torch.Tensor) -> int:
    return int(counts.sum())


@given(ids=ids_of(), dtype=st.sampled_from(DTYPES))
def test_permute_and_unpermute(ids: torch.Tensor, dtype: torch.dtype) -> None:
    x = floats(ids.shape[0], H, dtype=dtype)
    *tensors, counts, positions = local._permute([x, ids], ids, 2, E)
    *on_host, host_counts, host_positions = local._permute_on_host([x, ids], ids, 2, E)
    assert torch.equal(counts, host_counts)
    assert torch.equal(positions, host_positions)
    for one, other in zip(tensors, on_host, strict=True):
        assert torch.equal(one[: used(counts)], other[: used(counts)])
        assert not other[used(counts) :].any()
    weights = floats(*ids.shape, dtype=torch.float32)
    for given_weights in (None, weights):
        poisoned = tensors[0].clone()
        poisoned[used(counts) :] = torch.nan
        wanted = local._unpermute(poisoned, given_weights, positions)
        assert torch.equal(local._unpermute_on_host(poisoned, given_weights, positions), wanted)
        assert not wanted.isnan().any()
    rows, other = tensors[0], tensors[0].flip(0)
    wanted = local._weigh_rows(rows, weights, positions)
    assert torch.equal(local._weigh_rows_on_host(rows, weights, positions), wanted)
    wanted = local._spread_rows(x, positions, rows.shape[0] + 1)
    assert torch.equal(local._spread_rows_on_host(x, positions, rows.shape[0] + 1), wanted)
    wanted = local._dot_rows(rows, other, positions)
    assert torch.equal(local._dot_rows_on_host(rows, other, positions), wanted)


@given(
    counts=st.lists(st.integers(0, 5), min_size=E, max_size=E),
    more=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    width=st.sampled_from([H, 5]),
    has_bias=st.booleans(),
)
def test_products(counts: list[int], more: int, dtype: torch.dtype, width: int, has_bias: bool) -> None:
    counts_E = torch.tensor(counts)
    rows, weight = floats(sum(counts) + more, width, dtype=dtype), floats(E, N, width, dtype=dtype)
    rows[sum(counts) :] = torch.nan
    bias = floats(E, N, dtype=dtype) if has_bias else None
    wanted = experts._grouped_linear(rows, counts_E, weight, bias)
    assert torch.equal(experts._grouped_linear_on_host(rows, counts_E, weight, bias), wanted)
    assert not wanted.isnan().any()
    outer = experts._grouped_outer(wanted, rows, counts_E)
    assert torch.equal(experts._grouped_outer_on_host(wanted, rows, counts_E), outer)
    for expert, count in enumerate(counts):
        start = sum(counts[:expert])
        a, b = (x[start : start + count].double() for x in (wanted, rows))
        tolerance = 1e-5 if dtype is torch.float32 else 4e-2
        torch.testing.assert_close(outer[expert].double(), a.T @ b, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("op", ["permute_by_expert", "unpermute", "weigh_rows", "spread_rows", "dot_rows", *PRODUCTS])
def test_a_cpu_takes_the_second(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_ops::{op}", "CPU")


@pytest.mark.parametrize("op", [op for op in LEAVES if npu_kernels.KEY in KERNELS.get(op, {})])
def test_another_device_of_the_key_of_npus_takes_the_portable_kernel(op: str) -> None:
    """The key is that of any device outside of torch."""
    arguments = LEAVES[op](Sizes(5))
    found, expected = KERNELS[op][npu_kernels.KEY](*arguments), KERNELS[op][PORTABLE](*arguments)
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert torch.equal(as_bytes(one), as_bytes(other))


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)
