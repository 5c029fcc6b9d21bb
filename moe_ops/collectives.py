"""Rows of tensors: chunks of them, and the collectives that move them.

A function that communicates issues its collective and returns what waits for it, so that the caller may compute meanwhile.
They call the ops of torch's functional collectives directly: torch's wrappers cost twice as much.

T rows, R rows of a rank, B bytes of a packed row, W ranks.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch.autograd.function import once_differentiable

from fake_impls import collectives as shapes
from moe_ops._library import Wait, blocking, define, is_known, needs_gradient
from moe_ops.groups import check_group
from moe_ops.packing import compact_rows, expand_rows, pack_rows, unpack_rows

c10d = torch.ops._c10d_functional

Splits: TypeAlias = int | tuple[Sequence[int], Sequence[int]]
"""How many of the rows go to each rank and come from each; for an even exchange, the number of ranks."""


def chunk_rows(x: torch.Tensor, padded_rows: int, num_chunks: int, rank: int, fill: int = 0) -> torch.Tensor:
    """``[T, ...] -> [padded_rows / num_chunks, ...]``: chunk `rank` of the rows, padded with `fill`. A copy."""
    x = pad_rows(x, padded_rows, fill)
    rows = padded_rows // num_chunks
    if is_plain(x):
        return torch.narrow_copy(x, 0, rank * rows, rows)
    chunks: torch.Tensor = x.unflatten(0, (num_chunks, rows))  # selects without bounds that a compiler has to prove
    return chunks.select(0, rank).clone(memory_format=torch.contiguous_format)


def is_plain(x: torch.Tensor) -> bool:
    """Whether `x` has numbers for sizes: narrow_copy, which is always contiguous, has no form for symbols."""
    return type(x) is torch.Tensor and not torch.compiler.is_dynamo_compiling()


def pad_rows(x: torch.Tensor, rows: int, fill: int = 0) -> torch.Tensor:
    """``[T, ...] -> [rows, ...]``. `x` itself where it is known to have as many."""
    if is_known(x.shape[0] == rows):
        return x
    if x.dim() == 1:  # torch.cat leaves out 1-D tensors of no elements, which to a compiler is a guard on the length
        return pad_rows(x.unsqueeze(1), rows, fill).squeeze(1)
    shape = (rows - x.shape[0], *x.shape[1:])
    return torch.cat((x, x.new_full(shape, fill) if fill else x.new_zeros(shape)))


def first_rows(x: torch.Tensor, count: int) -> torch.Tensor:
    """A copy of ``x[:count]``."""
    if is_plain(x):
        return torch.narrow_copy(x, 0, 0, count)
    return x.narrow(0, 0, count).clone(memory_format=torch.contiguous_format)


def on_rank_zero(x: torch.Tensor, rank: int) -> torch.Tensor:
    """`x` on rank 0, zeros on the others, for a sum over ranks that is to hold it once. The rank may be symbolic."""
    return torch.where(x.new_zeros(1) == rank, x, 0)


def all_gather(x: torch.Tensor, size: int, group: str) -> Wait[torch.Tensor]:
    """``[R, ...] -> [size * R, ...]`` in rank order."""
    in_flight = c10d.all_gather_into_tensor(x.contiguous(), size, group)
    return lambda: c10d.wait_tensor(in_flight)


def reduce_scatter(x: torch.Tensor, size: int, group: str) -> Wait[torch.Tensor]:
    """``[size * R, ...] -> [R, ...]``: this rank's block, summed over the ranks."""
    in_flight = c10d.reduce_scatter_tensor(x.contiguous(), "sum", size, group)
    return lambda: c10d.wait_tensor(in_flight)


def exchange_rows(x: torch.Tensor, splits: Splits, group: str) -> Wait[torch.Tensor]:
    """An all-to-all of rows: ``[rows sent, ...] -> [rows received, ...]``, both in rank order.

    An even one is sent flat, since npugraph_ex (of torch_npu 2.13) takes the numbers of elements that it makes of the splits
    for splits.
    """
    if isinstance(splits, int):
        shape = x.shape
        even = [shape[0] // splits * math.prod(shape[1:])] * splits
        in_flight = c10d.all_to_all_single(x.contiguous().view(-1), even, even, group)
        return lambda: c10d.wait_tensor(in_flight).view(shape)
    send_splits, receive_splits = splits
    in_flight = c10d.all_to_all_single(x.contiguous(), list(receive_splits), list(send_splits), group)
    return lambda: c10d.wait_tensor(in_flight)


def sum_over_ranks(x: torch.Tensor, group: str, size: int) -> Wait[torch.Tensor]:
    """``x``, summed over the ranks of TP: an all-reduce."""
    check_group("finalize", "tp", group, size)
    in_flight = c10d.all_reduce(x.contiguous(), "sum", group)
    return lambda: c10d.wait_tensor(in_flight)


def gather_rows(
    tensors: Sequence[torch.Tensor],
    rows: int,
    fill: Sequence[int],
    size: int,
    group: str,
    counts: Sequence[int] | None = None,
) -> Wait[list[torch.Tensor]]:
    """Gather the rows of several tensors by one all-gather over `group`, packed. No host sync.

    Each ``[T, ...]`` is padded to `rows` rows with its `fill` (0 or -1) and gathered to ``[size * rows, ...]``; with
    `counts`, only the first ``counts[r]`` rows of rank `r` are kept. Where a gradient is needed it is waited for at once.
    """
    if needs_gradient(tensors):
        gathered = list(_GatherRows.apply(rows, fill, size, group, counts, *tensors))  # type: ignore[no-untyped-call]
        return lambda: gathered
    in_flight = c10d.all_gather_into_tensor(pack_rows(tensors, rows, fill), size, group)

    def wait() -> list[torch.Tensor]:
        gathered_RB = c10d.wait_tensor(in_flight)
        if counts is not None:
            gathered_RB = compact_rows(gathered_RB, counts)
        unpacked: list[torch.Tensor] = unpack_rows(gathered_RB, tensors)
        return unpacked

    return wait


class _GatherRows(torch.autograd.Function):
    """`gather_rows`, whose bytes autograd cannot follow.

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
        gathered = gather_rows(tensors, rows, fill, size, group, counts)()  # without gradients, in here
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
        returned = iter(unpack_rows(exchange_rows(packed_RB, ctx.size, ctx.group)(), needed))
        summed = [
            _sum_blocks(next(returned), ctx.size, ctx.rows, ctx.num_tokens) if needs else None for needs in is_needed
        ]
        return None, None, None, None, None, *summed


def _sum_blocks(x: torch.Tensor, num_blocks: int, rows: int, num_tokens: int) -> torch.Tensor:
    """``[num_blocks * rows, ...] -> [num_tokens, ...]``: the sum of the blocks, without the rows that pad."""
    blocks: torch.Tensor = x.unflatten(0, (num_blocks, rows))
    return blocks.sum(dim=0, dtype=torch.float32).to(x.dtype).narrow(0, 0, num_tokens)


chunk_tokens = define(
    "chunk_tokens(Tensor x, SymInt padded_rows, int num_chunks, SymInt rank, int fill=0) -> Tensor",
    composite=chunk_rows,
    check=shapes.check_chunk_tokens,
)
all_reduce = define("all_reduce(Tensor x, str group, int size) -> Tensor", composite=blocking(sum_over_ranks))
