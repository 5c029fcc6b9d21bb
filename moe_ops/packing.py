"""Tensors that travel together: one byte buffer for one collective, and ragged blocks of its rows.

Row `i` of the buffer holds row `i` of every tensor, side by side. Packing is a copy, so dtypes and alignments mix freely; bytes
also suit transports that know no fp8.

T rows, R rows of a rank, B bytes of a packed row, W ranks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from fake_impls import packing as shapes
from fake_impls.layout import largest, offsets
from fake_impls.packing import row_bytes
from moe_ops._library import add_kernel, define, is_known


def _pack_rows(tensors: Sequence[torch.Tensor], rows: int, fill: Sequence[int]) -> torch.Tensor:
    num_rows = tensors[0].shape[0]
    packed_TB = torch.cat([_to_bytes(tensor) for tensor in tensors], dim=1)
    if is_known(num_rows == rows):
        return packed_TB
    missing = [  # all bytes 0xFF: -1 in every integer dtype
        packed_TB.new_full((rows - num_rows, row_bytes(tensor)), value & 0xFF)
        for tensor, value in zip(tensors, fill, strict=True)
    ]
    return torch.cat((packed_TB, torch.cat(missing, dim=1)))


def _to_bytes(x: torch.Tensor) -> torch.Tensor:
    """``[T, ...] -> uint8 [T, B]``.

    The axis of one element, and the shape that is given in full, are for GE's Bitcast: it appends an axis where torch widens
    the last one, and the reshape makes both alike.
    """
    x_TN1 = x.contiguous().view(x.shape[0], math.prod(x.shape[1:]), 1)
    return x_TN1.view(torch.uint8).view(x.shape[0], row_bytes(x))


def _from_bytes(x_TB: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse: ``uint8 [T, B] -> [T, ...]``."""
    x_TNS = x_TB.contiguous().view(x_TB.shape[0], math.prod(like.shape[1:]), like.element_size())
    return x_TNS.view(like.dtype).view(x_TB.shape[0], *like.shape[1:])


def _pack_rows_on_host(tensors: Sequence[torch.Tensor], rows: int, fill: Sequence[int]) -> torch.Tensor:
    """One copy of each byte."""
    columns = [_as_bytes(tensor) for tensor in tensors]
    num_rows = tensors[0].shape[0]
    if num_rows == rows:
        return torch.cat(columns, dim=1)
    packed_RB = shapes.pack_rows(tensors, rows, fill)
    torch.cat(columns, dim=1, out=packed_RB.narrow(0, 0, num_rows))
    missing_RB = packed_RB.narrow(0, num_rows, rows - num_rows)
    parts = missing_RB.split([column.shape[1] for column in columns], dim=1)
    for part_RB, value in zip(parts, fill, strict=True):
        part_RB.fill_(value & 0xFF)
    return packed_RB


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    """``[T, ...] -> uint8 [T, B]``, a view where the strides allow it."""
    x_TN = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    if x_TN.stride(1) != 1:  # also a single column of a wider tensor, which counts as contiguous
        x_TN = torch.empty_like(x_TN, memory_format=torch.contiguous_format).copy_(x_TN)
    return x_TN.view(torch.uint8)


def _unpack_rows(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    widths = [row_bytes(tensor) for tensor in like]
    parts = [packed.narrow(1, start, width) for start, width in zip(offsets(widths), widths, strict=True)]
    copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return [_from_bytes(copy, tensor) for copy, tensor in zip(copies, like, strict=True)]


def _unpack_rows_on_host(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """With fewer calls."""
    widths = [row_bytes(tensor) for tensor in like]
    unpacked = []
    for tensor, start, width in zip(like, offsets(widths), widths, strict=True):
        x = torch.narrow_copy(packed, 1, start, width).view(tensor.dtype)
        unpacked.append(x if tensor.dim() == 2 else x.view(packed.shape[0], *tensor.shape[1:]))
    return unpacked


def _compact_rows(x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    block = largest(counts)
    return torch.cat([x[rank * block : rank * block + count] for rank, count in enumerate(counts)])


def _expand_rows(x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    block = largest(counts)
    zeros = x.new_zeros(block, *x.shape[1:])
    parts = [
        (x[start : start + count], zeros[: block - count]) for start, count in zip(offsets(counts), counts, strict=True)
    ]
    return torch.cat([part for pair in parts for part in pair])


def _compact_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return expand_rows(grad, ctx.counts), None


def _expand_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return compact_rows(grad, ctx.counts), None


def _keep_counts(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.counts = inputs[1]


pack_rows = define(
    "pack_rows(Tensor[] tensors, SymInt rows, int[] fill) -> Tensor",
    kernel=_pack_rows,
    fake=shapes.pack_rows,
    check=shapes.check_pack_rows,
)
unpack_rows = define(
    "unpack_rows(Tensor packed, Tensor[] like) -> Tensor[]",
    kernel=_unpack_rows,
    fake=shapes.unpack_rows,
    check=shapes.check_unpack_rows,
)
add_kernel("pack_rows", _pack_rows_on_host, "CPU")
add_kernel("unpack_rows", _unpack_rows_on_host, "CPU")
compact_rows = define(
    "compact_rows(Tensor x, SymInt[] counts) -> Tensor",
    kernel=_compact_rows,
    fake=shapes.compact_rows,
    check=shapes.check_compact_rows,
    backward=_compact_backward,
    setup_context=_keep_counts,
)
expand_rows = define(
    "expand_rows(Tensor x, SymInt[] counts) -> Tensor",
    kernel=_expand_rows,
    fake=shapes.expand_rows,
    check=shapes.check_expand_rows,
    backward=_expand_backward,
    setup_context=_keep_counts,
)
