"""Routing: from router logits to the experts of each token and their weights.

T tokens, E experts, K top-k, G groups of experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from fake_impls import route as shapes
from fake_impls.checks import FLOATS, check_dim, check_dtype, check_equal, check_same_rows
from fake_impls.route import RouteSettings
from moe_ops._library import cast, define, refuse_forward_mode
from moe_ops.elementwise import each
from moe_ops.types import Routing

EPSILON = 1e-20  # as DeepSeek-V3: a sum of sigmoids may underflow

Choose: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None, RouteSettings], tuple[torch.Tensor, torch.Tensor]]


def route_kernel(
    choose: Choose, router_logits: torch.Tensor, is_active: torch.Tensor | None, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The body of the op, around a device's way to choose."""
    settings = RouteSettings(*arguments)
    is_active_T1 = None if is_active is None else is_active.unsqueeze(1)
    chosen_TK, scores_TE = choose(router_logits.to(torch.float32), is_active_T1, settings)
    weights_TK = _weigh(scores_TE, chosen_TK, is_active_T1, settings.renormalize, settings.routed_scaling_factor)
    if is_active_T1 is not None:
        chosen_TK = torch.where(is_active_T1, chosen_TK, -1)
    return weights_TK, cast(chosen_TK, torch.int32)


def _weigh(
    scores_TE: torch.Tensor,
    chosen_TK: torch.Tensor,
    is_choice: torch.Tensor | None,
    renormalize: bool,
    routed_scaling_factor: float,
) -> torch.Tensor:
    """The weights ``[T, K]`` of experts; 0 where there is no choice, for which the scores may be NaN."""
    weights_TK = scores_TE.gather(1, chosen_TK.to(torch.int64))
    if is_choice is not None:
        weights_TK = torch.where(is_choice, weights_TK, 0.0)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=1, keepdim=True) + EPSILON)
    if routed_scaling_factor != 1:
        weights_TK = weights_TK * routed_scaling_factor
    return weights_TK.contiguous()


