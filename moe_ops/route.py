"""Routing: from router logits to the experts of each token and their weights.

T tokens, E experts, K top-k, V vocabulary, G groups of experts, R replicas.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from fake_impls import route as shapes
from moe_ops._library import cast, define
from moe_ops.types import Routing

EPSILON = 1e-20  # as DeepSeek-V3: a sum of sigmoids may underflow

Choose: TypeAlias = Callable[
    [torch.Tensor, int, str, int, int, torch.Tensor | None, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]
]


def route_kernel(
    choose: Choose,
    router_logits: torch.Tensor,
    top_k: int,
    scoring: str,
    renormalize: bool,
    num_expert_group: int,
    topk_group: int,
    e_score_correction_bias: torch.Tensor | None,
    routed_scaling_factor: float,
    is_active: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    token_to_experts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The body of the op, around a device's way to choose."""
    shapes.route(
        router_logits,
        top_k,
        scoring,
        renormalize,
        num_expert_group,
        topk_group,
        e_score_correction_bias,
        routed_scaling_factor,
        is_active,
        input_ids,
        token_to_experts,
    )
    logits_TE = router_logits.to(torch.float32)
    is_choice_TK = is_active_T1 = None if is_active is None else is_active.unsqueeze(1)
    if token_to_experts is not None and input_ids is not None:
        scores_TE, chosen_TK = _score(logits_TE, scoring), token_to_experts[input_ids.clamp(min=0)]
        is_in_table_TK = (chosen_TK >= 0) & (input_ids >= 0).unsqueeze(1)
        is_choice_TK = is_in_table_TK if is_active_T1 is None else is_in_table_TK & is_active_T1
        chosen_TK = chosen_TK.clamp(min=0)
    else:
        groups = num_expert_group, topk_group
        chosen_TK, scores_TE = choose(logits_TE, top_k, scoring, *groups, e_score_correction_bias, is_active_T1)
    chosen_weights_TK = scores_TE.gather(1, chosen_TK.to(torch.int64))
    if is_choice_TK is not None:  # where there is no choice the scores may be NaN
        chosen_weights_TK = torch.where(is_choice_TK, chosen_weights_TK, 0.0)
        chosen_TK = torch.where(is_choice_TK, chosen_TK, -1)
    if renormalize:
        chosen_weights_TK = chosen_weights_TK / (chosen_weights_TK.sum(dim=1, keepdim=True) + EPSILON)
    if routed_scaling_factor != 1:
        chosen_weights_TK = chosen_weights_TK * routed_scaling_factor
    return chosen_weights_TK.contiguous(), cast(chosen_TK, torch.int32)


