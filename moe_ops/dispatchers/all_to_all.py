"""Ragged all-to-all: every rank sends just the rows that have an expert elsewhere, one copy for each rank.

N rows of this rank, K top-k, H hidden, E experts of a rank, W ranks of EP, R rows received.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fake_impls.dispatchers import all_to_all as shapes
from fake_impls.layout import total
from moe_ops._library import define, needs_gradient
from moe_ops.collectives import all_to_all, c10d, start_exchange, unpack_rows
from moe_ops.dispatchers.copies import FILL, pack_copies, plan_copies, start_send_copies
from moe_ops.dispatchers.local import LocalDispatch, combine_local, dispatch_local, unpermute
from moe_ops.groups import Group, check_group
from moe_ops.overlap import Finish


class NotCapturableError(RuntimeError):
    """An op that reads a size on the host was called while a device graph was captured."""


class AllToAllState(NamedTuple):
    """What combine needs of dispatch.

    Attributes:
        positions: int64 ``[N, W]``, which of the rows sent is the copy for each rank; -1 where there is none.
        send_splits: rows sent to each rank.
        receive_splits: rows received from each rank.
    """

    positions: torch.Tensor
    send_splits: Sequence[int]
    receive_splits: Sequence[int]


def _dispatch(
    tensors: Sequence[torch.Tensor],
    topk_ids: torch.Tensor,
    fill: Sequence[int],
    num_local_experts: int,
    group: str,
    size: int,
) -> tuple[list[torch.Tensor], torch.Tensor, list[int], list[int]]:
    positions, send_splits, receive_splits = _plan(topk_ids, num_local_experts, group, size)
    splits = send_splits, receive_splits
    received = start_send_copies(tensors, positions, fill, total(send_splits), splits, group)()
    return received, positions, send_splits, receive_splits


def _start_dispatch(
    tensors: Sequence[torch.Tensor],
    topk_ids: torch.Tensor,
    fill: Sequence[int],
    num_local_experts: int,
    group: str,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    positions, send_splits, receive_splits = _plan(topk_ids, num_local_experts, group, size)
    packed_SB = pack_copies(tensors, positions, total(send_splits), fill)
    in_flight_RB = c10d.all_to_all_single(packed_SB, receive_splits, send_splits, group)
    return in_flight_RB, positions, send_splits, receive_splits


def _plan(
    topk_ids: torch.Tensor, num_local_experts: int, group: str, size: int
) -> tuple[torch.Tensor, list[int], list[int]]:
    """Where the copies go, and how many rows each rank sends to each, by an all-to-all of the counts."""
    check_group("dispatch", "ep", group, size)
    _check_not_capturing(topk_ids)
    positions, counts_W = plan_copies(topk_ids, num_local_experts, size, None)
    splits = torch.stack((counts_W, all_to_all(counts_W, size, group))).flatten().tolist()  # the one host read
    for split in splits:
        if isinstance(split, torch.SymInt):
            torch._check(split >= 0)
    return positions, splits[:size], splits[size:]


def _combine(
    rows: torch.Tensor,
    positions: torch.Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: str,
    size: int,
) -> torch.Tensor:
    check_group("combine", "ep", group, size)
    return _start_combine(rows, positions, send_splits, receive_splits, group, size)()


def _start_combine(
    rows: torch.Tensor,
    positions: torch.Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: str,
    size: int,
) -> Finish[torch.Tensor]:
    shapes.check_splits(rows, positions, send_splits, receive_splits, size)
    wait = start_exchange(rows, send_splits, receive_splits, group)
    return lambda: unpermute(wait(), None, positions)


def _check_not_capturing(x: torch.Tensor) -> None:
    if x.device.type in ("cpu", "meta"):
        return
    is_capturing = getattr(torch.get_device_module(x.device), "is_current_stream_capturing", None)
    if is_capturing is not None and is_capturing():
        raise NotCapturableError(
            "dispatch: ALL_TO_ALL reads its split sizes on the host and cannot be captured; FIXED_CAPACITY can"
        )


dispatch_op = define(
    "dispatch_all_to_all(Tensor[] tensors, Tensor topk_ids, int[] fill, int num_local_experts, str group, int size)"
    " -> (Tensor[], Tensor, SymInt[], SymInt[])",
    composite=_dispatch,
)
start_dispatch_op = define(
    "start_dispatch_all_to_all(Tensor[] tensors, Tensor topk_ids, int[] fill, int num_local_experts, str group, int size)"
    " -> (Tensor, Tensor, SymInt[], SymInt[])",
    composite=_start_dispatch,
)
combine_op = define(
    "combine_all_to_all(Tensor rows, Tensor positions, SymInt[] send_splits, SymInt[] receive_splits, str group,"
    " int size) -> Tensor",
    composite=_combine,
)


def dispatch_all_to_all(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    num_local_experts: int,
    ep: Group,
    scale: torch.Tensor | None = None,
) -> tuple[LocalDispatch, AllToAllState]:
    """Send each row once to each rank that has an expert of it, and group what arrives by local expert.

    Two collectives over `ep`: the counts (8 bytes a rank), then hidden states, ids, weights and scales packed. The number of
    rows is read on the host, so this cannot be captured in a device graph; compilers trace it into one graph.

    Args:
        hidden_states: ``[N, H]``, quantised or not.
        topk_ids: int32 or int64 ``[N, K]``; -1 goes nowhere.
        topk_weights: float32 ``[N, K]``.
        num_local_experts: experts of each rank.
        ep: the EP group.
        scale: the scales of quantised hidden states.

    Raises:
        NotCapturableError: a graph of the device is being captured.
    """
    tensors = [hidden_states, topk_ids, topk_weights, *([] if scale is None else [scale])]
    fill = FILL[: len(tensors)]
    received, positions, *splits = dispatch_op(tensors, topk_ids, fill, num_local_experts, ep.name, ep.size)
    return group_received(received, num_local_experts, ep), AllToAllState(positions, *splits)


def start_all_to_all(
    tensors: Sequence[torch.Tensor], *, num_local_experts: int, ep: Group
) -> Finish[tuple[list[torch.Tensor], AllToAllState]]:
    """The exchange of `dispatch_all_to_all`, in flight. Where a gradient is needed, it is waited for at once.

    `tensors` are hidden states, ids, weights and perhaps scales, and so is what arrives.
    """
    fill, arguments = FILL[: len(tensors)], (num_local_experts, ep.name, ep.size)
    if needs_gradient(tensors):
        received, positions, *splits = dispatch_op(tensors, tensors[1], fill, *arguments)
        return lambda: (received, AllToAllState(positions, *splits))
    in_flight, positions, *splits = start_dispatch_op(tensors, tensors[1], fill, *arguments)
    return lambda: (unpack_rows(c10d.wait_tensor(in_flight), tensors), AllToAllState(positions, *splits))


def group_received(received: Sequence[torch.Tensor], num_local_experts: int, ep: Group) -> LocalDispatch:
    """Group rows that arrived with ids, weights and perhaps scales by local expert."""
    hidden, ids, weights, *scale = received
    return dispatch_local(
        hidden,
        ids,
        weights,
        first_expert=ep.rank * num_local_experts,
        num_local_experts=num_local_experts,
        scale=scale[0] if scale else None,
    )


def combine_all_to_all(
    expert_rows: torch.Tensor, dispatched: LocalDispatch, state: AllToAllState, *, ep: Group, is_weighed: bool = False
) -> torch.Tensor:
    """Sum this rank's share of each row, send it back, and sum the shares in rank order. One all-to-all over `ep`.

    Args:
        expert_rows: what the experts made of the rows of the dispatch.
        dispatched: the dispatch.
        state: its state.
        ep: the EP group.
        is_weighed: whether the weights went into the experts' input already.

    Returns:
        ``[N, H]``: complete. Sums are in float32 and in a fixed order; a rank's share travels in the dtype of `expert_rows`.
    """
    shares = combine_local(expert_rows, dispatched.state, is_weighed=is_weighed)
    output: torch.Tensor = combine_op(shares, *state, ep.name, ep.size)
    return output


def start_return_all_to_all(shares: torch.Tensor, state: AllToAllState, *, ep: Group) -> Finish[torch.Tensor]:
    """The exchange of `combine_all_to_all`, in flight."""
    return _start_combine(shares, *state, ep.name, ep.size)
