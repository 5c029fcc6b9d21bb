"""Shapes of the even all-to-all. N rows of this rank, R rows that every rank pads to, W ranks, K top-k, H hidden."""

import torch

from fake_impls.checks import check_at_most, check_dim, check_equal, check_same_rows
from fake_impls.collectives import gather_rows


def dispatch_all_to_all(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, rows: int, group: str, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[N, H], [N, K], [N, K] -> [W * R, H], [W * R, K], [W * R, K]``."""
    check_dispatch(hidden_states, topk_ids, topk_weights, rows)
    hidden, ids, weights = gather_rows([hidden_states, topk_ids, topk_weights], rows, size)
    return hidden, ids, weights


def combine_all_to_all(hidden_states: torch.Tensor, num_rows: int, rows: int, group: str, size: int) -> torch.Tensor:
    """``[W * R, H] -> [N, H]``."""
    check_combine(hidden_states, num_rows, rows, size)
    return hidden_states.new_empty(num_rows, hidden_states.shape[1])


def check_dispatch(hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, rows: int) -> None:
    """Tokens with as many ids and weights, that fit into the common number of rows."""
    check_dim("dispatch", "hidden_states", hidden_states, 2)
    check_dim("dispatch", "topk_ids", topk_ids, 2)
    check_dim("dispatch", "topk_weights", topk_weights, 2)
    check_same_rows("dispatch", "topk_ids", topk_ids, "hidden_states", hidden_states)
    check_same_rows("dispatch", "topk_weights", topk_weights, "hidden_states", hidden_states)
    check_at_most("dispatch", "rows of hidden_states", hidden_states.shape[0], rows, "rows common to the EP group")


def check_combine(hidden_states: torch.Tensor, num_rows: int, rows: int, size: int) -> None:
    """All rows that dispatch returned."""
    check_dim("combine", "hidden_states", hidden_states, 2)
    check_equal("combine", "rows of hidden_states", hidden_states.shape[0], rows * size, "rows that dispatch returned")
    check_at_most("combine", "num_rows", num_rows, rows, "rows common to the EP group")
