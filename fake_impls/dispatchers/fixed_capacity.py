"""Shapes of the all-to-all of a fixed capacity. N rows of this rank, K top-k, H hidden, W ranks, C capacity."""

from collections.abc import Sequence

import torch

from fake_impls.checks import check_dim, check_multiple
from fake_impls.dispatchers.copies import check_payload, check_plan_copies


def dispatch_fixed_capacity(
    tensors: Sequence[torch.Tensor], num_local_experts: int, capacity: int, group: str, size: int
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """``[N, ...] each, of which the second are ids [N, K] -> [W * C, ...] each, int64 [N, W], int64 []``."""
    positions = tensors[1].new_empty(tensors[1].shape[0], size, dtype=torch.int64)
    received = [tensor.new_empty(size * capacity, *tensor.shape[1:]) for tensor in tensors]
    return received, positions, tensors[1].new_empty((), dtype=torch.int64)


def check_dispatch_fixed_capacity(
    tensors: Sequence[torch.Tensor], num_local_experts: int, capacity: int, group: str, size: int
) -> None:
    check_payload(tensors)
    check_plan_copies(tensors[1], num_local_experts, size, capacity)


def combine_fixed_capacity(rows: torch.Tensor, positions: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """``[W * C, H], int64 [N, W] -> [N, H]``."""
    return rows.new_empty(positions.shape[0], rows.shape[1])


def check_combine_fixed_capacity(rows: torch.Tensor, positions: torch.Tensor, group: str, size: int) -> None:
    check_dim("combine", "rows", rows, 2)
    check_dim("combine", "positions", positions, 2)
    check_multiple("combine", "rows", rows.shape[0], size, "the size of the EP group")
