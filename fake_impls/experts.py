"""Shapes of the grouped experts. R rows grouped by expert, E experts of this rank, H hidden, I intermediate, N outputs."""

import torch

from fake_impls.checks import FLOATS, check_dim, check_dtype, check_same_rows


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of summands: a summand may be beyond float16 where the sum is not."""
    return torch.float32 if dtype is torch.float16 else dtype


def grouped_linear(
    rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``[R, H], int64 [E], [E, N, H], [E, N]? -> [R, N]``."""
    return rows.new_empty(rows.shape[0], weight.shape[1])


def check_grouped_linear(
    rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    check_dim("experts", "rows", rows, 2)
    check_dtype("experts", "rows", rows, FLOATS)
    check_dtype("experts", "counts", counts, (torch.int64,))
    check_dim("experts", "weight", weight, 3)
    check_dtype("experts", "weight", weight, (rows.dtype, *((torch.float16,) if rows.dtype is torch.float32 else ())))
    num_experts, outputs, inputs = weight.shape
    if inputs != rows.shape[1] or counts.shape != (num_experts,):
        raise ValueError(
            f"experts: weight must be [E, N, {rows.shape[1]}] and counts [E], got {tuple(weight.shape)} and "
            f"{tuple(counts.shape)}"
        )
    if bias is not None and (bias.shape != (num_experts, outputs) or bias.dtype != rows.dtype):
        raise ValueError(
            f"experts: bias must be {rows.dtype} [{num_experts}, {outputs}], got {bias.dtype} {tuple(bias.shape)}"
        )


def grouped_outer(a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``[R, N], [R, H], int64 [E] -> [E, N, H]``: the sum of ``outer(a[r], b[r])`` over the rows of each group."""
    return a.new_empty(counts.shape[0], a.shape[1], b.shape[1])


def check_grouped_outer(a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> None:
    check_dim("grouped_outer", "a", a, 2)
    check_dim("grouped_outer", "b", b, 2)
    check_dtype("grouped_outer", "a", a, FLOATS)
    check_dtype("grouped_outer", "b", b, (a.dtype,))
    check_dtype("grouped_outer", "counts", counts, (torch.int64,))
    check_same_rows("grouped_outer", "b", b, "a", a)


def sum_groups(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``[R, N], int64 [E] -> [E, N]``: the sum of the rows of each group."""
    return x.new_empty(counts.shape[0], x.shape[1])


def check_sum_groups(x: torch.Tensor, counts: torch.Tensor) -> None:
    check_dim("sum_groups", "x", x, 2)
    check_dtype("sum_groups", "x", x, FLOATS)
    check_dtype("sum_groups", "counts", counts, (torch.int64,))


def check_experts(counts: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> None:
    """Two matrices for each count, of which the first gives a gate and an up row for each input of the second."""
    check_dim("experts", "w13", w13, 3)
    check_dim("experts", "w2", w2, 3)
    if counts.dim() != 1 or w13.shape[0] != counts.shape[0] or w2.shape[0] != counts.shape[0]:
        raise ValueError(
            f"experts: w13, w2 and counts must be of as many experts, got {tuple(w13.shape)}, {tuple(w2.shape)} and "
            f"{tuple(counts.shape)}"
        )
    if w13.shape[1] % 2:
        raise ValueError(f"experts: w13 must have a gate and an up row for each input of w2, got {w13.shape[1]} rows")
