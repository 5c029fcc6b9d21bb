"""All-to-all of a fixed capacity: every rank sends the same number of rows to each rank, empty ones where it has fewer.

Static shapes and no host read, so it can be captured; this is the contract of MC2. With the worst-case capacity, the rows of a
rank, it sends no less than an all-gather. N rows of this rank, C capacity, W ranks of EP, K top-k, H hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fake_impls.dispatchers import fixed_capacity as shapes
from moe_ops._library import define
from moe_ops.collectives import start_even_exchange
from moe_ops.dispatchers.all_to_all import group_received
from moe_ops.dispatchers.copies import FILL, plan_copies, start_send_copies
from moe_ops.dispatchers.local import LocalDispatch, combine_local, unpermute
from moe_ops.groups import Group, check_group
from moe_ops.overlap import Finish


class FixedCapacityState(NamedTuple):
    """What combine needs of dispatch.

    Attributes:
        positions: int64 ``[N, W]``, which of the places sent holds the copy for each rank; -1 where there is none.
        num_dropped: int64 ``[]``, on the device: copies that found no place.
    """

    positions: torch.Tensor
    num_dropped: torch.Tensor


def _dispatch(
    tensors: Sequence[torch.Tensor],
    topk_ids: torch.Tensor,
    fill: Sequence[int],
    num_local_experts: int,
    capacity: int,
    group: str,
    size: int,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    wait, state = _start_dispatch(tensors, topk_ids, fill, num_local_experts, capacity, group, size)
    return wait(), state.positions, state.num_dropped


def _start_dispatch(
    tensors: Sequence[torch.Tensor],
    topk_ids: torch.Tensor,
    fill: Sequence[int],
    num_local_experts: int,
    capacity: int,
    group: str,
    size: int,
) -> tuple[Finish[list[torch.Tensor]], FixedCapacityState]:
    check_group("dispatch", "ep", group, size)
    positions, counts_W = plan_copies(topk_ids, num_local_experts, size, capacity)
    wait = start_send_copies(tensors, positions, fill, size * capacity, size, group)
    return wait, FixedCapacityState(positions, (counts_W - capacity).clamp(min=0).sum())


def _combine(rows: torch.Tensor, positions: torch.Tensor, group: str, size: int) -> torch.Tensor:
    return _start_combine(rows, positions, group, size)()


def _start_combine(rows: torch.Tensor, positions: torch.Tensor, group: str, size: int) -> Finish[torch.Tensor]:
    check_group("combine", "ep", group, size)
    shapes.check_combine(rows, positions, size)
    wait = start_even_exchange(rows, size, group)
    return lambda: unpermute(wait(), None, positions)


dispatch_op = define(
    "dispatch_fixed_capacity(Tensor[] tensors, Tensor topk_ids, int[] fill, int num_local_experts, SymInt capacity,"
    " str group, int size) -> (Tensor[], Tensor, Tensor)",
    composite=_dispatch,
)
combine_op = define(
    "combine_fixed_capacity(Tensor rows, Tensor positions, str group, int size) -> Tensor", composite=_combine
)


def dispatch_fixed_capacity(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    capacity: int,
    num_local_experts: int,
    ep: Group,
    scale: torch.Tensor | None = None,
) -> tuple[LocalDispatch, FixedCapacityState]:
    """Send `capacity` rows to each rank: those that have an expert there, and empty ones. One packed all-to-all over `ep`.

    Rows beyond the capacity are dropped, last first, and counted in ``state.num_dropped``; the others are not touched by it.
    A capacity of the rows of the rank that has most (worst case: all rows have an expert on one rank) drops none.

    Args:
        hidden_states: ``[N, H]``, quantised or not.
        topk_ids: int32 or int64 ``[N, K]``; -1 goes nowhere.
        topk_weights: float32 ``[N, K]``.
        capacity: C, the same on every rank of `ep`.
        num_local_experts: experts of each rank.
        ep: the EP group.
        scale: the scales of quantised hidden states.
    """
    tensors = [hidden_states, topk_ids, topk_weights, *([] if scale is None else [scale])]
    fill = FILL[: len(tensors)]
    received, *state = dispatch_op(tensors, topk_ids, fill, num_local_experts, capacity, ep.name, ep.size)
    return group_received(received, num_local_experts, ep), FixedCapacityState(*state)


def start_fixed_capacity(
    tensors: Sequence[torch.Tensor], *, capacity: int, num_local_experts: int, ep: Group
) -> Finish[tuple[list[torch.Tensor], FixedCapacityState]]:
    """The exchange of `dispatch_fixed_capacity`, in flight. Where a gradient is needed, it is waited for at once.

    `tensors` are hidden states, ids, weights and perhaps scales, and so is what arrives.
    """
    fill = FILL[: len(tensors)]
    wait, state = _start_dispatch(tensors, tensors[1], fill, num_local_experts, capacity, ep.name, ep.size)
    return lambda: (wait(), state)


def combine_fixed_capacity(
    expert_rows: torch.Tensor,
    dispatched: LocalDispatch,
    state: FixedCapacityState,
    *,
    ep: Group,
    is_weighed: bool = False,
) -> torch.Tensor:
    """Sum this rank's share of each row, send it back, and sum the shares in rank order. One all-to-all over `ep`.

    The same sums in the same order as `combine_all_to_all`: equal to the bit, where nothing was dropped.
    """
    shares = combine_local(expert_rows, dispatched.state, is_weighed=is_weighed)
    output: torch.Tensor = combine_op(shares, state.positions, ep.name, ep.size)
    return output


def start_return_fixed_capacity(shares: torch.Tensor, state: FixedCapacityState, *, ep: Group) -> Finish[torch.Tensor]:
    """The exchange of `combine_fixed_capacity`, in flight."""
    return _start_combine(shares, state.positions, ep.name, ep.size)
