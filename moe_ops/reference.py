"""The stage on one process, plain and slow: the executable specification. It shares no code with the ops."""

import torch

from moe_ops.types import ExpertWeights, Routing


def route(router_logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float64 ``[T, K]`` and ids int64 ``[T, K]`` by softmax score, ties to the lowest id."""
    scores = torch.softmax(router_logits.double(), dim=-1)
    order = sorted_ids(scores)[:, : routing.top_k]
    weights = scores.gather(1, order)
    if routing.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, order


def sorted_ids(scores: torch.Tensor) -> torch.Tensor:
    """Ids by descending score; among equal scores the lowest id first."""
    rows = [sorted(range(scores.shape[1]), key=lambda expert: (-row[expert], expert)) for row in scores.tolist()]
    return torch.tensor(rows, dtype=torch.int64).reshape(scores.shape)


def moe_stage(
    hidden_states: torch.Tensor, router_logits: torch.Tensor, all_experts: ExpertWeights, *, routing: Routing
) -> torch.Tensor:
    """The weighted sum of each token's experts, in float64, one token and one expert at a time.

    Args:
        hidden_states: ``[T, H]``.
        router_logits: ``[T, E]``.
        all_experts: the weights of all E experts.
        routing: how experts are chosen.

    Returns:
        ``[T, H]`` of the dtype of `hidden_states`.
    """
    weights, ids = route(router_logits, routing)
    output = torch.zeros(hidden_states.shape, dtype=torch.float64)
    for token in range(hidden_states.shape[0]):
        x = hidden_states[token].double()
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            gate, up = (all_experts.w13[expert].double() @ x).chunk(2)
            output[token] += weight * (all_experts.w2[expert].double() @ (gate * torch.sigmoid(gate) * up))
    return output.to(hidden_states.dtype)
