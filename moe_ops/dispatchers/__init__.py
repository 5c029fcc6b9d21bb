"""Dispatch and combine of every kind, behind one signature each, and the table of kinds.

prepare -> route -> dispatch -> experts -> combine -> finalize
                    ^^^^^^^^               ^^^^^^^
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fake_impls.checks import check_choice
from moe_ops._library import Wait
from moe_ops.dispatchers import all_to_all, fixed_capacity
from moe_ops.dispatchers.all_to_all import AllToAllState, combine_all_to_all, dispatch_all_to_all
from moe_ops.dispatchers.fixed_capacity import FixedCapacityState, combine_fixed_capacity, dispatch_fixed_capacity
from moe_ops.dispatchers.local import LocalDispatch, combine_local, dispatch_local
from moe_ops.groups import Group
from moe_ops.types import Dispatch


class Exchange(NamedTuple):
    """How one kind of dispatch brings rows to the ranks of their experts, and results back. Each issues its collective and
    returns what waits for it.

    Attributes:
        dispatch: takes hidden states, ids, weights and perhaps scales ``[N, ...]``, the experts of each rank, the capacity, and
            the name and the size of the EP group. Returns the rows received, and a state.
        combine: takes shares ``[R, H]`` of these rows, the state, and the group. Returns ``[N, H]``.
    """

    dispatch: Callable[[Sequence[torch.Tensor], int, int | None, str, int], Wait[tuple[list[torch.Tensor], Any]]]
    combine: Callable[[torch.Tensor, Any, str, int], Wait[torch.Tensor]]


EXCHANGES = {
    Dispatch.ALL_TO_ALL: Exchange(all_to_all.dispatch, all_to_all.combine),
    Dispatch.FIXED_CAPACITY: Exchange(fixed_capacity.dispatch, fixed_capacity.combine),
}
"""LOCAL exchanges nothing."""


class Dispatched(NamedTuple):
    """Rows for this rank's experts, grouped by expert.

    Attributes:
        local: the rows, their scales, the counts for each expert, and where each row came from.
        exchange: what sends the results back to other ranks; None where all rows were here. That of FIXED_CAPACITY holds
            ``num_dropped``.
    """

    local: LocalDispatch
    exchange: AllToAllState | FixedCapacityState | None


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
        capacity: FIXED_CAPACITY: rows that each rank sends to each rank, the same on all of them. Rows beyond it are dropped,
            last first, and counted in ``exchange.num_dropped``. None are if it is at least the rows of the rank that has most.
        scale: the scales of quantised hidden states.

    Raises:
        ValueError: FIXED_CAPACITY without a capacity, or another kind with one.
        NotCapturableError: ALL_TO_ALL while a graph of the device is being captured.

    Example::

        dispatched = dispatch(x, ids, weights, kind=mo.Dispatch.ALL_TO_ALL, num_local_experts=8, ep=groups.ep)
        y = run_experts(dispatched.local.rows, dispatched.local.counts, experts)
        output = combine(y, dispatched, ep=groups.ep)
    """
    check_choice("dispatch", "kind", kind, Dispatch)
    if (kind is Dispatch.FIXED_CAPACITY) != (capacity is not None):
        raise ValueError(f"dispatch: capacity must be given with FIXED_CAPACITY and with no other, got {capacity}")
    tensors = [hidden_states, topk_ids, topk_weights, *([] if scale is None else [scale])]
    exchange: AllToAllState | FixedCapacityState | None = None
    if kind is Dispatch.ALL_TO_ALL:
        tensors, *state = dispatch_all_to_all(tensors, num_local_experts, ep.name, ep.size)
        exchange = AllToAllState(*state)
    elif capacity is not None:
        tensors, *state = dispatch_fixed_capacity(tensors, num_local_experts, capacity, ep.name, ep.size)
        exchange = FixedCapacityState(*state)
    local = dispatch_local(
        *tensors[:3],
        first_expert=ep.rank * num_local_experts,
        num_local_experts=num_local_experts,
        scale=None if scale is None else tensors[3],
    )
    return Dispatched(local, exchange)


def combine(
    expert_rows: torch.Tensor, dispatched: Dispatched, *, ep: Group, weights_on_input: bool = False
) -> torch.Tensor:
    """Weigh and sum what the experts made of the rows, where the rows came from. One all-to-all over `ep` if they were sent.

    Sums are in float32 and in a fixed order; a rank's share travels in the dtype of `expert_rows`.

    Args:
        expert_rows: ``[R, H]``, in the order of ``dispatched.local.rows``.
        dispatched: what `dispatch` returned.
        ep: the group that dispatch had.
        weights_on_input: whether the weights went into the experts' input already.

    Returns:
        ``[N, H]``: complete after an exchange, else the share of this rank's experts.

    Example::

        dispatched = dispatch(x, ids, weights, kind=mo.Dispatch.LOCAL, num_local_experts=8, ep=mo.Group.single())
        y = combine(dispatched.local.rows, dispatched, ep=mo.Group.single())  # experts that change nothing
    """
    local, exchange = dispatched
    output = combine_local(expert_rows, local.state, weights_on_input=weights_on_input)
    if isinstance(exchange, AllToAllState):
        output = combine_all_to_all(output, *exchange, ep.name, ep.size)
    elif isinstance(exchange, FixedCapacityState):
        output = combine_fixed_capacity(output, exchange.positions, ep.name, ep.size)
    return output
