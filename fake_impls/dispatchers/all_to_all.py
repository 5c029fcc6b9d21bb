"""Shapes of the exchange between ranks, ragged or of a fixed capacity.

N rows of this rank, K top-k, H hidden, W ranks, C capacity, S rows to send, R rows received, B bytes of a packed row.
"""

from collections.abc import Sequence

import torch

from fake_impls.checks import check_dim, check_dtype, check_equal, check_same_rows
from fake_impls.collectives import row_bytes
from fake_impls.route import IDS


def plan_copies(
    topk_ids: torch.Tensor, num_local_experts: int, size: int, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``int [N, K] -> int64 [N, W], int64 [W]``."""
    check_plan(topk_ids, num_local_experts)
    return topk_ids.new_empty(topk_ids.shape[0], size, dtype=torch.int64), topk_ids.new_empty(size, dtype=torch.int64)


def pack_copies(
    tensors: Sequence[torch.Tensor], positions: torch.Tensor, rows: int, fill: Sequence[int]
) -> torch.Tensor:
    """``[N, ...] each, int64 [N, W] -> uint8 [rows, B]``."""
    check_copies(tensors, positions)
    return positions.new_empty(rows, sum(row_bytes(tensor) for tensor in tensors), dtype=torch.uint8)


def dispatch_all_to_all(
    tensors: Sequence[torch.Tensor],
    topk_ids: torch.Tensor,
    fill: Sequence[int],
    num_local_experts: int,
    group: str,
    size: int,
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.SymInt], list[torch.SymInt]]:
    """``[N, ...] each, int [N, K] -> [R, ...] each, int64 [N, W], SymInt[W], SymInt[W]``.

    R is what the other ranks send: the one number that the arguments do not tell, a new symbol for each source.
    """
    check_plan(topk_ids, num_local_experts)
    context = torch.library.get_ctx()
    send_splits = [context.new_dynamic_size() for _ in range(size)]
    receive_splits = [context.new_dynamic_size() for _ in range(size)]
    received = torch.sym_sum(receive_splits)
    positions = topk_ids.new_empty(topk_ids.shape[0], size, dtype=torch.int64)
    rows = [tensor.new_empty(received, *tensor.shape[1:]) for tensor in tensors]
    return rows, positions, send_splits, receive_splits


def combine_all_to_all(
    rows: torch.Tensor,
    positions: torch.Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: str,
    size: int,
) -> torch.Tensor:
    """``[R, H], int64 [N, W] -> [N, H]``."""
    check_splits(rows, positions, send_splits, receive_splits, size)
    return rows.new_empty(positions.shape[0], rows.shape[1])


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
    check_plan(topk_ids, num_local_experts)
    positions = topk_ids.new_empty(topk_ids.shape[0], size, dtype=torch.int64)
    received = [tensor.new_empty(size * capacity, *tensor.shape[1:]) for tensor in tensors]
    return received, positions, topk_ids.new_empty((), dtype=torch.int64)


def combine_fixed_capacity(rows: torch.Tensor, positions: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """``[W * C, H], int64 [N, W] -> [N, H]``."""
    check_dim("combine", "rows", rows, 2)
    check_dim("combine", "positions", positions, 2)
    return rows.new_empty(positions.shape[0], rows.shape[1])


def check_plan(topk_ids: torch.Tensor, num_local_experts: int) -> None:
    """Ids, and experts on each rank."""
    check_dim("dispatch", "topk_ids", topk_ids, 2)
    check_dtype("dispatch", "topk_ids", topk_ids, IDS)
    if num_local_experts < 1:
        raise ValueError(f"dispatch: num_local_experts must be at least 1, got {num_local_experts}")


def check_copies(tensors: Sequence[torch.Tensor], positions: torch.Tensor) -> None:
    """Rows with as many lists of places."""
    check_dim("dispatch", "positions", positions, 2)
    for tensor in tensors:
        check_same_rows("dispatch", "topk_ids", positions, "hidden_states", tensor)


def check_splits(
    rows: torch.Tensor, positions: torch.Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], size: int
) -> None:
    """All rows that dispatch received, and how many came from and go to each rank."""
    check_dim("combine", "rows", rows, 2)
    check_dim("combine", "positions", positions, 2)
    if len(send_splits) != size or len(receive_splits) != size:
        raise ValueError(
            f"combine: splits must hold {size} counts, got {len(send_splits)} to send and {len(receive_splits)} to receive"
        )
    received = torch.sym_sum(list(receive_splits))
    check_equal("combine", "rows", rows.shape[0], received, "those that dispatch returned")
