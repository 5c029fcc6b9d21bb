"""Shapes of the ragged all-to-all. N rows of this rank, K top-k, H hidden, W ranks, R rows received."""

from collections.abc import Sequence

import torch

from fake_impls.checks import check_dim, check_equal
from fake_impls.collectives import pack_rows
from fake_impls.dispatchers.copies import check_plan
from fake_impls.layout import total


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
    check_plan(topk_ids, num_local_experts, None)
    context = torch.library.get_ctx()
    send_splits = [context.new_dynamic_size() for _ in range(size)]
    receive_splits = [context.new_dynamic_size() for _ in range(size)]
    received = torch.sym_sum(receive_splits)
    positions = topk_ids.new_empty(topk_ids.shape[0], size, dtype=torch.int64)
    rows = [tensor.new_empty(received, *tensor.shape[1:]) for tensor in tensors]
    return rows, positions, send_splits, receive_splits


def start_dispatch_all_to_all(
    tensors: Sequence[torch.Tensor],
    topk_ids: torch.Tensor,
    fill: Sequence[int],
    num_local_experts: int,
    group: str,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.SymInt], list[torch.SymInt]]:
    """As `dispatch_all_to_all`, but for the rows, which are ``uint8 [R, B]``, packed and still in flight."""
    rows, positions, send, receive = dispatch_all_to_all(tensors, topk_ids, fill, num_local_experts, group, size)
    return pack_rows(rows, rows[0].shape[0], fill), positions, send, receive


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
    received = total(receive_splits)
    check_equal("combine", "rows", rows.shape[0], received, "those that dispatch returned")
