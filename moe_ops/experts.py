"""The experts: a gated MLP for each group of rows. R rows, E experts of this rank, H hidden, I intermediate."""

import torch
import torch.nn.functional as F

from fake_impls import experts as shapes
from moe_ops._library import define
from moe_ops.types import ExpertWeights

ALIGNMENT = 16  # bytes; F.grouped_mm rejects rows that are no multiple of it


def _grouped_linear(x_RK: torch.Tensor, weight_ENK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` of each group of rows. Rows past the last end are uninitialised."""
    missing = -x_RK.shape[1] % (ALIGNMENT // x_RK.element_size())
    if missing:
        x_RK, weight_ENK = F.pad(x_RK, (0, missing)), F.pad(weight_ENK, (0, missing))
    return F.grouped_mm(x_RK.contiguous(), weight_ENK.transpose(1, 2), offs=ends_E)


def _grouped_experts(rows: torch.Tensor, counts: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    shapes.check_experts(rows, counts, w13, w2)
    ends_E = counts.cumsum(0, dtype=torch.int32)
    gate_RI, up_RI = _grouped_linear(rows, w13, ends_E).chunk(2, dim=-1)
    down_RH = _grouped_linear(F.silu(gate_RI) * up_RI, w2, ends_E)
    is_filled_R = torch.arange(rows.shape[0], device=rows.device) < ends_E[-1:]
    return torch.where(is_filled_R.unsqueeze(1), down_RH, 0)


# One node of ours, because the Meta of F.grouped_mm rejects float32 on CPU: fullgraph fails on the aten op itself.
grouped_experts = define(
    "grouped_experts(Tensor rows, Tensor counts, Tensor w13, Tensor w2) -> Tensor",
    kernel=_grouped_experts,
    fake=shapes.grouped_experts,
)


def run_experts(rows: torch.Tensor, counts: torch.Tensor, experts: ExpertWeights) -> torch.Tensor:
    """``w2 @ (silu(gate) * up)`` of each row, with the weights of its group's expert.

    Args:
        rows: ``[R, H]`` float32, bfloat16 or float16, grouped by expert; rows past the last group may hold anything.
        counts: int64 ``[E]``, rows of each group, on the device of the rows.
        experts: w13 ``[E, 2 * I, H]``, w2 ``[E, H, I]``, of the dtype of the rows.

    Returns:
        ``[R, H]``, zero past the last group.

    Raises:
        ValueError: shapes do not fit each other.
        TypeError: a dtype is not supported, or differs from that of the rows.

    Source: SwiGLU, `arXiv:2002.05202 <https://arxiv.org/abs/2002.05202>`_, equation 6.
    """
    output: torch.Tensor = grouped_experts(rows, counts, experts.w13, experts.w2)
    return output
