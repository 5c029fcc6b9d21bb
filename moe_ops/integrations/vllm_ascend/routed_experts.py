"""vllm-ascend's routed experts, which run as the stage: the part of a layer between its gate and its sums.

``AscendMoERunner`` still does the rest (gate, shared experts, transforms, sums over TP): the stage returns what vllm-ascend's
communication method of the step would, complete or one TP rank's summand.
"""

from functools import cached_property
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm_ascend.ascend_config import get_ascend_config
from vllm_ascend.ascend_forward_context import _EXTRA_CTX
from vllm_ascend.distributed.parallel_state import get_mc2_group
from vllm_ascend.ops.fused_moe.dataclass.shared_experts import RoutedMoEMilestones
from vllm_ascend.ops.fused_moe.routed_experts import AscendRoutedExperts, AscendUnquantizedFusedMoEMethod

from moe_ops.activations import ACTIVATIONS
from moe_ops.groups import ParallelGroups
from moe_ops.integrations.vllm.groups import group_of, groups_of
from moe_ops.integrations.vllm.support import common_reasons
from moe_ops.integrations.vllm_ascend.step import read_step
from moe_ops.stage import moe_stage
from moe_ops.types import ExpertWeights, Layout, Routing, Strategy, WeightLayout

logger = init_logger(f"vllm.{__name__}")  # one of vLLM's, so that its settings apply


class MoeOpsRoutedExperts(AscendRoutedExperts):
    """Runs `moe_stage` where vllm-ascend runs prepare, dispatch, experts, combine and finalize of a communication method."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        self.returns_choices = bool(getattr(config.model_config, "enable_return_routed_experts", False))
        self.is_kv_consumer = config.kv_transfer_config is not None and config.kv_transfer_config.is_kv_consumer

    @cached_property
    def reason_against(self) -> str | None:
        """Why the layer is left to vllm-ascend; None if the stage runs it. Known when the layer first runs, then constant."""
        reason = why_not(self)
        if reason is None:
            logger.info_once(
                "moe_ops: MoE layers run as the stage, by the method that vllm-ascend chooses for each step."
            )
        else:
            logger.warning_once("moe_ops: a layer is left to vllm-ascend, because %s.", reason)
        return reason

    @cached_property
    def groups(self) -> ParallelGroups:
        """The groups of ALLGATHER and ALL2ALL."""
        return groups_of(self.moe_config.moe_parallel_config)

    @cached_property
    def mc2_groups(self) -> ParallelGroups:
        """Those of MC2, which has a communicator of its own for the ranks of EP."""
        return self.groups._replace(ep=group_of(get_mc2_group()))

    def forward_impl(
        self, *, hidden_states: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, RoutedMoEMilestones]:
        """``[T, H]``; and, where shared experts overlap, that there is no point inside the stage which they could wait for."""
        if self.reason_against is not None:
            return super().forward_impl(hidden_states=hidden_states, router_logits=router_logits, input_ids=input_ids)
        config = self.moe_config
        strategy, lengths = read_step(tokens_are_sharded=config.is_sequence_parallel)
        groups = self.mc2_groups if strategy is Strategy.MC2 else self.groups
        is_balanced_by_force = bool(_EXTRA_CTX.in_profile_run)
        topk_weights, topk_ids = self._select_experts(hidden_states, router_logits, is_balanced_by_force, input_ids)
        routed = moe_stage(
            hidden_states,
            None,
            self._weights,
            Routing(
                config.experts_per_token,
                config.num_experts,
                apply_router_weight_on_input=self.apply_router_weight_on_input,
            ),
            Layout(strategy, groups, tokens_are_sharded=config.is_sequence_parallel),
            lengths=lengths,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
        )
        return (routed, RoutedMoEMilestones()) if self.return_with_event else routed

    @property
    def _weights(self) -> ExpertWeights:
        """As vllm-ascend has transposed them."""
        return ExpertWeights(
            self.w13_weight,
            self.w2_weight,
            getattr(self, "w13_bias", None),
            getattr(self, "w2_bias", None),
            activation=self.moe_config.activation.value,
            layout=WeightLayout.NPU,
        )


def why_not(experts: MoeOpsRoutedExperts) -> str | None:
    """Why a layer is left to vllm-ascend; None if the stage can run it."""
    config, router, settings = experts.moe_config, experts.router, get_ascend_config()
    method, activation = type(experts.quant_method), config.activation.value
    swiglu = experts.swiglu_limit, experts.swiglu_alpha, experts.swiglu_beta
    reasons = {
        f"its experts are quantised ({method.__name__})": method is not AscendUnquantizedFusedMoEMethod,
        "of fused MC2": bool(settings.enable_fused_mc2),
        f"its activation is {activation}": activation not in ACTIVATIONS
        or "npu" not in ACTIVATIONS[activation].kernels,
        f"limit, alpha and beta of its SwiGLU are {swiglu}": swiglu != (None, None, None),
        **common_reasons(config, router),
        "its experts have copies or are moved": config.num_experts != config.num_logical_experts
        or experts.dynamic_eplb
        or experts.log2phy is not None
        or getattr(router, "eplb_state", None) is not None,
        "its experts are not placed in order": experts.expert_map_manager.placement_strategy != "linear",
        "shared experts are fused with the routed ones": bool(experts.mix_placement),
        "its router looks token ids up": experts.tid2eid is not None or getattr(router, "bias_vl", None) is not None,
        "of static kernels": bool(experts.enable_npugraph_ex_static_kernel),
        "DP ranks that consume a KV cache need not tell each other their token counts": experts.is_kv_consumer
        and config.dp_size > 1,
        "chosen experts are to be returned": experts.returns_choices,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
