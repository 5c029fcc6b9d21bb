"""What MC2 is given: its pages want ids of experts, different ones in each row. The exchange itself: test_documented_stage."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from moe_ops import Group, Quant
from moe_ops.backends import npu_mc2

from .documented_chip import A3, on_chip

SEEDS = st.integers(0, 2**32)


@given(
    num_rows=st.integers(0, 9),
    num_experts=st.integers(1, 40),
    top_k=st.integers(1, 16),
    kept=st.floats(0, 1),
    seed=SEEDS,
)
@settings(max_examples=150)
def test_mc2_gets_different_experts_in_each_row(
    num_rows: int, num_experts: int, top_k: int, kept: float, seed: int
) -> None:
    """Where there is a choice, that; elsewhere any other."""
    top_k = min(top_k, num_experts)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_rows, num_experts, generator=generator).argsort(dim=1)[:, :top_k].to(torch.int32)
    is_choice = torch.rand(ids.shape, generator=generator) < kept
    free = npu_mc2._free_experts(torch.where(is_choice, ids, -1), is_choice, num_experts)
    assert free.dtype is torch.int32
    filled = torch.where(is_choice, ids, free)
    assert all(set(row) <= set(range(num_experts)) and len(set(row)) == top_k for row in filled.tolist())


@given(num_rows=st.integers(0, 6), num_experts=st.integers(1, 9), top_k=st.integers(1, 8), seed=SEEDS)
@settings(max_examples=100)
def test_mc2_gets_an_expert_that_stands_in_a_row_twice_once(
    num_rows: int, num_experts: int, top_k: int, seed: int
) -> None:
    """With the sum of its weights; and others in the places that are left, where there are enough."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, num_experts, (num_rows, top_k), generator=generator, dtype=torch.int32)
    weights = torch.rand(ids.shape, generator=generator).masked_fill(ids < 0, 0.0)
    merged, summed = npu_mc2._merge_repeated(ids, weights)
    assert (merged.dtype, merged.shape, summed.dtype, summed.shape) == (
        torch.int32,
        ids.shape,
        torch.float32,
        ids.shape,
    )
    for row, found, of_row, sums in zip(ids.tolist(), merged.tolist(), weights.tolist(), summed.tolist(), strict=True):
        once = [(expert, total) for expert, total in zip(found, sums, strict=True) if expert >= 0]
        assert sorted(expert for expert, _ in once) == sorted(set(row) - {-1})
        for expert, total in once:
            expected = sum(weight for choice, weight in zip(row, of_row, strict=True) if choice == expert)
            assert total == pytest.approx(expected, rel=1e-6)
    if top_k <= num_experts:
        filled = torch.where(merged >= 0, merged, npu_mc2._free_experts(merged, merged >= 0, num_experts))
        assert all(set(row) <= set(range(num_experts)) and len(set(row)) == top_k for row in filled.tolist())


@pytest.mark.parametrize(
    ("rows", "top_k", "message"),
    [
        (0, 2, "rows of a rank must be at least"),
        (513, 2, "rows of a rank must be at most"),
        (3, 17, "top_k must be at most that of MC2 = 16"),
        (3, 9, "top_k must be at most that of MC2 = 8"),  # there are not so many experts
    ],
)
def test_what_mc2_does_not_take_is_an_error(fake_group4: str, rows: int, top_k: int, message: str) -> None:
    num_local_experts = 2 if top_k < 16 else 8
    x, ids = torch.zeros(rows, 1024, dtype=torch.bfloat16), torch.zeros(rows, top_k, dtype=torch.int32)
    with on_chip(A3), pytest.raises(ValueError, match=message):
        npu_mc2.dispatch(
            x,
            ids,
            torch.zeros(rows, top_k),
            num_local_experts=num_local_experts,
            ep=Group(fake_group4, 4, 1),
            quant=Quant.NONE,
            has_gaps=True,
            may_repeat=True,
        )
