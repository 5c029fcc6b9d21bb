"""Local dispatch: every row is here already; each rank groups those of its own experts.

N rows, K top-k, H hidden, E experts of this rank, R = N * K rows for the experts.
"""

from typing import NamedTuple

import torch

from fake_impls.dispatchers import local as shapes
from moe_ops._library import define


class LocalDispatch(NamedTuple):
    """Rows grouped by local expert.

    Attributes:
        rows: ``[R, H]``; the first ``counts.sum()`` are those of this rank's experts, in the order of the experts.
        counts: int64 ``[E]``, rows of each local expert.
        positions: int64 ``[N, K]``, where the row of each choice went; -1 where its expert is not here.
    """

    rows: torch.Tensor
    counts: torch.Tensor
    positions: torch.Tensor


def _permute(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, first_expert: int, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes.check_permute(hidden_states, topk_ids, num_local_experts)
    num_rows, top_k = topk_ids.shape
    local_R = topk_ids.to(torch.int64).flatten() - first_expert
    is_local_R = (local_R >= 0) & (local_R < num_local_experts)
    group_R = torch.where(is_local_R, local_R, num_local_experts)  # the last group: experts of other ranks, id -1
    order_R = torch.argsort(group_R, stable=True)
    counts = group_R.new_zeros(num_local_experts + 1).scatter_add_(0, group_R, torch.ones_like(group_R))
    positions_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.shape[0], device=order_R.device))
    positions = torch.where(is_local_R, positions_R, -1).view(num_rows, top_k)
    rows_RH = hidden_states.index_select(0, order_R // top_k)
    return rows_RH, counts[:num_local_experts].clone(), positions


def _unpermute(expert_rows: torch.Tensor, topk_weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    shapes.check_unpermute(expert_rows, topk_weights, positions)
    total_NH = expert_rows.new_zeros(positions.shape[0], expert_rows.shape[1], dtype=torch.float32)
    for weights_N, positions_N in zip(topk_weights.unbind(1), positions.unbind(1), strict=True):  # one fixed order
        rows_NH = expert_rows.index_select(0, positions_N.clamp(min=0)).to(torch.float32)
        weighted_NH = rows_NH * weights_N.unsqueeze(1)
        total_NH += torch.where(positions_N.unsqueeze(1) >= 0, weighted_NH, 0.0)  # other rows may hold NaN
    return total_NH.to(expert_rows.dtype)


permute_by_expert = define(
    "permute_by_expert(Tensor hidden_states, Tensor topk_ids, SymInt first_expert, int num_local_experts)"
    " -> (Tensor, Tensor, Tensor)",
    kernel=_permute,
    fake=shapes.permute_by_expert,
)
unpermute = define(
    "unpermute(Tensor expert_rows, Tensor topk_weights, Tensor positions) -> Tensor",
    kernel=_unpermute,
    fake=shapes.unpermute,
)


def dispatch_local(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, *, first_expert: int, num_local_experts: int
) -> LocalDispatch:
    """Group the rows of this rank's experts, one copy for each choice. Static shapes, no collective, no host sync.

    Args:
        hidden_states: ``[N, H]``.
        topk_ids: int32 or int64 ``[N, K]``, ids of the whole layer; -1, and ids of other ranks' experts, go nowhere.
        first_expert: id of this rank's first expert.
        num_local_experts: experts of this rank.
    """
    return LocalDispatch(*permute_by_expert(hidden_states, topk_ids, first_expert, num_local_experts))


def combine_local(expert_rows: torch.Tensor, topk_weights: torch.Tensor, dispatched: LocalDispatch) -> torch.Tensor:
    """Sum each row's results, weighted, in float32 and in the order of its choices. No collective.

    Args:
        expert_rows: ``[R, H]``, what the experts made of ``dispatched.rows``.
        topk_weights: float32 ``[N, K]``.
        dispatched: what `dispatch_local` returned.

    Returns:
        ``[N, H]`` of the dtype of `expert_rows`: the share of this rank's experts, zero for rows that have none here.
    """
    output: torch.Tensor = unpermute(expert_rows, topk_weights, dispatched.positions)
    return output
