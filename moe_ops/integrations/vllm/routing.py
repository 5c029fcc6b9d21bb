"""vLLM's routers: as a `Routing`, where they are plain enough, else as a function that is called before the stage.

T tokens, E experts, K top-k.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from vllm.distributed.eplb.eplb_state import EplbLayerState
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from moe_ops.route import count_expert_load, route
from moe_ops.slots import map_to_physical
from moe_ops.types import Routing

Choose: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]
]
"""Of hidden states, logits and perhaps token ids: the chosen experts ``[T, K]`` and their weights ``[T, K]``. No weights: the
logits weigh."""


def routing_of(router: BaseRouter, experts: Any) -> tuple[Routing, Choose | None]:
    """How a layer chooses, and what makes the choice before the stage does; None: nothing.

    Args:
        router: vLLM's.
        experts: the layer's ``RoutedExperts``.
    """
    routing, choose = _by_fields(router, experts) if _is_plain(router) else (_common(experts), partial(_ask, router))
    if router.eplb_state is None:
        return routing._replace(logical_to_physical=_slots(experts.expert_map_manager)), choose
    num_slots = experts.moe_config.num_experts
    balanced = partial(_choose_slots, router.eplb_state, num_slots, routing, choose)
    return _common(experts)._replace(num_experts=num_slots), balanced  # to the stage a slot is an expert


def _is_plain(router: BaseRouter) -> bool:
    return type(router) is CPURouter and router.custom_routing_function is None


def _by_fields(router: CPURouter, experts: Any) -> tuple[Routing, Choose | None]:
    bias, table = router.e_score_correction_bias, router._hash_indices_table
    routing = _common(experts)._replace(
        scoring=router.scoring_func,
        renormalize=router.renormalize,
        num_expert_group=router.num_expert_group if router.use_grouped_topk else None,
        topk_group=router.topk_group if router.use_grouped_topk else None,
        e_score_correction_bias=bias,
        # vLLM's routers without groups, bias and table leave it to the model.
        routed_scaling_factor=router.routed_scaling_factor
        if router.use_grouped_topk or bias is not None or table is not None
        else 1.0,
    )
    return routing, None if table is None else partial(_look_up, table)


def _common(experts: Any) -> Routing:
    return Routing(
        experts.moe_config.experts_per_token,
        experts.moe_config.num_logical_experts,
        apply_router_weight_on_input=experts.apply_router_weight_on_input,
    )


def _ask(
    router: BaseRouter, hidden_states: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``_compute_routing`` is what each router defines; ``select_experts`` would map to copies of experts, too."""
    topk_weights, topk_ids = router._compute_routing(hidden_states, router_logits, torch.int32, input_ids=input_ids)
    return topk_ids, topk_weights


def _look_up(
    table: torch.Tensor, hidden_states: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None
) -> tuple[torch.Tensor, None]:
    """The experts that a table ``[vocabulary, K]`` has for each token. A negative id, which pads, is routed nowhere."""
    if input_ids is None:
        raise ValueError("moe_ops: input_ids must be given for a router that looks them up, got None")
    is_token_T1 = (input_ids >= 0).unsqueeze(1)
    return torch.where(is_token_T1, table[input_ids.clamp(min=0)], -1), None


def _choose_slots(
    state: EplbLayerState,
    num_slots: int,
    routing: Routing,
    choose: Choose | None,
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    input_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of the experts' copies, by the maps that the engine keeps in `state`, and their load added to what it counts."""
    ids, weights = (None, None) if choose is None else choose(hidden_states, router_logits, input_ids)
    weights, ids = route(router_logits, routing, topk_ids=ids, topk_weights=weights)
    slots = map_to_physical(ids, state.logical_to_physical_map, num_slots)
    load = count_expert_load(slots, num_experts=num_slots)
    state.expert_load_view += torch.where(state.should_record_tensor, load, 0).to(state.expert_load_view.dtype)
    return slots, weights


def _slots(manager: ExpertMapManager) -> torch.Tensor | None:
    """int ``[E]``: where each expert is, if ranks hold not equal runs of experts but every n-th of them."""
    if manager.placement_strategy != "round_robin":
        return None
    ids = torch.arange(manager.global_num_experts, dtype=torch.int32)
    return ids % manager.ep_size * (manager.global_num_experts // manager.ep_size) + ids // manager.ep_size
