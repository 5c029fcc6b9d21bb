"""Shapes of the local dispatch. N rows, K top-k, H hidden, E experts of this rank, R = N * K rows for the experts."""

from collections.abc import Sequence

import torch

from fake_impls.checks import check_dim, check_dtype, check_equal, check_same_rows
from fake_impls.route import IDS


def permute_by_expert(
    tensors: Sequence[torch.Tensor], topk_ids: torch.Tensor, first_expert: int, num_local_experts: int
) -> list[torch.Tensor]:
    """``[N, ...] each, int [N, K] -> [R, ...] each, then int64 [E] and int64 [N, K]``."""
    num_rows, top_k = topk_ids.shape
    return [
        *(tensor.new_empty(num_rows * top_k, *tensor.shape[1:]) for tensor in tensors),
        topk_ids.new_empty(num_local_experts, dtype=torch.int64),
        topk_ids.new_empty(num_rows, top_k, dtype=torch.int64),
    ]


def check_permute_by_expert(
    tensors: Sequence[torch.Tensor], topk_ids: torch.Tensor, first_expert: int, num_local_experts: int
) -> None:
    check_dim("dispatch", "topk_ids", topk_ids, 2)
    check_dtype("dispatch", "topk_ids", topk_ids, IDS)
    for tensor in tensors:
        check_same_rows("dispatch", "topk_ids", topk_ids, "hidden_states", tensor)
    if num_local_experts < 1:
        raise ValueError(f"dispatch: num_local_experts must be at least 1, got {num_local_experts}")


def unpermute(rows: torch.Tensor, weights: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
    """``[R, H], float32 [N, K]?, int64 [N, K] -> [N, H]``."""
    return rows.new_empty(positions.shape[0], rows.shape[1])


def check_unpermute(rows: torch.Tensor, weights: torch.Tensor | None, positions: torch.Tensor) -> None:
    check_dim("combine", "rows", rows, 2)
    check_dim("combine", "positions", positions, 2)
    check_dtype("combine", "positions", positions, (torch.int64,))
    if weights is not None:
        check_dim("combine", "weights", weights, 2)
        check_dtype("combine", "weights", weights, (torch.float32,))
        check_same_rows("combine", "weights", weights, "positions", positions)
        check_equal("combine", "columns of weights", weights.shape[1], positions.shape[1], "those of positions")


def weigh_rows(rows: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``[R, H], float32 [N, K], int64 [N, K] -> [R, H]``."""
    return rows.new_empty(rows.shape)


def spread_rows(x: torch.Tensor, positions: torch.Tensor, rows: int) -> torch.Tensor:
    """``[N, H], int64 [N, K] -> [rows, H]``: row `i` where each of its choices went, zero where none did."""
    return x.new_empty(rows, x.shape[1])


def check_spread_rows(x: torch.Tensor, positions: torch.Tensor, rows: int) -> None:
    check_dim("spread_rows", "x", x, 2)
    check_dim("spread_rows", "positions", positions, 2)
    check_dtype("spread_rows", "positions", positions, (torch.int64,))
    check_same_rows("spread_rows", "positions", positions, "x", x)


def dot_rows(a: torch.Tensor, b: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``[R, H], [R, H], int64 [N, K] -> float32 [N, K]``: the dot product of the rows of each choice, 0 without one."""
    return a.new_empty(positions.shape, dtype=torch.float32)


def check_dot_rows(a: torch.Tensor, b: torch.Tensor, positions: torch.Tensor) -> None:
    check_dim("dot_rows", "a", a, 2)
    check_dim("dot_rows", "b", b, 2)
    check_dim("dot_rows", "positions", positions, 2)
    check_dtype("dot_rows", "positions", positions, (torch.int64,))
    check_same_rows("dot_rows", "b", b, "a", a)
    check_equal("dot_rows", "columns of b", b.shape[1], a.shape[1], "those of a")
