"""The packed transport: any mix of dtypes, widths, strides and fills, one collective, and ragged blocks."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import moe_ops as mo
from moe_ops import packing
from moe_ops.collectives import gather_rows
from moe_ops.traffic import count_traffic

from .ranks import RankPool, groups_of

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
]
DTYPES += [torch.bool, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2]
INTEGERS = (torch.int8, torch.int32, torch.int64)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    x = torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)
    return x.view(torch.uint8) if x.dim() else x.unsqueeze(0).view(torch.uint8)


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    limit = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, limit, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).squeeze(-1)


@st.composite
def tensors(draw: Any, rows: int) -> list[torch.Tensor]:
    """1 to 4 tensors of `rows` rows, some of them slices of wider ones or transposed."""
    found = []
    for index in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(DTYPES))
        widths = draw(st.sampled_from([(), (1,), (3,), (8,), (2, 3), (5, 1, 2)]))
        layout = draw(st.sampled_from(["plain", "column", "transposed"]))
        if layout == "column" and widths:
            wide = random_bytes((rows, *widths[:-1], widths[-1] + 2), dtype, index)
            found.append(wide.narrow(-1, 1, widths[-1]))
        elif layout == "transposed" and len(widths) == 1:
            found.append(random_bytes((*widths, rows), dtype, index).transpose(0, 1))
        else:
            found.append(random_bytes((rows, *widths), dtype, index))
    return found


@given(data=st.data(), rows=st.integers(0, 6), more=st.integers(0, 3))
@settings(max_examples=200)
def test_pack_and_unpack(data: st.DataObject, rows: int, more: int) -> None:
    given_tensors = data.draw(tensors(rows))
    fill = [data.draw(st.sampled_from([0, -1])) for _ in given_tensors]
    packed = packing.pack_rows(given_tensors, rows + more, fill)
    unpacked = packing.unpack_rows(packed, given_tensors)
    assert packed.shape[0] == rows + more
    for tensor, result, value in zip(given_tensors, unpacked, fill, strict=True):
        assert result.dtype == tensor.dtype
        assert result.shape == (rows + more, *tensor.shape[1:])
        assert result.is_contiguous()
        assert torch.equal(as_bytes(result[:rows]), as_bytes(tensor))
        if tensor.dtype in INTEGERS:
            assert (result[rows:] == value).all()
        assert not torch._C._is_alias_of(result, packed)
        assert not torch._C._is_alias_of(packed, tensor)


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_ragged_blocks_are_compacted_and_expanded(counts: list[int]) -> None:
    blocks = [torch.full((count, 2), float(rank + 1)) for rank, count in enumerate(counts)]
    longest = max(counts)
    padded = torch.cat([torch.cat([block, torch.zeros(longest - len(block), 2)]) for block in blocks])
    poisoned = torch.cat([torch.cat([block, torch.full((longest - len(block), 2), torch.nan)]) for block in blocks])
    assert torch.equal(packing.compact_rows(poisoned, counts), torch.cat(blocks))
    assert torch.equal(packing.expand_rows(torch.cat(blocks), counts), padded)


def gather(rank: int, counts: list[int] | None, rows: int) -> tuple[list[torch.Tensor], int]:
    group = groups_of(1, 1, 4).ep
    own = payload(rank, rows if counts is None else counts[rank])
    longest = rows if counts is None else max(counts)
    results: list[list[torch.Tensor]] = []

    def call() -> None:
        fill = [0, -1, 0, 0]
        results.append(gather_rows(own, longest, fill, group.size, group.name, counts)())

    traffic = count_traffic(call)
    return [as_bytes(tensor) for tensor in results[0]], traffic.collectives


def payload(rank: int, rows: int) -> list[torch.Tensor]:
    hidden, ids = random_bytes((rows, 6), torch.float8_e4m3fn, rank), random_bytes((rows, 3), torch.int64, rank)
    return [hidden, ids, random_bytes((rows,), torch.float32, rank), random_bytes((rows, 1), torch.bool, rank)]


@pytest.mark.slow
@pytest.mark.parametrize("counts", [[3, 0, 1, 5], [0, 0, 0, 0], [2, 2, 2, 2], None], ids=str)
def test_one_collective_gathers_everything(ranks4: RankPool, counts: list[int] | None) -> None:
    expected = [
        torch.cat(of_all) for of_all in zip(*(payload(r, (counts or [4] * 4)[r]) for r in range(4)), strict=True)
    ]
    for results, num_collectives in ranks4.run(gather, counts, 4):
        assert num_collectives == 1
        for result, tensor in zip(results, expected, strict=True):
            assert torch.equal(result, as_bytes(tensor))


def test_bad_input_names_the_argument() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"pack_rows: rows of tensors\[1\] must be those of tensors\[0\] = 3, got 2"):
        packing.pack_rows([x, x[:2]], 3, [0, 0])
    with pytest.raises(ValueError, match="pack_rows: rows of tensors must be at most rows = 2, got 3"):
        packing.pack_rows([x], 2, [0])
    with pytest.raises(ValueError, match=r"fill must hold 0 or -1 for each of 1 tensors \(1 or more\), got \(5,\)"):
        packing.pack_rows([x], 3, [5])
    with pytest.raises(ValueError, match="bytes of a packed row must be those of a row of `like` = 8, got 9"):
        packing.unpack_rows(torch.zeros(3, 9, dtype=torch.uint8), [x])
    with pytest.raises(ValueError, match=r"compact_rows: rows of x must be len\(counts\) \* max\(counts\) = 4, got 3"):
        packing.compact_rows(x, [1, 2])
    with pytest.raises(ValueError, match=r"expand_rows: rows of x must be sum\(counts\) = 4, got 3"):
        packing.expand_rows(x, [2, 2])
    with pytest.raises(RuntimeError, match="tp group must name an initialised process group, got 'nowhere'"):
        mo.prepare(
            x,
            x,
            mo.Layout(mo.Strategy.ALL2ALL, mo.ParallelGroups(tp=mo.Group("nowhere", 2, 0))),
        )