def choose_by_sorting(
    logits_TE: torch.Tensor, is_active_T1: torch.Tensor | None, settings: RouteSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The choice ``[T, K]`` of each row, whether it is active or not, and all scores ``[T, E]``."""
    scores_TE = _score(logits_TE, settings.scoring)
    bias, num_groups, topk_group = settings.e_score_correction_bias, settings.num_expert_group, settings.topk_group
    choice_TE = scores_TE if bias is None else scores_TE + bias
    order_TE = _descending(choice_TE)
    if topk_group < num_groups:
        is_allowed_TE = _best_groups(choice_TE, num_groups, topk_group, bias is not None)
        # Those of chosen groups first: by a sort, since no score is so low that a bias of -inf is not as low.
        order_TE = order_TE.gather(1, _descending(is_allowed_TE.gather(1, order_TE)))
    return order_TE[:, : settings.top_k], scores_TE


def _score(logits_TE: torch.Tensor, scoring: str) -> torch.Tensor:
    if scoring == "softmax":
        return torch.softmax(logits_TE, dim=1)
    return each(torch.sigmoid if scoring == "sigmoid" else _sqrt_softplus, logits_TE)


def _sqrt_softplus(x: torch.Tensor) -> torch.Tensor:
    return F.softplus(x).sqrt()


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


def _weigh_choices(
    router_logits: torch.Tensor,
    topk_ids: torch.Tensor,
    scoring: str,
    renormalize: bool,
    routed_scaling_factor: float,
) -> torch.Tensor:
    scores_TE = _score(router_logits.to(torch.float32), scoring)
    return _weigh(scores_TE, topk_ids.clamp(min=0), topk_ids >= 0, renormalize, routed_scaling_factor)


def _count_expert_load(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    ids_R = topk_ids.flatten().to(torch.int64)
    is_expert_R = (ids_R >= 0) & (ids_R < num_experts)
    ids_R = torch.where(is_expert_R, ids_R, num_experts)  # the last count is of what is no expert's id
    counts = ids_R.new_zeros(num_experts + 1).scatter_add(0, ids_R, torch.ones_like(ids_R))
    return counts[:num_experts].clone()


def _keep_choice(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    router_logits, _, *arguments = inputs
    settings = RouteSettings(*arguments)
    ctx.weighing = settings.scoring, settings.renormalize, settings.routed_scaling_factor
    ctx.save_for_backward(router_logits, output[1])
    ctx.mark_non_differentiable(output[1])


def _keep_given_choice(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    router_logits, topk_ids, *weighing = inputs
    ctx.weighing = tuple(weighing)
    ctx.save_for_backward(router_logits, topk_ids)


def _route_backward(ctx: Any, grad_TK: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _logits_gradient(ctx, grad_TK), *[None] * (1 + len(RouteSettings._fields))


def _weigh_backward(ctx: Any, grad_TK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _logits_gradient(ctx, grad_TK), None, None, None, None


def _logits_gradient(ctx: Any, grad_TK: torch.Tensor) -> torch.Tensor:
    """The choice is constant; its weights depend on the scores of the chosen, and a softmax score on all logits."""
    router_logits, ids_TK = ctx.saved_tensors
    scoring, renormalize, routed_scaling_factor = ctx.weighing
    logits_TE = router_logits.to(torch.float32)
    scores_TE = _score(logits_TE, scoring)
    is_choice_TK, chosen_TK = ids_TK >= 0, ids_TK.clamp(min=0).to(torch.int64)
    grad_TK = grad_TK * routed_scaling_factor
    if renormalize:
        weights_TK = torch.where(is_choice_TK, scores_TE.gather(1, chosen_TK), 0.0)
        total_T1 = weights_TK.sum(dim=1, keepdim=True) + EPSILON
        grad_TK = (grad_TK - (grad_TK * weights_TK / total_T1).sum(dim=1, keepdim=True)) / total_T1
    grad_TE = torch.zeros_like(scores_TE).scatter_add(1, chosen_TK, torch.where(is_choice_TK, grad_TK, 0.0))
    if scoring == "softmax":
        grad_TE = scores_TE * (grad_TE - (grad_TE * scores_TE).sum(dim=1, keepdim=True))
    elif scoring == "sigmoid":
        grad_TE = grad_TE * scores_TE * (1 - scores_TE)
    else:
        slope_TE = torch.sigmoid(logits_TE) / (2 * scores_TE)
        grad_TE = torch.where(scores_TE > 0, grad_TE * slope_TE, 0.0)  # a score may underflow
    grad_TE = torch.where(is_choice_TK.any(dim=1, keepdim=True), grad_TE, 0.0)  # where nothing was chosen it may be NaN
    return grad_TE.to(router_logits.dtype)


_route_op = define(
    "route(Tensor router_logits, Tensor? is_active, int top_k, str scoring, bool renormalize, int num_expert_group,"
    " int topk_group, Tensor? e_score_correction_bias, float routed_scaling_factor) -> (Tensor, Tensor)",
    kernel=partial(route_kernel, choose_by_sorting),
    fake=shapes.route,
    check=shapes.check_route,
    backward=_route_backward,
    setup_context=_keep_choice,
)
_weigh_choices_op = define(
    "weigh_choices(Tensor router_logits, Tensor topk_ids, str scoring, bool renormalize, float routed_scaling_factor)"
    " -> Tensor",
    kernel=_weigh_choices,
    fake=shapes.weigh_choices,
    check=shapes.check_weigh_choices,
    backward=_weigh_backward,
    setup_context=_keep_given_choice,
)
_count_expert_load_op = define(
    "count_expert_load(Tensor topk_ids, int num_experts) -> Tensor",
    kernel=_count_expert_load,
    fake=shapes.count_expert_load,
    check=shapes.check_count_expert_load,
)


def route(
    router_logits: torch.Tensor | None,
    routing: Routing,
    *,
    is_active: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of each token and weigh them. All arithmetic is float32; ties go to the lowest id.

    With groups, a group's score is its best expert's, or with a bias the sum of its best two; experts outside the chosen
    groups are never chosen. A choice that was made elsewhere is passed as `topk_ids`, and with `topk_weights` it is weighed
    already. In such a choice an id that is no expert's (below 0 or from E on) goes nowhere, and an expert that stands in a row
    twice counts twice, each time with its own weight.

    Args:
        router_logits: ``[T, E]`` float32, bfloat16 or float16. None if `topk_weights` are given, which need none.
        routing: how. With `topk_ids` what chooses does not apply, and with `topk_weights` what weighs does not, either.
        is_active: bool ``[T]``: rows that are not (padding) are routed nowhere. None: all are.
        topk_ids: int32 or int64 ``[T, K]``, -1 for none.
        topk_weights: float ``[T, K]``; goes with `topk_ids`, and gets a gradient.

    Returns:
        ``topk_weights`` float32 ``[T, K]``, whatever the dtype of the activations, and ``topk_ids`` int32 ``[T, K]``: -1 (and
        weight 0) for what goes nowhere. No tokens give no rows.

    Raises:
        ValueError: an argument or a field of `routing` does not fit the others; the message names it.
        TypeError: a dtype is not supported.

    Example: hash routing, by a table ``[vocabulary, K]`` of experts::

        weights, ids = route(router_logits, routing, topk_ids=table[input_ids])

    Sources: softmax: Mixtral (`arXiv:2401.04088 <https://arxiv.org/abs/2401.04088>`_, section 2.1; a softmax over the chosen
    logits, as there and in GPT-OSS, is the softmax over all, renormalised) and Qwen3-MoE (``norm_topk_prob``). sigmoid,
    bias, groups and factor: DeepSeek-V3 (`arXiv:2412.19437 <https://arxiv.org/abs/2412.19437>`_, equations 12 to 16 and
    ``DeepseekV3TopkRouter`` of Transformers); groups without a bias: DeepSeek-V2 (`arXiv:2405.04434
    <https://arxiv.org/abs/2405.04434>`_, section 2.2.2). sqrtsoftplus: DeepSeek-V4, as vLLM serves it.
    """
    _check_logits(router_logits, routing, topk_weights)
    refuse_forward_mode("route", (router_logits, topk_weights))
    if topk_ids is not None:
        return _take_choice(router_logits, routing, is_active, topk_ids, topk_weights)
    if topk_weights is not None:
        raise ValueError("route: topk_ids must be given with topk_weights, got None")
    if (routing.num_expert_group is None) != (routing.topk_group is None):
        raise ValueError(
            f"route: num_expert_group and topk_group must be given together, got {routing.num_expert_group} and "
            f"{routing.topk_group}"
        )
    weights, ids = _route_op(
        router_logits,
        is_active,
        routing.top_k,
        routing.scoring,
        routing.renormalize,
        1 if routing.num_expert_group is None else routing.num_expert_group,
        1 if routing.topk_group is None else routing.topk_group,
        routing.e_score_correction_bias,
        routing.routed_scaling_factor,
    )
    return weights, ids


def _check_logits(router_logits: torch.Tensor | None, routing: Routing, topk_weights: torch.Tensor | None) -> None:
    if router_logits is None:
        if topk_weights is None:
            raise ValueError("route: router_logits must be given without topk_weights, got None")
    elif router_logits.dim() == 2 and router_logits.shape[1] != routing.num_experts:
        raise ValueError(f"route: router_logits must be [T, {routing.num_experts}], got {tuple(router_logits.shape)}")


def _take_choice(
    router_logits: torch.Tensor | None,
    routing: Routing,
    is_active: torch.Tensor | None,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A choice that was made elsewhere."""
    shapes.check_ids("route", topk_ids)
    check_equal("route", "columns of topk_ids", topk_ids.shape[1], routing.top_k, "routing.top_k")
    is_choice = (topk_ids >= 0) & (topk_ids < routing.num_experts)
    if is_active is not None:
        check_same_rows("route", "topk_ids", topk_ids, "is_active", is_active)
        is_choice = is_choice & is_active.unsqueeze(1)
    ids = torch.where(is_choice, topk_ids, -1).to(torch.int32)
    if topk_weights is None:
        weighing = routing.scoring, routing.renormalize, routing.routed_scaling_factor
        return _weigh_choices_op(router_logits, ids, *weighing), ids
    check_dim("route", "topk_weights", topk_weights, 2)
    check_dtype("route", "topk_weights", topk_weights, FLOATS)
    check_same_rows("route", "topk_weights", topk_weights, "topk_ids", topk_ids)
    check_equal("route", "columns of topk_weights", topk_weights.shape[1], routing.top_k, "routing.top_k")
    return torch.where(is_choice, topk_weights.to(torch.float32), 0.0), ids


def count_expert_load(topk_ids: torch.Tensor, *, num_experts: int) -> torch.Tensor:
    """How often each expert was chosen, int64 ``[num_experts]``: what an expert balancer sums over steps and ranks.

    Args:
        topk_ids: int ``[T, K]``; what is no expert's id counts nowhere.
        num_experts: ids are below it; with redundant experts, the number of slots.

    Example::

        count_expert_load(torch.tensor([[0, 2], [2, -1]]), num_experts=4)  # [1, 0, 2, 0]
    """
    load: torch.Tensor = _count_expert_load_op(topk_ids, num_experts)
    return load
