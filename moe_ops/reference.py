"""The stage on one process, plain and slow: the executable specification. It shares no code with the ops."""

import math

import torch

from moe_ops.types import ExpertWeights, Routing, SharedExperts, WeightLayout


def route(logits: torch.Tensor, routing: Routing, input_id: int | None = None) -> dict[int, float]:
    """The experts of one token and their weights. Scores are float32: which of them tie is part of the specification."""
    scores = _scores(logits.to(torch.float32), routing.scoring).tolist()
    if routing.token_to_experts is not None and input_id is not None:
        chosen = routing.token_to_experts[input_id].tolist() if input_id >= 0 else []
    else:
        chosen = _choose(scores, routing)
    chosen = [expert for expert in chosen if expert >= 0]
    total = math.fsum(scores[expert] for expert in chosen) + 1e-20
    weights: dict[int, float] = {}
    for expert in chosen:  # a hash table may choose one twice
        weight = scores[expert] / total if routing.renormalize else scores[expert]
        weights[expert] = weights.get(expert, 0.0) + weight * routing.routed_scaling_factor
    return weights


def _scores(logits: torch.Tensor, scoring: str) -> torch.Tensor:
    if scoring == "softmax":
        return torch.softmax(logits, dim=0)
    if scoring == "sigmoid":
        return torch.sigmoid(logits)
    if scoring == "sqrtsoftplus":
        return torch.nn.functional.softplus(logits).sqrt()
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
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return w2.double() @ (torch.nn.functional.gelu(gate, approximate=approximate) * up)


def moe_stage(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    all_experts: ExpertWeights,
    *,
    routing: Routing,
    input_ids: torch.Tensor | None = None,
    shared_experts: SharedExperts | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, in float64, one token and one expert at a time.

    Args:
        hidden_states: ``[T, H]``.
        router_logits: ``[T, E]``.
        all_experts: the weights of all E experts, not quantised and not packed.
        routing: how experts are chosen. Copies of experts make no difference here.
        input_ids: int ``[T]``, for hash routing.
        shared_experts: all of their weights.

    Returns:
        ``[T, H]`` of the dtype of `hidden_states`.

    Raises:
        ValueError: the experts are packed.
    """
    if all_experts.layout is not WeightLayout.PLAIN:
        raise ValueError(f"reference: all_experts must have WeightLayout.PLAIN, got {all_experts.layout}")
    output = torch.zeros(hidden_states.shape, dtype=torch.float64)
    for token, logits in enumerate(router_logits):
        x = hidden_states[token].double()
        input_id = None if input_ids is None else int(input_ids[token])
        if routing.select_experts is None:
            chosen = list(route(logits, routing, input_id).items())
        else:
            row = slice(token, token + 1)
            ids_of_row = None if input_ids is None else input_ids[row]
            weights, ids = routing.select_experts(hidden_states[row], router_logits[row], ids_of_row)
            chosen = [pair for pair in zip(ids[0].tolist(), weights[0].tolist(), strict=True) if pair[0] >= 0]
        for expert, weight in chosen:
            x_in, weight_out = (x * weight, 1.0) if routing.apply_router_weight_on_input else (x, weight)
            b13 = None if all_experts.w13_bias is None else all_experts.w13_bias[expert]
            y = gated_mlp(x_in, all_experts.w13[expert], all_experts.w2[expert], all_experts.activation, b13)
            if all_experts.w2_bias is not None:
                y = y + all_experts.w2_bias[expert].double()
            output[token] += weight_out * y
        if shared_experts is not None:
            y = gated_mlp(x, shared_experts.w13, shared_experts.w2, shared_experts.activation)
            output[token] += y if shared_experts.gate is None else torch.sigmoid(shared_experts.gate.double() @ x) * y
    return output.to(hidden_states.dtype)
