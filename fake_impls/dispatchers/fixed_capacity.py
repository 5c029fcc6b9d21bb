"""Shapes of the all-to-all of a fixed capacity. N rows of this rank, K top-k, H hidden, W ranks, C capacity."""

from collections.abc import Sequence

import torch

from fake_impls.checks import check_dim, check_multiple
from fake_impls.dispatchers.copies import check_plan


def dispatch_fixed_capacity(
    tensors: Sequence[torch.Tensor],
    topk_ids: torch.Tensor,
    fill: Sequence[int],
    num_local_experts: int,
    capacity: int,
    group: str,
    size: int,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """``[N, ...] each, int [N, K] -> [W * C, ...] each, int64 [N, W], int64 []``."""
    check_plan(topk_ids, num_local_experts, capacity)
    positions = topk_ids.new_empty(topk_ids.shape[0], size, dtype=torch.int64)
    received = [tensor.new_empty(size * capacity, *tensor.shape[1:]) for tensor in tensors]
    return received, positions, topk_ids.new_empty((), dtype=torch.int64)


def combine_fixed_capacity(rows: torch.Tensor, positions: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """``[W * C, H], int64 [N, W] -> [N, H]``."""
    check_combine(rows, positions, size)
    return rows.new_empty(positions.shape[0], rows.shape[1])


def check_combine(rows: torch.Tensor, positions: torch.Tensor, size: int) -> None:
    """As many rows from each rank."""
    check_dim("combine", "rows", rows, 2)
    check_dim("combine", "positions", positions, 2)
    check_multiple("combine", "rows", rows.shape[0], size, "the size of the EP group")
