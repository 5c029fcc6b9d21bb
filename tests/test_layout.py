"""The integer arithmetic, against loops over single tokens, on ints and on symbolic ints."""

import hypothesis.strategies as st
import torch
from hypothesis import given
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fake_impls import layout

COUNTS = st.integers(0, 5000)
SIZES = st.integers(1, 64)


def symbolic(value: int) -> torch.SymInt:
    """A backed symbolic int; like torch's own, no constant below 2."""
    environment = ShapeEnv()
    source = ConstantSource(f"n{value}")
    symbol = environment.create_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    return environment.create_symintnode(symbol, hint=value, source=source)


@given(num_tokens=COUNTS, size=SIZES)
def test_equal_chunks_hold_all_tokens_and_less_than_a_chunk_more(num_tokens: int, size: int) -> None:
    rows, padded = layout.rows_per_rank(num_tokens, size), layout.padded_rows(num_tokens, size)
    assert padded == rows * size
    assert num_tokens <= padded < num_tokens + size


def test_no_tokens_need_no_rows() -> None:
    assert [layout.padded_rows(count, 4) for count in (0, 1, 3, 4, 5)] == [0, 4, 4, 4, 8]


@given(num_tokens=st.integers(2, 5000), size=SIZES)
def test_symbolic_ints_give_the_same_and_are_not_guarded(num_tokens: int, size: int) -> None:
    count = symbolic(num_tokens)
    found = [
        layout.ceil_div(count, size),
        layout.rows_per_rank(count, size),
        layout.padded_rows(count, size),
        *layout.offsets([count, 3, count]),
        layout.largest([3, count]),
        layout.total([3, count]),
    ]
    assert not count.node.shape_env.guards
    rows = -(-num_tokens // size)
    plain = [rows, rows, rows * size, 0, num_tokens, num_tokens + 3]
    plain += [max(3, num_tokens), 3 + num_tokens]
    assert [int(value) for value in found] == plain


@given(counts=st.lists(COUNTS, min_size=1, max_size=20))
def test_offsets_largest_and_total(counts: list[int]) -> None:
    assert layout.offsets(counts) == [sum(counts[:index]) for index in range(len(counts))]
    assert layout.largest(counts) == max(counts)
    assert layout.total(counts) == sum(counts)


def test_ranks_are_laid_out_tp_fastest() -> None:
    ranks = [
        layout.expert_parallel_rank(d, p, t, pcp_size=2, tp_size=4)
        for d in range(3)
        for p in range(2)
        for t in range(4)
    ]
    assert ranks == list(range(24))
