"""Shapes of the transport ops: the packed byte buffer, ragged blocks of rows, and the gathers around them.

T rows, H width, R rows of a rank, B bytes of a packed row, W ranks.
"""

import math
from collections.abc import Sequence

import torch

from fake_impls.checks import check_at_most, check_dim, check_dtype, check_equal, check_multiple, check_same_rows
from fake_impls.layout import largest, total


def row_bytes(tensor: torch.Tensor) -> int:
    """Bytes of one row (one index of dim 0)."""
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def chunk_tokens(x: torch.Tensor, padded_rows: int, num_chunks: int, rank: int, fill: int = 0) -> torch.Tensor:
    """``[T, ...] -> [padded_rows / num_chunks, ...]``."""
    check_chunk_tokens(x, padded_rows, num_chunks)
    return x.new_empty(padded_rows // num_chunks, *x.shape[1:])


def check_chunk_tokens(x: torch.Tensor, padded_rows: int, num_chunks: int) -> None:
    """Rows that fit into equal chunks."""
    if x.dim() < 1:
        raise ValueError("chunk_tokens: x must have at least 1 dimension, got 0-D")
    check_multiple("chunk_tokens", "padded_rows", padded_rows, num_chunks, "num_chunks")
    check_at_most("chunk_tokens", "rows of x", x.shape[0], padded_rows, "padded_rows")


def pack_rows(tensors: Sequence[torch.Tensor], rows: int, fill: Sequence[int]) -> torch.Tensor:
    """``[T, ...] each -> uint8 [rows, B]``: row `i` of all tensors side by side, rows past T filled."""
    check_pack(tensors, rows, fill)
    return tensors[0].new_empty(rows, sum(row_bytes(tensor) for tensor in tensors), dtype=torch.uint8)


def unpack_rows(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """``uint8 [R, B] -> [R, ...] each``, with the dtypes and row shapes of `like`, whose rows do not matter."""
    check_unpack(packed, sum(row_bytes(tensor) for tensor in like))
    return [packed.new_empty(packed.shape[0], *tensor.shape[1:], dtype=tensor.dtype) for tensor in like]


def check_pack(tensors: Sequence[torch.Tensor], rows: int, fill: Sequence[int]) -> None:
    """Tensors of as many rows, no more than there is room for, and what to put into the rest."""
    if not tensors or len(fill) != len(tensors) or any(value not in (0, -1) for value in fill):
        raise ValueError(
            f"pack_rows: fill must hold 0 or -1 for each of {len(tensors)} tensors (1 or more), got {tuple(fill)}"
        )
    for index, tensor in enumerate(tensors):
        if tensor.dim() < 1:
            raise ValueError(f"pack_rows: tensors[{index}] must have at least 1 dimension, got 0-D")
        check_same_rows("pack_rows", f"tensors[{index}]", tensor, "tensors[0]", tensors[0])
    check_at_most("pack_rows", "rows of tensors", tensors[0].shape[0], rows, "rows")


def check_unpack(packed: torch.Tensor, width: int) -> None:
    """A buffer whose rows hold as many bytes as are to be taken out."""
    check_dim("unpack_rows", "packed", packed, 2)
    check_dtype("unpack_rows", "packed", packed, (torch.uint8,))
    check_equal("unpack_rows", "bytes of a packed row", packed.shape[1], width, "those of a row of `like`")


def compact_rows(x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """``x [W * max(counts), ...] -> [sum(counts), ...]``: the first ``counts[w]`` rows of each equal block."""
    check_equal("compact_rows", "rows of x", x.shape[0], len(counts) * largest(counts), "len(counts) * max(counts)")
    return x.new_empty(total(counts), *x.shape[1:])


def expand_rows(x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """``x [sum(counts), ...] -> [W * max(counts), ...]``: the inverse of ``compact_rows``, other rows zero."""
    check_equal("expand_rows", "rows of x", x.shape[0], total(counts), "sum(counts)")
    return x.new_empty(len(counts) * largest(counts), *x.shape[1:])


def gather_rows(tensors: Sequence[torch.Tensor], rows: int, size: int) -> list[torch.Tensor]:
    """``[T, ...] each -> [size * rows, ...] each``."""
    return [tensor.new_empty(size * rows, *tensor.shape[1:]) for tensor in tensors]


def all_reduce(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """``x -> the same shape, contiguous``."""
    return x.new_empty(x.shape)
