"""Copies of rows for other ranks: one for each rank that has an expert of the row, however many experts it has there.

Ids and weights travel with the hidden states (8 K bytes a row), so the rank that has the experts weighs and sums their results
before it sends one row back. N rows of this rank, K top-k, H hidden, W ranks, B bytes of a packed row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fake_impls.dispatchers import copies as shapes
from moe_ops._library import Wait, define, needs_gradient
from moe_ops.collectives import Splits, exchange_rows
from moe_ops.dispatchers.local import sources, unpermute
from moe_ops.groups import check_group
from moe_ops.packing import pack_rows, unpack_rows

FILL = (0, -1, 0, 0)
"""What a row that is sent empty holds: hidden states, ids (routed nowhere), weights and scales."""


def _plan_copies(
    topk_ids: torch.Tensor, num_local_experts: int, size: int, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    rank_NK = topk_ids.to(torch.int64).div(num_local_experts, rounding_mode="floor")  # -1 stays -1
    rank_NK = torch.where((topk_ids >= 0) & (rank_NK < size), rank_NK, size)
    goes_NW = torch.zeros(topk_ids.shape[0], size + 1, dtype=torch.int64, device=topk_ids.device)
    goes_NW = goes_NW.scatter(1, rank_NK, 1)[:, :size]
    slots_NW = goes_NW.cumsum(0) - 1
    counts_W = goes_NW.sum(0)
    if capacity is None:
        positions_NW = slots_NW + (counts_W.cumsum(0) - counts_W)
    else:
        goes_NW = goes_NW * (slots_NW < capacity)
        positions_NW = slots_NW + torch.arange(size, device=topk_ids.device) * capacity
    positions_NW = torch.where(goes_NW > 0, positions_NW, -1)
    return positions_NW.clone(memory_format=torch.contiguous_format), counts_W


def _pack_copies(
    tensors: Sequence[torch.Tensor], positions: torch.Tensor, rows: int, fill: Sequence[int]
) -> torch.Tensor:
    # One row more than there are, which is the fill: places that no copy takes are copies of it.
    packed_NB = pack_rows(tensors, positions.shape[0] + 1, fill)
    copies_SB: torch.Tensor = packed_NB.index_select(0, sources(positions, rows))
    return copies_SB


plan_copies = define(
    "plan_copies(Tensor topk_ids, int num_local_experts, int size, SymInt? capacity) -> (Tensor, Tensor)",
    kernel=_plan_copies,
    fake=shapes.plan_copies,
    check=shapes.check_plan_copies,
)
pack_copies = define(
    "pack_copies(Tensor[] tensors, Tensor positions, SymInt rows, int[] fill) -> Tensor",
    kernel=_pack_copies,
    fake=shapes.pack_copies,
    check=shapes.check_pack_copies,
)


def send_copies(
    tensors: Sequence[torch.Tensor],
    positions: torch.Tensor,
    rows: int,
    splits: Splits,
    group: str,
) -> Wait[list[torch.Tensor]]:
    """Send the `rows` copies that `plan_copies` placed, all tensors packed in one all-to-all over `group`.

    ``[N, ...] each -> [rows received, ...] each``, in the order of the ranks that the rows came from. `tensors` are hidden
    states, ids, weights and perhaps scales. Where a gradient is needed it is waited for at once.
    """
    if needs_gradient(tensors):
        received = list(_SendCopies.apply(positions, rows, splits, group, *tensors))  # type: ignore[no-untyped-call]
        return lambda: received
    wait = exchange_rows(pack_copies(tensors, positions, rows, FILL[: len(tensors)]), splits, group)
    return lambda: unpack_rows(wait(), tensors)


def return_copies(
    shares: torch.Tensor, positions: torch.Tensor, splits: Splits, group: str, size: int
) -> Wait[torch.Tensor]:
    """Send what became of the copies back, ``[rows received, H]``, and sum that of each row: ``[N, H]``.

    Sums are in float32 and in rank order, so every kind of dispatch has the same, to the bit.
    """
    check_group("combine", "ep", group, size)
    wait = exchange_rows(shares, splits, group)
    return lambda: unpermute(wait(), None, positions)


class _SendCopies(torch.autograd.Function):
    """`send_copies`, whose bytes autograd cannot follow: the gradients go back packed in one all-to-all, and those of the
    copies of a row are summed in float32, in rank order."""

    @staticmethod
    def forward(
        ctx: Any,
        positions: torch.Tensor,
        rows: int,
        splits: Splits,
        group: str,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        received = send_copies(tensors, positions, rows, splits, group)()  # without gradients, in here
        ctx.save_for_backward(positions)
        ctx.splits, ctx.group = splits if isinstance(splits, int) else splits[::-1], group
        is_needed = ctx.needs_input_grad[4:]
        ctx.mark_non_differentiable(*(x for x, needs in zip(received, is_needed, strict=True) if not needs))
        return tuple(received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        is_needed = ctx.needs_input_grad[4:]
        needed = [grad for grad, needs in zip(grads, is_needed, strict=True) if needs]
        packed_RB = pack_rows(needed, needed[0].shape[0], [0] * len(needed))
        returned = iter(unpack_rows(exchange_rows(packed_RB, ctx.splits, ctx.group)(), needed))
        summed = [unpermute(next(returned), None, positions) if needs else None for needs in is_needed]
        return None, None, None, None, *summed
