"""Dispatch and combine of every kind, behind one signature each.

prepare -> route -> dispatch -> experts -> combine -> finalize
                    ^^^^^^^^               ^^^^^^^
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch

from fake_impls.checks import check_choice
from moe_ops.dispatchers.all_to_all import (
    AllToAllState,
    combine_all_to_all,
    dispatch_all_to_all,
    start_all_to_all,
    start_return_all_to_all,
)
from moe_ops.dispatchers.fixed_capacity import (
    FixedCapacityState,
    combine_fixed_capacity,
    dispatch_fixed_capacity,
    start_fixed_capacity,
    start_return_fixed_capacity,
)
from moe_ops.dispatchers.local import LocalDispatch, combine_local, dispatch_local
from moe_ops.groups import Group
from moe_ops.overlap import Finish
from moe_ops.types import Dispatch

Exchange: TypeAlias = AllToAllState | FixedCapacityState


class Dispatched(NamedTuple):
    """Rows for this rank's experts, grouped by expert.

    Attributes:
        local: the rows, their scales, the counts for each expert, and where each row came from.
        exchange: what sends the results back to other ranks; None where all rows were here. That of FIXED_CAPACITY holds
            ``num_dropped``.
    """

    local: LocalDispatch
    exchange: Exchange | None


def dispatch(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    kind: Dispatch,
    num_local_experts: int,
    ep: Group,
    capacity: int | None = None,
    scale: torch.Tensor | None = None,
) -> Dispatched:
    """Bring rows to the ranks of their experts and group them there by expert.

    Args:
        hidden_states: ``[N, H]``, quantised or not.
        topk_ids: int32 or int64 ``[N, K]``, ids of the whole layer; -1 goes nowhere.
        topk_weights: float32 ``[N, K]``.
        kind: LOCAL leaves out choices of other ranks' experts; the others send rows there over `ep`.
        num_local_experts: experts of each rank; rank `r` has the `r`-th run of them.
        ep: the EP group; single, with LOCAL, where there is none.
        capacity: FIXED_CAPACITY: rows that each rank sends to each rank; see `dispatch_fixed_capacity`.
        scale: the scales of quantised hidden states.

    Raises:
        ValueError: FIXED_CAPACITY without a capacity.
        NotCapturableError: ALL_TO_ALL while a graph of the device is being captured.
    """
    check_choice("dispatch", "kind", kind, Dispatch)
    rows = hidden_states, topk_ids, topk_weights
    if kind is Dispatch.ALL_TO_ALL:
        return Dispatched(*dispatch_all_to_all(*rows, num_local_experts=num_local_experts, ep=ep, scale=scale))
    if kind is Dispatch.FIXED_CAPACITY:
        if capacity is None:
            raise ValueError("dispatch: capacity must be given with FIXED_CAPACITY, got None")
        return Dispatched(
            *dispatch_fixed_capacity(*rows, capacity=capacity, num_local_experts=num_local_experts, ep=ep, scale=scale)
        )
    first = ep.rank * num_local_experts
    return Dispatched(dispatch_local(*rows, first_expert=first, num_local_experts=num_local_experts, scale=scale), None)


def combine(expert_rows: torch.Tensor, dispatched: Dispatched, *, ep: Group, is_weighed: bool = False) -> torch.Tensor:
    """Weigh and sum what the experts made of the rows, where the rows came from. One all-to-all over `ep` if they were sent.

    Args:
        expert_rows: ``[R, H]``, in the order of ``dispatched.local.rows``.
        dispatched: what `dispatch` returned.
        ep: the group that dispatch had.
        is_weighed: whether the weights went into the experts' input already.

    Returns:
        ``[N, H]``: complete after an exchange, else the share of this rank's experts.
    """
    local, exchange = dispatched
    if isinstance(exchange, AllToAllState):
        return combine_all_to_all(expert_rows, local, exchange, ep=ep, is_weighed=is_weighed)
    if isinstance(exchange, FixedCapacityState):
        return combine_fixed_capacity(expert_rows, local, exchange, ep=ep, is_weighed=is_weighed)
    return combine_local(expert_rows, local.state, is_weighed=is_weighed)


def start_dispatch(
    tensors: Sequence[torch.Tensor],
    *,
    kind: Dispatch,
    num_local_experts: int,
    ep: Group,
    capacity: int,
) -> Finish[tuple[list[torch.Tensor], Exchange | None]]:
    """The exchange of `dispatch` alone, in flight: rows that arrive are not grouped by expert yet.

    `tensors` are hidden states, ids, weights and perhaps scales, and so is what arrives. LOCAL exchanges nothing.
    """
    if kind is Dispatch.ALL_TO_ALL:
        return start_all_to_all(tensors, num_local_experts=num_local_experts, ep=ep)
    if kind is Dispatch.FIXED_CAPACITY:
        return start_fixed_capacity(tensors, capacity=capacity, num_local_experts=num_local_experts, ep=ep)
    return lambda: (list(tensors), None)


def start_combine(shares: torch.Tensor, exchange: Exchange | None, *, ep: Group) -> Finish[torch.Tensor]:
    """The exchange of `combine` alone, in flight: `shares` are this rank's, of the rows that arrived."""
    if isinstance(exchange, AllToAllState):
        return start_return_all_to_all(shares, exchange, ep=ep)
    if isinstance(exchange, FixedCapacityState):
        return start_return_fixed_capacity(shares, exchange, ep=ep)
    return lambda: shares
