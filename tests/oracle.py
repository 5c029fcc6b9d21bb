"""The MoE layer, dense, in float64 on one process: it shares no code with the library.

T tokens, E experts, H hidden, I intermediate.
"""

from itertools import product

import torch

import moe_ops as mo


def dense_weights(
    logits_TE: torch.Tensor,
    routing: mo.Routing,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[C, T, E]``: the weight of every expert for every token, 0 for those that are not chosen, apart for each choice that is
    given, since one expert may be chosen twice. Ties go to the lowest id."""
    if topk_ids is not None and topk_weights is not None:
        return spread(topk_weights.double(), topk_ids, logits_TE.shape[1])
    x = logits_TE.double()
    if routing.scoring == "softmax":
        scores_TE = x.exp() / x.exp().sum(1, keepdim=True)
    else:
        scores_TE = 1 / (1 + (-x).exp()) if routing.scoring == "sigmoid" else (1 + x.exp()).log().sqrt()
    if topk_ids is not None:
        chosen_CTE = spread(torch.ones(topk_ids.shape, dtype=torch.float64), topk_ids, logits_TE.shape[1]) > 0
    else:
        bias = routing.e_score_correction_bias
        choice_TE = scores_TE if bias is None else scores_TE + bias.double()
        if routing.num_expert_group is not None and routing.topk_group is not None:
            groups = choice_TE.chunk(routing.num_expert_group, dim=1)
            best = [group.sort(dim=1).values[:, -1 if bias is None else -2 :].sum(1) for group in groups]
            is_best = first_of(torch.stack(best, dim=1), routing.topk_group).repeat_interleave(
                groups[0].shape[1], dim=1
            )
            choice_TE = torch.where(is_best, choice_TE, -torch.inf)
        chosen_CTE = first_of(choice_TE, routing.top_k).unsqueeze(0)
    weights_CTE = torch.where(chosen_CTE, scores_TE, 0.0)
    if routing.renormalize:
        weights_CTE = weights_CTE / weights_CTE.sum((0, 2)).clamp(min=1e-300).unsqueeze(1)
    return weights_CTE * routing.routed_scaling_factor


def spread(weights_TK: torch.Tensor, topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """``[T, K] -> [K, T, E]``: what is no expert's id counts nowhere."""
    is_chosen_TKE = topk_ids.unsqueeze(2) == torch.arange(num_experts)
    return torch.where(is_chosen_TKE, weights_TK.unsqueeze(2), 0.0).transpose(0, 1)


def first_of(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Which are the `count` largest of each row: fewer than `count` are larger, or as large and come before."""
    larger = scores.unsqueeze(1) > scores.unsqueeze(2)
    before = torch.ones(scores.shape[1], scores.shape[1]).tril(-1).bool()
    equal_before = (scores.unsqueeze(1) == scores.unsqueeze(2)) & before
    return (larger | equal_before).sum(2) < count


def mlp(x_TH: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, activation: str, b13: float | torch.Tensor = 0.0):
    """One gated MLP, in float64; without the output's bias."""
    gated = x_TH.double() @ w13.double().T + b13
    if activation == "swigluoai":
        gate, up = gated[:, 0::2].clamp(max=7), gated[:, 1::2].clamp(-7, 7)
        return (gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)) @ w2.double().T
    gate, up = gated.tensor_split(2, dim=1)
    if activation == "silu":
        active = gate / (1 + torch.exp(-gate))
    elif activation == "gelu":
        active = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    elif activation == "gelu_tanh":
        active = gate * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    else:
        raise ValueError(f"oracle: there is no activation {activation!r}")
    return (active * up) @ w2.double().T


def dense_moe(
    hidden_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    experts: mo.ExpertWeights,
    routing: mo.Routing,
    *,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    shared: mo.SharedExperts | None = None,
) -> torch.Tensor:
    """Every expert computes every token; the dense weights select."""
    weights_CTE = dense_weights(logits_TE, routing, topk_ids, topk_weights)
    total_TH = torch.zeros(hidden_TH.shape, dtype=torch.float64)
    for expert, weight_T in ((e, weights_CTE[c, :, e]) for c, e in product(*map(range, weights_CTE.shape[::2]))):
        is_chosen_T1 = (weight_T != 0).unsqueeze(1)
        x_TH = hidden_TH.double()
        if routing.apply_router_weight_on_input:
            x_TH, weight_T = x_TH * weight_T.unsqueeze(1), torch.ones_like(weight_T)
        b13 = 0.0 if experts.w13_bias is None else experts.w13_bias[expert].double()
        b2 = 0.0 if experts.w2_bias is None else experts.w2_bias[expert].double()
        y_TH = mlp(x_TH, experts.w13[expert], experts.w2[expert], experts.activation, b13) + b2
        total_TH += torch.where(is_chosen_T1, y_TH * weight_T.unsqueeze(1), 0.0)
    if shared is not None:
        y_TH = mlp(hidden_TH, shared.w13, shared.w2, shared.activation)
        total_TH += (
            y_TH if shared.gate is None else y_TH / (1 + torch.exp(-hidden_TH.double() @ shared.gate.double().T))
        )
    return total_TH
