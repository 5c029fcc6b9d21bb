"""Ragged all-to-all: every rank sends just the rows that have an expert elsewhere, one copy for each rank.

N rows of this rank, K top-k, H hidden, W ranks of EP, R rows received.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fake_impls.dispatchers import all_to_all as shapes
from fake_impls.layout import total
from moe_ops._library import Wait, define
from moe_ops.collectives import exchange_rows
from moe_ops.dispatchers.copies import plan_copies, return_copies, send_copies
from moe_ops.groups import check_group


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


def _exchange_counts(
    topk_ids: torch.Tensor, num_local_experts: int, group: str, size: int
) -> tuple[torch.Tensor, list[int], list[int]]:
    """Where the copies go, and how many rows each rank sends to each, by an all-to-all of the counts."""
    check_group("dispatch", "ep", group, size)
    _check_not_capturing(topk_ids)
    positions, counts_W = plan_copies(topk_ids, num_local_experts, size, None)
    splits = torch.stack((counts_W, exchange_rows(counts_W, size, group)())).flatten().tolist()  # the one host read
    for split in splits:
        if isinstance(split, torch.SymInt):
            torch._check(split >= 0)
    return positions, splits[:size], splits[size:]


def _check_not_capturing(x: torch.Tensor) -> None:
    if x.device.type in ("cpu", "meta"):
        return
    is_capturing = getattr(torch.get_device_module(x.device), "is_current_stream_capturing", None)
    if is_capturing is not None and is_capturing():
        raise NotCapturableError(
            "dispatch: ALL_TO_ALL reads its split sizes on the host and cannot be captured; FIXED_CAPACITY can"
        )


exchange_counts = define(
    "exchange_counts(Tensor topk_ids, int num_local_experts, str group, int size) -> (Tensor, SymInt[], SymInt[])",
    composite=_exchange_counts,
    check=shapes.check_exchange_counts,
)


def dispatch(
    tensors: Sequence[torch.Tensor], num_local_experts: int, capacity: int | None, group: str, size: int
) -> Wait[tuple[list[torch.Tensor], AllToAllState]]:
    """Send each row once to each rank that has an expert of it: ``[N, ...] each -> [R, ...] each``.

    Two collectives over `group`: the counts (8 bytes a rank), waited for at once, then all tensors packed. The number of rows
    is read on the host, so this cannot be captured in a device graph; compilers trace it into one graph.

    Raises:
        NotCapturableError: a graph of the device is being captured.
        ValueError: a capacity is given, which this dispatch does not have.
    """
    if capacity is not None:
        raise ValueError(f"dispatch: capacity must be None for ALL_TO_ALL, got {capacity}")
    # Dynamo keeps a host read as one node of the graph; without it a call less.
    count = exchange_counts if torch.compiler.is_dynamo_compiling() else _exchange_counts
    positions, send_splits, receive_splits = count(tensors[1], num_local_experts, group, size)
    wait = send_copies(tensors, positions, total(send_splits), (send_splits, receive_splits), group)
    return lambda: (wait(), AllToAllState(positions, send_splits, receive_splits))


def combine(shares: torch.Tensor, state: AllToAllState, group: str, size: int) -> Wait[torch.Tensor]:
    """Send this rank's shares ``[R, H]`` back and sum those of each row: ``[N, H]``."""
    return return_copies(shares, state.positions, (state.receive_splits, state.send_splits), group, size)


def _dispatch(
    tensors: Sequence[torch.Tensor], num_local_experts: int, group: str, size: int
) -> tuple[list[torch.Tensor], torch.Tensor, Sequence[int], Sequence[int]]:
    rows, state = dispatch(tensors, num_local_experts, None, group, size)()
    return rows, *state


def _combine(
    rows: torch.Tensor,
    positions: torch.Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: str,
    size: int,
) -> torch.Tensor:
    return combine(rows, AllToAllState(positions, send_splits, receive_splits), group, size)()


dispatch_all_to_all = define(
    "dispatch_all_to_all(Tensor[] tensors, int num_local_experts, str group, int size)"
    " -> (Tensor[], Tensor, SymInt[], SymInt[])",
    composite=_dispatch,
    check=shapes.check_dispatch_all_to_all,
)
combine_all_to_all = define(
    "combine_all_to_all(Tensor rows, Tensor positions, SymInt[] send_splits, SymInt[] receive_splits, str group,"
    " int size) -> Tensor",
    composite=_combine,
    check=shapes.check_combine_all_to_all,
)
