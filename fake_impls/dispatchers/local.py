"""Shapes of the local dispatch. N rows, K top-k, H hidden, E experts of this rank, R = N * K rows for the experts."""

import torch

from fake_impls.checks import check_dim, check_dtype, check_equal, check_same_rows


def permute_by_expert(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, first_expert: int, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[N, H], int [N, K] -> [R, H], int64 [E], int64 [N, K]``."""
    check_permute(hidden_states, topk_ids, num_local_experts)
    num_rows, top_k = topk_ids.shape
    return (
        hidden_states.new_empty(num_rows * top_k, hidden_states.shape[1]),
        topk_ids.new_empty(num_local_experts, dtype=torch.int64),
        topk_ids.new_empty(num_rows, top_k, dtype=torch.int64),
    )


def unpermute(expert_rows: torch.Tensor, topk_weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``[R, H], float32 [N, K], int64 [N, K] -> [N, H]``."""
    check_unpermute(expert_rows, topk_weights, positions)
    return expert_rows.new_empty(positions.shape[0], expert_rows.shape[1])


def check_permute(hidden_states: torch.Tensor, topk_ids: torch.Tensor, num_local_experts: int) -> None:
    """Rows with as many lists of expert ids, and an expert to send them to."""
    check_dim("dispatch", "hidden_states", hidden_states, 2)
    check_dim("dispatch", "topk_ids", topk_ids, 2)
    check_dtype("dispatch", "topk_ids", topk_ids, (torch.int32, torch.int64))
    check_same_rows("dispatch", "topk_ids", topk_ids, "hidden_states", hidden_states)
    if num_local_experts < 1:
        raise ValueError(f"dispatch: num_local_experts must be at least 1, got {num_local_experts}")


def check_unpermute(expert_rows: torch.Tensor, topk_weights: torch.Tensor, positions: torch.Tensor) -> None:
    """As many rows, weights and positions as the dispatch returned."""
    check_dim("combine", "expert_rows", expert_rows, 2)
    check_dim("combine", "positions", positions, 2)
    check_dim("combine", "topk_weights", topk_weights, 2)
    check_dtype("combine", "topk_weights", topk_weights, (torch.float32,))
    check_same_rows("combine", "topk_weights", topk_weights, "positions", positions)
    num_rows, top_k = positions.shape
    check_equal("combine", "rows of expert_rows", expert_rows.shape[0], num_rows * top_k, "rows that dispatch returned")
    if topk_weights.shape[1] != top_k:
        raise ValueError(f"combine: topk_weights must have {top_k} columns, as positions, got {topk_weights.shape[1]}")
