"""vLLM's routers as a `Routing`."""

from functools import partial
from typing import Any

import torch
from vllm.distributed.eplb.eplb_state import EplbLayerState
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from moe_ops.route import count_expert_load, map_to_physical, route
from moe_ops.types import Routing


def routing_of(router: BaseRouter, experts: Any) -> Routing:
    """How a layer chooses: by this library's op where vLLM's router is one of plain fields, else by the router itself.

    Args:
        router: vLLM's; it is called when the layer is, and so traced.
        experts: the layer's ``RoutedExperts``.
    """
    routing = _plain(router, experts) if _is_plain(router) else _by_router(router, experts)
    if router.eplb_state is None:
        return routing._replace(logical_to_physical=_slots(experts.expert_map_manager))
    balanced = partial(_balance, router.eplb_state, experts.moe_config.num_experts, routing)
    return routing._replace(
        select_experts=balanced,
        num_redundant_experts=experts.moe_config.num_experts - experts.moe_config.num_logical_experts,
    )


def reads_input_ids(routing: Routing) -> bool:
    """Whether ids of tokens are of use; models pass them to all their layers."""
    return routing.token_to_experts is not None or routing.select_experts is not None


def _is_plain(router: BaseRouter) -> bool:
    return type(router) is CPURouter and router.custom_routing_function is None


def _plain(router: CPURouter, experts: Any) -> Routing:
    bias, table = router.e_score_correction_bias, router._hash_indices_table
    return _common(experts)._replace(
        scoring=router.scoring_func,
        renormalize=router.renormalize,
        num_expert_group=router.num_expert_group if router.use_grouped_topk else None,
        topk_group=router.topk_group if router.use_grouped_topk else None,
        e_score_correction_bias=bias,
        # vLLM's routers without groups, bias and table leave it to the model.
        routed_scaling_factor=router.routed_scaling_factor
        if router.use_grouped_topk or bias is not None or table is not None
        else 1.0,
        token_to_experts=table,
    )


def _by_router(router: BaseRouter, experts: Any) -> Routing:
    """``_compute_routing`` is what each router defines; ``select_experts`` would map to copies of experts, too."""

    def select_experts(
        hidden_states: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = router._compute_routing(hidden_states, router_logits, torch.int32, input_ids=input_ids)
        return weights, ids

    return _common(experts)._replace(select_experts=select_experts)


def _common(experts: Any) -> Routing:
    return Routing(
        experts.moe_config.experts_per_token,
        experts.moe_config.num_logical_experts,
        apply_router_weight_on_input=experts.apply_router_weight_on_input,
    )


def _balance(
    state: EplbLayerState,
    num_slots: int,
    routing: Routing,
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    input_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of the experts' copies, by the maps that the engine keeps in `state`, and their load added to what it counts."""
    weights, ids = route(router_logits, routing, input_ids=input_ids, hidden_states=hidden_states)
    slots = map_to_physical(ids, state.logical_to_physical_map)
    load = count_expert_load(slots, num_experts=num_slots)
    state.expert_load_view += torch.where(state.should_record_tensor, load, 0).to(state.expert_load_view.dtype)
    return weights, slots


def _slots(manager: ExpertMapManager) -> torch.Tensor | None:
    """int ``[E]``: where each expert is, if the ranks have not equal runs of them but were dealt them in turn."""
    if manager.placement_strategy != "round_robin":
        return None
    ids = torch.arange(manager.global_num_experts, dtype=torch.int32)
    return ids % manager.ep_size * (manager.global_num_experts // manager.ep_size) + ids // manager.ep_size
