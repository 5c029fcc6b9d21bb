"""All-to-all of a fixed capacity: every rank sends the same number of rows to each rank, empty ones where it has fewer.

Static shapes and no host read, so it can be captured; this is the contract of MC2. With the worst-case capacity, the rows of a
rank, it sends no less than an all-gather. N rows of this rank, C capacity, W ranks of EP, K top-k, H hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fake_impls.dispatchers import fixed_capacity as shapes
from moe_ops._library import Wait, define
from moe_ops.dispatchers.copies import plan_copies, return_copies, send_copies
from moe_ops.groups import check_group


class FixedCapacityState(NamedTuple):
    """What combine needs of dispatch.

    Attributes:
        positions: int64 ``[N, W]``, which of the places sent holds the copy for each rank; -1 where there is none.
        num_dropped: int64 ``[]``, on the device: copies that found no place.
    """

    positions: torch.Tensor
    num_dropped: torch.Tensor


def dispatch(
    tensors: Sequence[torch.Tensor], num_local_experts: int, capacity: int | None, group: str, size: int
) -> Wait[tuple[list[torch.Tensor], FixedCapacityState]]:
    """Send `capacity` rows to each rank: those that have an expert there, and empty ones. One packed all-to-all over `group`.

    ``[N, ...] each -> [W * C, ...] each``. Rows beyond the capacity are dropped, last first, and counted; the others are not
    touched by it. A capacity of the rows of the rank that has most (worst case: all rows have an expert on one rank) drops
    none.

    Raises:
        ValueError: there is no capacity.
    """
    if capacity is None:
        raise ValueError("dispatch: capacity must be given with FIXED_CAPACITY, got None")
    check_group("dispatch", "ep", group, size)
    positions, counts_W = plan_copies(tensors[1], num_local_experts, size, capacity)
    wait = send_copies(tensors, positions, size * capacity, size, group)
    return lambda: (wait(), FixedCapacityState(positions, (counts_W - capacity).clamp(min=0).sum()))


def combine(shares: torch.Tensor, state: FixedCapacityState, group: str, size: int) -> Wait[torch.Tensor]:
    """Send this rank's shares ``[W * C, H]`` back and sum those of each row: ``[N, H]``."""
    return return_copies(shares, state.positions, size, group, size)


def _dispatch(
    tensors: Sequence[torch.Tensor], num_local_experts: int, capacity: int, group: str, size: int
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    rows, state = dispatch(tensors, num_local_experts, capacity, group, size)()
    return rows, *state


def _combine(rows: torch.Tensor, positions: torch.Tensor, group: str, size: int) -> torch.Tensor:
    return return_copies(rows, positions, size, group, size)()


dispatch_fixed_capacity = define(
    "dispatch_fixed_capacity(Tensor[] tensors, int num_local_experts, SymInt capacity, str group, int size)"
    " -> (Tensor[], Tensor, Tensor)",
    composite=_dispatch,
    check=shapes.check_dispatch_fixed_capacity,
)
combine_fixed_capacity = define(
    "combine_fixed_capacity(Tensor rows, Tensor positions, str group, int size) -> Tensor",
    composite=_combine,
    check=shapes.check_combine_fixed_capacity,
)
