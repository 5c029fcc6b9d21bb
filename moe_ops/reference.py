"""The stage on one process, plain and slow: the executable specification. It shares no code with the ops.

It is differentiable: in hidden states, logits, experts, shared experts, and weights of a choice that is passed.
"""

import math

import torch
import torch.nn.functional as F

from moe_ops.types import ExpertWeights, Routing, SharedExperts, WeightLayout


def route(logits: torch.Tensor, routing: Routing, chosen: list[int] | None = None) -> list[tuple[int, torch.Tensor]]:
    """The experts of one token and their weights in float64; `chosen` are those that somebody else chose.

    Scores are float32: which of them tie is part of the specification.
    """
    scores = _scores(logits.to(torch.float32), routing.scoring)
    if chosen is None:
        chosen = _choose(scores.tolist(), routing)
    chosen = [expert for expert in chosen if 0 <= expert < routing.num_experts]
    weights = scores.double()[chosen]
    if routing.renormalize:
        weights = weights / (weights.sum() + 1e-20)
    return list(zip(chosen, weights * routing.routed_scaling_factor, strict=True))


def _scores(logits: torch.Tensor, scoring: str) -> torch.Tensor:
    """Each logit is scored in a vector of copies of itself: torch rounds the ends of a vector in another way."""
    if scoring == "softmax":
        return torch.softmax(logits, dim=0)
    if scoring == "sigmoid":
        return torch.stack([torch.sigmoid(logit.expand(32))[0] for logit in logits])
    if scoring == "sqrtsoftplus":
        return torch.stack([F.softplus(logit.expand(32))[0].sqrt() for logit in logits])
    raise ValueError(f"reference: scoring must be 'softmax', 'sigmoid' or 'sqrtsoftplus', got {scoring!r}")


def _choose(scores: list[float], routing: Routing) -> list[int]:
    """The best experts of the best groups; among equals those with the lowest ids."""
    bias = [0.0] * len(scores)
    if routing.e_score_correction_bias is not None:
        bias = [float(value) for value in routing.e_score_correction_bias]
    biased = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(scores) // (routing.num_expert_group or 1)
    num_best = 1 if routing.e_score_correction_bias is None else 2

    def value_of_group(group: int) -> float:
        return math.fsum(sorted(biased[group * size : (group + 1) * size])[-num_best:])

    groups = sorted(range(len(scores) // size), key=lambda group: (-value_of_group(group), group))
    allowed = {group * size + i for group in groups[: routing.topk_group or 1] for i in range(size)}
    return sorted(allowed, key=lambda expert: (-biased[expert], expert))[: routing.top_k]


def gated_mlp(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, activation: str, w13_bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``w2 @ (activation(gate) * up)`` of one row, in float64."""
    gated = w13.double() @ x
    if w13_bias is not None:
        gated = gated + w13_bias.double()
    if activation == "swigluoai":
        gate, up = gated[::2].clamp(max=7.0), gated[1::2].clamp(-7.0, 7.0)
        return w2.double() @ (gate * torch.sigmoid(1.702 * gate) * (up + 1))
    gate, up = gated.chunk(2)
    if activation == "silu":
        return w2.double() @ (gate * torch.sigmoid(gate) * up)
    if activation in ("gelu", "gelu_tanh"):
        return w2.double() @ (F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up)
    raise ValueError(f"reference: activation must be one of those of ExpertWeights, got {activation!r}")


def moe_stage(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor | None,
    all_experts: ExpertWeights,
    routing: Routing,
    *,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    shared_experts: SharedExperts | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, in float64, one token and one expert at a time.

    Args:
        hidden_states: ``[T, H]``.
        router_logits: ``[T, E]``; None if `topk_weights` are given.
        all_experts: the weights of all E experts, not quantised and not packed.
        routing: how experts are chosen. Copies of experts make no difference here.
        topk_ids: as in `moe_ops.moe_stage`.
        topk_weights: likewise.
        shared_experts: all of their weights.

    Returns:
        ``[T, H]`` of the dtype of `hidden_states`.

    Raises:
        ValueError: the experts are packed or quantised, an activation or scoring is unknown, or nothing says how experts are
            chosen.

    Example::

        expected = mo.reference.moe_stage(x, x @ gate.T, mo.ExpertWeights(w13, w2), mo.Routing(top_k=2, num_experts=8))
    """
    if all_experts.layout is not WeightLayout.PLAIN:
        raise ValueError(f"reference: all_experts must have WeightLayout.PLAIN, got {all_experts.layout}")
    if all_experts.w13_scale is not None or all_experts.w2_scale is not None:
        raise ValueError("reference: all_experts must not be quantised, got scales; dequantize_weights undoes it")
    if router_logits is None and topk_weights is None:
        raise ValueError("reference: router_logits or topk_weights must be given, got neither")
    if topk_weights is not None and topk_ids is None:
        raise ValueError("reference: topk_ids must be given with topk_weights, got None")
    rows = []
    for token, row in enumerate(hidden_states):
        x, y = row.double(), torch.zeros(row.shape, dtype=torch.float64)
        ids = None if topk_ids is None else topk_ids[token].tolist()
        if topk_weights is not None:
            pairs = zip(ids or [], topk_weights[token].double(), strict=True)
            choices = [(expert, weight) for expert, weight in pairs if 0 <= expert < routing.num_experts]
        elif router_logits is not None:
            choices = route(router_logits[token], routing, ids)
        for expert, weight in choices:
            y = y + _run_expert(x, weight, expert, all_experts, routing.apply_router_weight_on_input)
        if shared_experts is not None:
            shared = gated_mlp(x, shared_experts.w13, shared_experts.w2, shared_experts.activation)
            gate = shared_experts.gate
            y = y + (shared if gate is None else torch.sigmoid(gate.double() @ x) * shared)
        rows.append(y)
    output = torch.stack(rows) if rows else hidden_states.double()
    return output.to(hidden_states.dtype)


def _run_expert(
    x: torch.Tensor, weight: torch.Tensor, expert: int, experts: ExpertWeights, weights_on_input: bool
) -> torch.Tensor:
    b13 = None if experts.w13_bias is None else experts.w13_bias[expert]
    x = x * weight if weights_on_input else x
    y = gated_mlp(x, experts.w13[expert], experts.w2[expert], experts.activation, b13)
    if experts.w2_bias is not None:
        y = y + experts.w2_bias[expert].double()
    return y if weights_on_input else y * weight
