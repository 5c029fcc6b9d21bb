"""Shapes of packed rows: several tensors in one buffer of bytes, and ragged blocks of rows.

T rows, R rows of a rank, B bytes of a packed row, W ranks.
"""

import math
from collections.abc import Sequence

import torch

from fake_impls.checks import check_at_most, check_dim, check_dtype, check_equal, check_same_rows
from fake_impls.layout import largest, total


def row_bytes(tensor: torch.Tensor) -> int:
    """Bytes of one row (one index of dim 0)."""
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def pack_rows(tensors: Sequence[torch.Tensor], rows: int, fill: Sequence[int]) -> torch.Tensor:
    """``[T, ...] each -> uint8 [rows, B]``: row `i` of all tensors side by side, rows past T filled."""
    return tensors[0].new_empty(rows, sum(row_bytes(tensor) for tensor in tensors), dtype=torch.uint8)


def check_pack_rows(tensors: Sequence[torch.Tensor], rows: int, fill: Sequence[int]) -> None:
    if not tensors or len(fill) != len(tensors) or any(value not in (0, -1) for value in fill):
        raise ValueError(
            f"pack_rows: fill must hold 0 or -1 for each of {len(tensors)} tensors (1 or more), got {tuple(fill)}"
        )
    for index, tensor in enumerate(tensors):
        if tensor.dim() < 1:
            raise ValueError(f"pack_rows: tensors[{index}] must have at least 1 dimension, got 0-D")
        check_same_rows("pack_rows", f"tensors[{index}]", tensor, "tensors[0]", tensors[0])
    check_at_most("pack_rows", "rows of tensors", tensors[0].shape[0], rows, "rows")


def unpack_rows(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """``uint8 [R, B] -> [R, ...] each``, with the dtypes and row shapes of `like`, whose rows do not matter."""
    return [packed.new_empty(packed.shape[0], *tensor.shape[1:], dtype=tensor.dtype) for tensor in like]


def check_unpack_rows(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> None:
    check_dim("unpack_rows", "packed", packed, 2)
    check_dtype("unpack_rows", "packed", packed, (torch.uint8,))
    width = sum(row_bytes(tensor) for tensor in like)
    check_equal("unpack_rows", "bytes of a packed row", packed.shape[1], width, "those of a row of `like`")


def compact_rows(x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """``x [W * max(counts), ...] -> [sum(counts), ...]``: the first ``counts[w]`` rows of each equal block."""
    return x.new_empty(total(counts), *x.shape[1:])


def check_compact_rows(x: torch.Tensor, counts: Sequence[int]) -> None:
    check_equal("compact_rows", "rows of x", x.shape[0], len(counts) * largest(counts), "len(counts) * max(counts)")


def expand_rows(x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """``x [sum(counts), ...] -> [W * max(counts), ...]``: the inverse of ``compact_rows``, other rows zero."""
    return x.new_empty(len(counts) * largest(counts), *x.shape[1:])


def check_expand_rows(x: torch.Tensor, counts: Sequence[int]) -> None:
    check_equal("expand_rows", "rows of x", x.shape[0], total(counts), "sum(counts)")
