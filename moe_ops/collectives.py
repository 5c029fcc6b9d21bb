"""Rows of tensors: chunks of them, and the collectives that move them.

Tensors that travel together share one byte buffer and one collective: row `i` of the buffer holds row `i` of every tensor,
side by side. Packing is a copy, so dtypes and alignments mix freely; byte payloads also suit transports that know no fp8.

T rows, R rows of a rank, B bytes of a packed row, W ranks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fake_impls import collectives as shapes
from fake_impls.layout import largest, offsets
from moe_ops._library import add_kernel, define, needs_gradient
from moe_ops.groups import check_group
from moe_ops.overlap import Finish

c10d = torch.ops._c10d_functional


def chunk_rows(x: torch.Tensor, padded_rows: int, num_chunks: int, rank: int, fill: int = 0) -> torch.Tensor:
    """``[T, ...] -> [padded_rows / num_chunks, ...]``: chunk `rank` of the rows, padded with `fill`. A copy."""
    x = pad_rows(x, padded_rows, fill)
    rows = padded_rows // num_chunks
    if type(x) is torch.Tensor:
        return torch.narrow_copy(x, 0, rank * rows, rows)
    chunks: torch.Tensor = x.unflatten(0, (num_chunks, rows))  # selects without bounds that a compiler has to prove
    return chunks.select(0, rank).clone(memory_format=torch.contiguous_format)


def _chunk_tokens(x: torch.Tensor, padded_rows: int, num_chunks: int, rank: int, fill: int = 0) -> torch.Tensor:
    shapes.check_chunk_tokens(x, padded_rows, num_chunks)
    return chunk_rows(x, padded_rows, num_chunks, rank, fill)


def pad_rows(x: torch.Tensor, rows: int, fill: int = 0) -> torch.Tensor:
    """``[T, ...] -> [rows, ...]``. `x` itself where it is known to have as many."""
    missing = rows - x.shape[0]
    if not isinstance(missing, torch.SymInt) and missing == 0:
        return x
    shape = (missing, *x.shape[1:])
    return torch.cat((x, x.new_full(shape, fill) if fill else x.new_zeros(shape)))


def copy_rows(x: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """A copy of ``x[start : start + length]``."""
    if type(x) is torch.Tensor:
        return torch.narrow_copy(x, 0, start, length)
    # narrow_copy, which is always contiguous, has no form for symbolic sizes.
    return x.narrow(0, start, length).clone(memory_format=torch.contiguous_format)


def on_rank_zero(x: torch.Tensor, rank: int) -> torch.Tensor:
    """`x` on rank 0, zeros on the others, for a sum over ranks that is to hold it once. The rank may be symbolic."""
    return torch.where(x.new_zeros(1) == rank, x, 0)


def start_all_gather(x: torch.Tensor, size: int, group: str) -> Finish[torch.Tensor]:
    """``[R, ...] -> [size * R, ...]`` in rank order."""
    return _wait(c10d.all_gather_into_tensor(x.contiguous(), size, group))


def start_reduce_scatter(x: torch.Tensor, size: int, group: str) -> Finish[torch.Tensor]:
    """``[size * R, ...] -> [R, ...]``: this rank's block, summed over the ranks."""
    return _wait(c10d.reduce_scatter_tensor(x.contiguous(), "sum", size, group))


def start_exchange(
    x: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group: str
) -> Finish[torch.Tensor]:
    """All-to-all of ``input_splits[i]`` rows to rank `i` and ``output_splits[j]`` rows from rank `j`."""
    return _wait(c10d.all_to_all_single(x.contiguous(), list(output_splits), list(input_splits), group))


