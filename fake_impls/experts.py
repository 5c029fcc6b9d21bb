"""Shapes of the grouped experts. R rows grouped by expert, E experts of this rank, H hidden, I intermediate."""

import torch

from fake_impls.checks import FLOATS, check_dim, check_dtype


def grouped_experts(rows: torch.Tensor, counts: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """``[R, H], int64 [E], [E, 2 * I, H], [E, H, I] -> [R, H]``."""
    check_experts(rows, counts, w13, w2)
    return rows.new_empty(rows.shape)


def check_experts(rows: torch.Tensor, counts: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> None:
    """Weights of as many experts as there are counts, that fit the rows and each other."""
    check_dim("experts", "rows", rows, 2)
    check_dtype("experts", "rows", rows, FLOATS)
    check_dtype("experts", "counts", counts, (torch.int64,))
    check_dtype("experts", "w13", w13, (rows.dtype,))
    check_dtype("experts", "w2", w2, (rows.dtype,))
    check_dim("experts", "w13", w13, 3)
    check_dim("experts", "w2", w2, 3)
    (num_experts, hidden, intermediate), width = w2.shape, rows.shape[1]
    if w13.shape != (num_experts, 2 * intermediate, hidden) or hidden != width or counts.shape != (num_experts,):
        raise ValueError(
            f"experts: w13 must be [E, 2 * I, H], w2 [E, H, I] and counts [E] for rows [R, H], got "
            f"{tuple(w13.shape)}, {tuple(w2.shape)}, {tuple(counts.shape)} and H = {width}"
        )
