"""Shapes of copies of rows for other ranks. N rows of this rank, K top-k, W ranks, B bytes of a packed row."""

from collections.abc import Sequence

import torch

from fake_impls.checks import check_dim, check_dtype, check_same_rows
from fake_impls.packing import row_bytes
from fake_impls.route import IDS


def plan_copies(
    topk_ids: torch.Tensor, num_local_experts: int, size: int, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``int [N, K] -> int64 [N, W], int64 [W]``."""
    return topk_ids.new_empty(topk_ids.shape[0], size, dtype=torch.int64), topk_ids.new_empty(size, dtype=torch.int64)


def check_plan_copies(
    topk_ids: torch.Tensor, num_local_experts: int, size: int = 1, capacity: int | None = None
) -> None:
    check_dim("dispatch", "topk_ids", topk_ids, 2)
    check_dtype("dispatch", "topk_ids", topk_ids, IDS)
    if num_local_experts < 1:
        raise ValueError(f"dispatch: num_local_experts must be at least 1, got {num_local_experts}")
    if isinstance(capacity, int) and capacity < 0:
        raise ValueError(f"dispatch: capacity must not be negative, got {capacity}")


def pack_copies(
    tensors: Sequence[torch.Tensor], positions: torch.Tensor, rows: int, fill: Sequence[int]
) -> torch.Tensor:
    """``[N, ...] each, int64 [N, W] -> uint8 [rows, B]``."""
    return positions.new_empty(rows, sum(row_bytes(tensor) for tensor in tensors), dtype=torch.uint8)


def check_pack_copies(tensors: Sequence[torch.Tensor], positions: torch.Tensor, *_: object) -> None:
    check_dim("dispatch", "positions", positions, 2)
    for tensor in tensors:
        check_same_rows("dispatch", "topk_ids", positions, "hidden_states", tensor)


def check_payload(tensors: Sequence[torch.Tensor]) -> None:
    """What is dispatched."""
    if not 3 <= len(tensors) <= 4:
        raise ValueError(
            f"dispatch: tensors must be hidden states, ids, weights and perhaps scales, got {len(tensors)} tensors"
        )
