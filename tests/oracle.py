"""The MoE layer, dense, in float64 on one process: it shares no code with the library.

T tokens, E experts, H hidden, I intermediate.
"""

import torch

import moe_ops as mo


def dense_weights(logits_TE: torch.Tensor, routing: mo.Routing, input_ids: torch.Tensor | None = None) -> torch.Tensor:
    """The weight of every expert for every token, 0 for those that are not chosen. Ties go to the lowest id."""
    x = logits_TE.double()
    if routing.scoring == "softmax":
        scores_TE = x.exp() / x.exp().sum(1, keepdim=True)
    else:
        scores_TE = 1 / (1 + (-x).exp()) if routing.scoring == "sigmoid" else (1 + x.exp()).log().sqrt()
    if routing.token_to_experts is not None and input_ids is not None:
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
        for token, input_id in enumerate(input_ids.tolist()):
            for expert in routing.token_to_experts[input_id].tolist() if input_id >= 0 else []:
                chosen_TE[token, expert] |= expert >= 0
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
        chosen_TE = first_of(choice_TE, routing.top_k)
    weights_TE = torch.where(chosen_TE, scores_TE, 0.0)
    if routing.renormalize:
        weights_TE = weights_TE / weights_TE.sum(1, keepdim=True).clamp(min=1e-300)
    return weights_TE * routing.routed_scaling_factor


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
    else:
        active = gate * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    return (active * up) @ w2.double().T


def dense_moe(
    hidden_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    experts: mo.ExpertWeights,
    routing: mo.Routing,
    *,
    input_ids: torch.Tensor | None = None,
    shared: mo.SharedExperts | None = None,
) -> torch.Tensor:
    """Every expert computes every token; the dense weights select."""
    weights_TE = dense_weights(logits_TE, routing, input_ids)
    total_TH = torch.zeros(hidden_TH.shape, dtype=torch.float64)
    for expert, weight_T in enumerate(weights_TE.unbind(1)):
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