def choose_by_sorting(
    logits_TE: torch.Tensor,
    top_k: int,
    scoring: str,
    num_expert_group: int,
    topk_group: int,
    e_score_correction_bias: torch.Tensor | None,
    is_active_T1: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The choice ``[T, K]`` of each row, whether it is active or not, and all scores ``[T, E]``."""
    scores_TE = _score(logits_TE, scoring)
    choice_TE = scores_TE if e_score_correction_bias is None else scores_TE + e_score_correction_bias
    order_TE = _descending(choice_TE)
    if topk_group < num_expert_group:
        is_allowed_TE = _best_groups(choice_TE, num_expert_group, topk_group, e_score_correction_bias is not None)
        # Those of chosen groups first: by a sort, since no score is so low that a bias of -inf is not as low.
        order_TE = order_TE.gather(1, _descending(is_allowed_TE.gather(1, order_TE)))
    return order_TE[:, :top_k], scores_TE


def _score(logits_TE: torch.Tensor, scoring: str) -> torch.Tensor:
    if scoring == "softmax":
        return torch.softmax(logits_TE, dim=1)
    return torch.sigmoid(logits_TE) if scoring == "sigmoid" else F.softplus(logits_TE).sqrt()


def _descending(values: torch.Tensor) -> torch.Tensor:
    """The order of each row. A stable sort, because topk breaks ties in any order: the lowest index comes first."""
    return torch.sort(values, dim=1, descending=True, stable=True).indices


def _best_groups(choice_TE: torch.Tensor, num_groups: int, topk_group: int, has_bias: bool) -> torch.Tensor:
    """bool ``[T, E]``: which experts are in a group that the token chooses."""
    choice_TGS = choice_TE.unflatten(1, (num_groups, -1))
    best = choice_TGS.topk(min(2 if has_bias else 1, choice_TGS.shape[2]), dim=2).values
    chosen_TC = _descending(best.sum(dim=2))[:, :topk_group]
    is_chosen_TG = torch.zeros_like(best[:, :, 0], dtype=torch.bool).scatter(1, chosen_TC, True)
    return is_chosen_TG.unsqueeze(2).expand_as(choice_TGS).flatten(1)


def _map_to_physical(topk_ids: torch.Tensor, logical_to_physical: torch.Tensor) -> torch.Tensor:
    shapes.map_to_physical(topk_ids, logical_to_physical)
    slots_ER = logical_to_physical if logical_to_physical.dim() == 2 else logical_to_physical.unsqueeze(1)
    slots_ER = slots_ER.gather(1, _descending(slots_ER >= 0))  # those that there are come first
    logical_TK = topk_ids.clamp(min=0).to(torch.int64)
    num_replicas_TK = (slots_ER >= 0).sum(dim=1)[logical_TK].clamp(min=1)
    token_T1 = torch.arange(topk_ids.shape[0], device=topk_ids.device).unsqueeze(1)
    slots_TK = slots_ER[logical_TK, token_T1 % num_replicas_TK]
    return cast(torch.where(topk_ids >= 0, slots_TK, -1), torch.int32)


def _count_expert_load(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    shapes.count_expert_load(topk_ids, num_experts)
    ids_R = topk_ids.flatten().to(torch.int64)
    ids_R = torch.where(ids_R >= 0, ids_R, num_experts)  # one more slot, for choices of nothing
    counts = ids_R.new_zeros(num_experts + 1).scatter_add(0, ids_R, torch.ones_like(ids_R))
    return counts[:num_experts].clone()


def _keep_choice(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    router_logits, _, ctx.scoring, ctx.renormalize, _, _, _, ctx.routed_scaling_factor, *_ = inputs
    ctx.save_for_backward(router_logits, output[1])
    ctx.mark_non_differentiable(output[1])


def _route_backward(ctx: Any, grad_TK: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The choice is constant; its weights depend on the scores of the chosen, and a softmax score on all logits."""
    router_logits, ids_TK = ctx.saved_tensors
    logits_TE = router_logits.to(torch.float32)
    scores_TE = _score(logits_TE, ctx.scoring)
    is_choice_TK, chosen_TK = ids_TK >= 0, ids_TK.clamp(min=0).to(torch.int64)
    grad_TK = grad_TK * ctx.routed_scaling_factor
    if ctx.renormalize:
        weights_TK = torch.where(is_choice_TK, scores_TE.gather(1, chosen_TK), 0.0)
        total_T1 = weights_TK.sum(dim=1, keepdim=True) + EPSILON
        grad_TK = (grad_TK - (grad_TK * weights_TK / total_T1).sum(dim=1, keepdim=True)) / total_T1
    grad_TE = torch.zeros_like(scores_TE).scatter_add(1, chosen_TK, torch.where(is_choice_TK, grad_TK, 0.0))
    if ctx.scoring == "softmax":
        grad_TE = scores_TE * (grad_TE - (grad_TE * scores_TE).sum(dim=1, keepdim=True))
    elif ctx.scoring == "sigmoid":
        grad_TE = grad_TE * scores_TE * (1 - scores_TE)
    else:
        slope_TE = torch.sigmoid(logits_TE) / (2 * scores_TE)
        grad_TE = torch.where(scores_TE > 0, grad_TE * slope_TE, 0.0)  # a score may underflow
    grad_TE = torch.where(is_choice_TK.any(dim=1, keepdim=True), grad_TE, 0.0)  # where nothing was chosen it may be NaN
    return grad_TE.to(router_logits.dtype), *[None] * 10


_route_op = define(
    "route(Tensor router_logits, int top_k, str scoring, bool renormalize, int num_expert_group, int topk_group,"
    " Tensor? e_score_correction_bias, float routed_scaling_factor, Tensor? is_active, Tensor? input_ids,"
    " Tensor? token_to_experts) -> (Tensor, Tensor)",
    kernel=partial(route_kernel, choose_by_sorting),
    fake=shapes.route,
    backward=_route_backward,
    setup_context=_keep_choice,
)
map_to_physical = define(
    "map_to_physical(Tensor topk_ids, Tensor logical_to_physical) -> Tensor",
    kernel=_map_to_physical,
    fake=shapes.map_to_physical,
)
_count_expert_load_op = define(
    "count_expert_load(Tensor topk_ids, int num_experts) -> Tensor",
    kernel=_count_expert_load,
    fake=shapes.count_expert_load,
)


def route(
    router_logits: torch.Tensor,
    routing: Routing,
    *,
    is_active: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    hidden_states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of each token and weigh them. All arithmetic is float32; ties go to the lowest id.

    With groups, a group's score is its best expert's, or with a bias the sum of its best two; experts outside the chosen
    groups are never chosen.

    Args:
        router_logits: ``[T, E]`` float32, bfloat16 or float16.
        routing: how.
        is_active: bool ``[T]``: rows that are not (padding) are routed nowhere. None: all are.
        input_ids: int ``[T]``, for hash routing; a negative id is routed nowhere.
        hidden_states: ``[T, H]``, for a function of the caller's.

    Returns:
        ``topk_weights`` float32 ``[T, K]``, whatever the dtype of the activations, and ``topk_ids`` int32 ``[T, K]``: slots
        where `routing` maps experts to slots, -1 (and weight 0) for rows that go nowhere. No tokens give no rows.

    Raises:
        ValueError: an argument or a field of `routing` does not fit the others; the message names it.
        TypeError: a dtype is not supported.

    Sources: softmax: Mixtral (`arXiv:2401.04088 <https://arxiv.org/abs/2401.04088>`_, section 2.1; a softmax over the chosen
    logits, as there and in GPT-OSS, is the softmax over all, renormalised) and Qwen3-MoE (``norm_topk_prob``). sigmoid,
    bias, groups and factor: DeepSeek-V3 (`arXiv:2412.19437 <https://arxiv.org/abs/2412.19437>`_, equations 12 to 16 and
    ``DeepseekV3TopkRouter`` of Transformers); groups without a bias: DeepSeek-V2 (`arXiv:2405.04434
    <https://arxiv.org/abs/2405.04434>`_, section 2.2.2). sqrtsoftplus and hash routing: DeepSeek-V4, as vLLM serves it.
    """
    if router_logits.dim() == 2 and router_logits.shape[1] != routing.num_experts:
        raise ValueError(f"route: router_logits must be [T, {routing.num_experts}], got {tuple(router_logits.shape)}")
    if routing.select_experts is None:
        topk_weights, topk_ids = _route(router_logits, routing, is_active, input_ids)
    else:
        topk_weights, topk_ids = _route_by_caller(hidden_states, router_logits, routing, is_active, input_ids)
    if routing.logical_to_physical is not None:
        if routing.logical_to_physical.dim() < 1 or routing.logical_to_physical.shape[0] != routing.num_experts:
            raise ValueError(
                f"route: logical_to_physical must be of {routing.num_experts} experts, got "
                f"{tuple(routing.logical_to_physical.shape)}"
            )
        topk_ids = map_to_physical(topk_ids, routing.logical_to_physical)
    return topk_weights, topk_ids


def _route(
    router_logits: torch.Tensor, routing: Routing, is_active: torch.Tensor | None, input_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the fields of `routing`."""
    if (routing.num_expert_group is None) != (routing.topk_group is None):
        raise ValueError(
            f"route: num_expert_group and topk_group must be given together, got {routing.num_expert_group} and "
            f"{routing.topk_group}"
        )
    topk_weights, topk_ids = _route_op(
        router_logits,
        routing.top_k,
        routing.scoring,
        routing.renormalize,
        1 if routing.num_expert_group is None else routing.num_expert_group,
        1 if routing.topk_group is None else routing.topk_group,
        routing.e_score_correction_bias,
        routing.routed_scaling_factor,
        is_active,
        input_ids,
        routing.token_to_experts,
    )
    return topk_weights, topk_ids


def _route_by_caller(
    hidden_states: torch.Tensor | None,
    router_logits: torch.Tensor,
    routing: Routing,
    is_active: torch.Tensor | None,
    input_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By `routing.select_experts`."""
    if routing.select_experts is None or hidden_states is None:
        raise ValueError("route: hidden_states must be given for select_experts, got None")
    topk_weights, topk_ids = routing.select_experts(hidden_states, router_logits, input_ids)
    shapes.check_selected(router_logits, topk_weights, topk_ids, routing.top_k)
    topk_weights, topk_ids = topk_weights.to(torch.float32), topk_ids.to(torch.int32)
    is_choice = topk_ids >= 0
    if is_active is not None:
        is_choice = is_choice & is_active.unsqueeze(1)
    return torch.where(is_choice, topk_weights, 0.0), torch.where(is_choice, topk_ids, -1)


def count_expert_load(topk_ids: torch.Tensor, *, num_experts: int) -> torch.Tensor:
    """How often each expert was chosen, int64 ``[num_experts]``: what an expert balancer sums over steps and ranks.

    Args:
        topk_ids: int ``[T, K]``; -1 counts nowhere.
        num_experts: ids are below it; with redundant experts, the number of slots.
    """
    load: torch.Tensor = _count_expert_load_op(topk_ids, num_experts)
    return load