def start_even_exchange(x: torch.Tensor, size: int, group: str) -> Finish[torch.Tensor]:
    """``[size * R, ...] -> [size * R, ...]``: block `i` goes to rank `i`; block `j` of the result came from rank `j`.

    Sent flat, since npugraph_ex (of torch_npu 2.13) takes the numbers of elements that it makes of the splits for splits.
    """
    shape = x.shape
    splits = [shape[0] // size * math.prod(shape[1:])] * size
    in_flight = c10d.all_to_all_single(x.contiguous().view(-1), splits, splits, group)
    return lambda: c10d.wait_tensor(in_flight).view(shape)


def start_all_reduce(x: torch.Tensor, group: str) -> Finish[torch.Tensor]:
    """``x``, summed over the ranks."""
    return _wait(c10d.all_reduce(x.contiguous(), "sum", group))


def _wait(in_flight: torch.Tensor) -> Finish[torch.Tensor]:
    return lambda: c10d.wait_tensor(in_flight)


def all_gather(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    """`start_all_gather`, waited for."""
    return start_all_gather(x, size, group)()


def reduce_scatter(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    """`start_reduce_scatter`, waited for."""
    return start_reduce_scatter(x, size, group)()


def all_to_all(x: torch.Tensor, size: int, group: str) -> torch.Tensor:
    """`start_even_exchange`, waited for."""
    return start_even_exchange(x, size, group)()


def _all_reduce(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    check_group("finalize", "tp", group, size)
    return start_all_reduce(x, group)()


def _pack_rows(tensors: Sequence[torch.Tensor], rows: int, fill: Sequence[int]) -> torch.Tensor:
    shapes.check_pack(tensors, rows, fill)
    num_rows = tensors[0].shape[0]
    packed_TB = torch.cat([_to_bytes(tensor) for tensor in tensors], dim=1)
    if statically_known_true(num_rows == rows):
        return packed_TB
    missing = [  # all bytes 0xFF: -1 in every integer dtype
        packed_TB.new_full((rows - num_rows, shapes.row_bytes(tensor)), value & 0xFF)
        for tensor, value in zip(tensors, fill, strict=True)
    ]
    return torch.cat((packed_TB, torch.cat(missing, dim=1)))


def _to_bytes(x: torch.Tensor) -> torch.Tensor:
    """``[T, ...] -> uint8 [T, B]``.

    The axis of one element, and the shape that is given in full, are for GE's Bitcast: it appends an axis where torch widens
    the last one, and the reshape makes both alike.
    """
    x_TN1 = x.contiguous().view(x.shape[0], math.prod(x.shape[1:]), 1)
    return x_TN1.view(torch.uint8).view(x.shape[0], shapes.row_bytes(x))


def _from_bytes(x_TB: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse: ``uint8 [T, B] -> [T, ...]``."""
    x_TNS = x_TB.contiguous().view(x_TB.shape[0], math.prod(like.shape[1:]), like.element_size())
    return x_TNS.view(like.dtype).view(x_TB.shape[0], *like.shape[1:])


def _pack_rows_on_host(tensors: Sequence[torch.Tensor], rows: int, fill: Sequence[int]) -> torch.Tensor:
    """One copy of each byte."""
    shapes.check_pack(tensors, rows, fill)
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
    widths = [shapes.row_bytes(tensor) for tensor in like]
    shapes.check_unpack(packed, sum(widths))
    parts = [packed.narrow(1, start, width) for start, width in zip(offsets(widths), widths, strict=True)]
    copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return [_from_bytes(copy, tensor) for copy, tensor in zip(copies, like, strict=True)]


def _unpack_rows_on_host(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """With fewer calls."""
    widths = [shapes.row_bytes(tensor) for tensor in like]
    shapes.check_unpack(packed, sum(widths))
    unpacked = []
    for tensor, start, width in zip(like, offsets(widths), widths, strict=True):
        x = torch.narrow_copy(packed, 1, start, width).view(tensor.dtype)
        unpacked.append(x if tensor.dim() == 2 else x.view(packed.shape[0], *tensor.shape[1:]))
    return unpacked


def _compact_rows(x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    shapes.compact_rows(x, counts)
    block = largest(counts)
    return torch.cat([x[rank * block : rank * block + count] for rank, count in enumerate(counts)])


def _expand_rows(x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    shapes.expand_rows(x, counts)
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
    "pack_rows(Tensor[] tensors, SymInt rows, int[] fill) -> Tensor", kernel=_pack_rows, fake=shapes.pack_rows
)
unpack_rows = define(
    "unpack_rows(Tensor packed, Tensor[] like) -> Tensor[]", kernel=_unpack_rows, fake=shapes.unpack_rows
)
add_kernel("pack_rows", _pack_rows_on_host, "CPU")
add_kernel("unpack_rows", _unpack_rows_on_host, "CPU")
compact_rows = define(
    "compact_rows(Tensor x, SymInt[] counts) -> Tensor",
    kernel=_compact_rows,
    fake=shapes.compact_rows,
    backward=_compact_backward,
    setup_context=_keep_counts,
)
expand_rows = define(
    "expand_rows(Tensor x, SymInt[] counts) -> Tensor",
    kernel=_expand_rows,
    fake=shapes.expand_rows,
    backward=_expand_backward,
    setup_context=_keep_counts,
)
chunk_tokens = define(
    "chunk_tokens(Tensor x, SymInt padded_rows, int num_chunks, SymInt rank, int fill=0) -> Tensor",
    composite=_chunk_tokens,
)
all_reduce = define("all_reduce(Tensor x, str group, int size) -> Tensor", composite=_all_reduce)


def start_gather_rows(
    tensors: Sequence[torch.Tensor],
    *,
    rows: int,
    fill: Sequence[int],
    size: int,
    group: str,
    counts: Sequence[int] | None = None,
) -> Finish[list[torch.Tensor]]:
    """Gather the rows of several tensors in one collective.

    Each ``[T, ...]`` is padded to `rows` rows with its `fill` (0 or -1) and gathered to ``[size * rows, ...]``; with
    `counts`, only the first ``counts[r]`` rows of rank `r` are kept. One all-gather over `group`; no host sync. Where a
    gradient is needed, it is waited for at once.
    """
    if needs_gradient(tensors):
        gathered = list(_GatherRows.apply(rows, fill, size, group, counts, *tensors))  # type: ignore[no-untyped-call]
        return lambda: gathered
    return _start_gather_rows(tensors, rows, fill, size, group, counts)


def _start_gather_rows(
    tensors: Sequence[torch.Tensor],
    rows: int,
    fill: Sequence[int],
    size: int,
    group: str,
    counts: Sequence[int] | None,
) -> Finish[list[torch.Tensor]]:
    wait = start_all_gather(pack_rows(tensors, rows, fill), size, group)

    def finish() -> list[torch.Tensor]:
        gathered_RB = wait()
        if counts is not None:
            gathered_RB = compact_rows(gathered_RB, counts)
        unpacked: list[torch.Tensor] = unpack_rows(gathered_RB, tensors)
        return unpacked

    return finish


class _GatherRows(torch.autograd.Function):
    """`start_gather_rows`, whose bytes autograd cannot follow.

    The gradients go back as the rows came, packed in one collective: an all-to-all, which sends what a reduce-scatter sends
    and leaves the sum, in float32 and in rank order, to the rank that the rows came from.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: int,
        fill: Sequence[int],
        size: int,
        group: str,
        counts: Sequence[int] | None,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        gathered = _start_gather_rows(tensors, rows, fill, size, group, counts)()
        ctx.num_tokens, ctx.rows, ctx.size, ctx.group, ctx.counts = tensors[0].shape[0], rows, size, group, counts
        is_needed = ctx.needs_input_grad[5:]
        ctx.mark_non_differentiable(*(x for x, needs in zip(gathered, is_needed, strict=True) if not needs))
        return tuple(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        is_needed = ctx.needs_input_grad[5:]
        needed = [grad for grad, needs in zip(grads, is_needed, strict=True) if needs]
        packed_RB = pack_rows(needed, needed[0].shape[0], [0] * len(needed))
        if ctx.counts is not None:
            packed_RB = expand_rows(packed_RB, ctx.counts)
        returned = iter(unpack_rows(all_to_all(packed_RB, ctx.size, ctx.group), needed))
        summed = [
            _sum_blocks(next(returned), ctx.size, ctx.rows, ctx.num_tokens) if needs else None for needs in is_needed
        ]
        return None, None, None, None, None, *summed


def _sum_blocks(x: torch.Tensor, num_blocks: int, rows: int, num_tokens: int) -> torch.Tensor:
    """``[num_blocks * rows, ...] -> [num_tokens, ...]``: the sum of the blocks, without the rows that pad."""
    blocks: torch.Tensor = x.unflatten(0, (num_blocks, rows))
    return blocks.sum(dim=0, dtype=torch.float32).to(x.dtype).narrow(0, 0, num_tokens)
