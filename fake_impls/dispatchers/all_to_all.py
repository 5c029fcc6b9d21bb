"""Shapes of the ragged all-to-all. N rows of this rank, K top-k, H hidden, W ranks, R rows received."""

from collections.abc import Sequence

import torch

from fake_impls.checks import check_dim, check_equal
from fake_impls.dispatchers.copies import check_payload, check_plan_copies
from fake_impls.layout import total


def exchange_counts(
    topk_ids: torch.Tensor, num_local_experts: int, group: str, size: int
) -> tuple[torch.Tensor, list[torch.SymInt], list[torch.SymInt]]:
    """``int [N, K] -> int64 [N, W], SymInt[W], SymInt[W]``.

    What the other ranks send is what no argument tells: a new symbol for each of them.
    """
    context = torch.library.get_ctx()
    send_splits = [context.new_dynamic_size() for _ in range(size)]
    receive_splits = [context.new_dynamic_size() for _ in range(size)]
    return topk_ids.new_empty(topk_ids.shape[0], size, dtype=torch.int64), send_splits, receive_splits


def check_exchange_counts(topk_ids: torch.Tensor, num_local_experts: int, *_: object) -> None:
    check_plan_copies(topk_ids, num_local_experts)


def dispatch_all_to_all(
    tensors: Sequence[torch.Tensor], num_local_experts: int, group: str, size: int
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.SymInt], list[torch.SymInt]]:
    """``[N, ...] each, of which the second are ids [N, K] -> [R, ...] each``, and what `exchange_counts` returns."""
    positions, send_splits, receive_splits = exchange_counts(tensors[1], num_local_experts, group, size)
    received = torch.sym_sum(receive_splits)
    rows = [tensor.new_empty(received, *tensor.shape[1:]) for tensor in tensors]
    return rows, positions, send_splits, receive_splits


def check_dispatch_all_to_all(tensors: Sequence[torch.Tensor], num_local_experts: int, *_: object) -> None:
    check_payload(tensors)
    check_plan_copies(tensors[1], num_local_experts)


def combine_all_to_all(
    rows: torch.Tensor,
    positions: torch.Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: str,
    size: int,
) -> torch.Tensor:
    """``[R, H], int64 [N, W] -> [N, H]``."""
    return rows.new_empty(positions.shape[0], rows.shape[1])


def check_combine_all_to_all(
    rows: torch.Tensor,
    positions: torch.Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: str,
    size: int,
) -> None:
    check_dim("combine", "rows", rows, 2)
    check_dim("combine", "positions", positions, 2)
    if len(send_splits) != size or len(receive_splits) != size:
        raise ValueError(
            f"combine: splits must hold {size} counts, got {len(send_splits)} to send and {len(receive_splits)} to receive"
        )
    check_equal("combine", "rows", rows.shape[0], total(receive_splits), "those that dispatch returned")
