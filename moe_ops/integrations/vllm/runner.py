"""vLLM's MoE runner, whose layers run as the stage."""

from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.utils import replace_parameter

from fake_impls.layout import ceil_div
from moe_ops.integrations.vllm.plans import Plan, plan_for
from moe_ops.integrations.vllm.routing import Choose, routing_of
from moe_ops.integrations.vllm.settings import KEY, Settings, read_settings
from moe_ops.integrations.vllm.support import why_not
from moe_ops.integrations.vllm.token_counts import token_counts
from moe_ops.packed_experts import prepack_experts
from moe_ops.stage import moe_stage
from moe_ops.types import ExpertWeights, Layout, Lengths, Routing, WeightLayout

logger = init_logger(f"vllm.{__name__}")  # one of vLLM's, so that its settings apply


def install() -> None:
    """Let vLLM make `MoeOpsRunner` where it makes a ``MoERunner``.

    Raises:
        RuntimeError: another plugin, such as that of a platform, has replaced that class.
    """
    registered = op_registry_oot.get(MoERunner.__name__, MoeOpsRunner)
    if registered is not MoeOpsRunner:
        raise RuntimeError(f"moe_ops: MoERunner must not be replaced by another plugin, got {registered.__name__}")
    if MoERunner.__name__ not in op_registry_oot:
        MoERunner.register_oot(name=MoERunner.__name__)(MoeOpsRunner)


class PlainExperts(UnquantizedFusedMoEMethod):
    """Experts in the weights that vLLM loads, packed for the kernel of this library that reads them."""

    layout = WeightLayout.PLAIN

    def __init__(self, moe_config: Any) -> None:
        super().__init__(moe_config)
        self.supports_pre_processed_weights = False  # nothing says how another process packed them

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack them; after an update of the weights again, into the memory that compiled code knows."""
        plain = weights_of(layer, WeightLayout.PLAIN)
        packed = prepack_experts(plain)
        if packed is not plain:
            is_update = self.layout is not WeightLayout.PLAIN
            replace_parameter(layer, "w13_weight", packed.w13, prefer_copy=is_update)
            replace_parameter(layer, "w2_weight", packed.w2, prefer_copy=is_update)
            if packed.w13_bias is not plain.w13_bias:
                replace_parameter(layer, "w13_bias", packed.w13_bias, prefer_copy=is_update)
        self.layout = packed.layout


def weights_of(experts: Any, layout: WeightLayout) -> ExpertWeights:
    """Those of a ``RoutedExperts``."""
    return ExpertWeights(
        experts.w13_weight,
        experts.w2_weight,
        getattr(experts, "w13_bias", None),
        getattr(experts, "w2_bias", None),
        activation=experts.activation.value,
        layout=layout,
    )


class MoeOpsRunner(MoERunner):
    """Runs the routed experts by `moe_stage`, and all else as vLLM does."""

    plan: Plan | None
    """None: the layer is left to vLLM."""

    def _select_forward(self) -> Any:
        """What ``forward`` calls for the routed and the shared experts. vLLM asks at the end of the constructor."""
        vllm_config = get_current_vllm_config()
        reason = why_not(self, vllm_config)
        if reason is not None:
            self.plan = None
            logger.warning_once("moe_ops: a layer is left to vLLM, because %s.", reason)
            return super()._select_forward()
        settings = read_settings(vllm_config.additional_config)
        plan = self.plan = plan_for(self.moe_config, settings, vllm_config)
        self._replace_quant_method(PlainExperts(self.moe_config))
        strategy, _, dispatch, *_ = plan.layout
        form = f"{strategy.name} {dispatch.name if dispatch else ''}".rstrip()
        vllm_config.additional_config = _with_key(vllm_config.additional_config, settings, form)
        logger.info_once("moe_ops: MoE layers run as %s, because %s.", form, plan.reason)
        return partial(self._run_stage, plan, *routing_of(self.router, self.routed_experts))

    @property
    def _fused_output_is_reduced(self) -> bool:
        if self.plan is None:
            return super()._fused_output_is_reduced
        return self.plan.is_reduced

    def _run_stage(
        self,
        plan: Plan,
        routing: Routing,
        choose: Choose | None,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        shared_experts_input: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        layer_name: Any,
        hidden_dim_unpadded: int,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """In place of vLLM's ``moe_forward``, whose arguments it has and whose result: that of the routed experts, after that
        of the shared ones, if there are any."""
        shared = None if self._shared_experts is None else self._shared_experts._layer(shared_experts_input)
        if self.gate is not None:
            router_logits, _ = self.gate(hidden_states)
        routed = self._run_routed(plan, routing, choose, hidden_states, router_logits, input_ids)
        return routed if shared is None else (shared, routed)

    def _run_routed(
        self,
        plan: Plan,
        routing: Routing,
        choose: Choose | None,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        experts = self.routed_experts
        num_tokens, hidden_dim = hidden_states.shape
        topk_ids, topk_weights = (None, None) if choose is None else choose(hidden_states, router_logits, input_ids)
        logits = router_logits if topk_weights is None else None
        lengths = Lengths()
        if plan.needs_token_counts:
            rows, lengths = _count_rows(plan.layout, hidden_states)
            if torch.compiler.is_compiling():
                hidden_states = hidden_states.narrow(0, 0, rows)
                logits, topk_ids, topk_weights = [
                    None if x is None else x.narrow(0, 0, rows) for x in (logits, topk_ids, topk_weights)
                ]
        routed = moe_stage(
            hidden_states,
            logits,
            weights_of(experts, experts.quant_method.layout),
            routing,
            plan.layout,
            lengths=lengths,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            overlap_gate=plan.overlap_gate,
        )
        if plan.needs_token_counts and torch.compiler.is_compiling():
            # Not narrow, which would tell the compiler that rows are at least 2, as it takes vLLM's count to be. A copy, since
            # vLLM scales what it gets.
            routed = routed.as_strided((num_tokens, hidden_dim), (hidden_dim, 1)).clone()
        return routed


def _with_key(additional_config: dict[str, Any], settings: Settings, form: str) -> dict[str, Any]:
    """What a compile cache tells graphs apart by: whether the plugin is there, its version, the settings, and the forms of
    layers, which timings may have decided. A new dict, since another engine may have the user's."""
    forms = {*additional_config.get(f"{KEY}_forms", ()), form}
    ours = {KEY: settings.to_json(), f"{KEY}_version": version("moe-ops"), f"{KEY}_forms": sorted(forms)}
    return {**additional_config, **ours}


def _count_rows(layout: Layout, hidden_states: torch.Tensor) -> tuple[int, Lengths]:
    """Rows of this rank, and those of all ranks.

    They come from an op, though the argument has as many, so that a compiler knows nothing about them: vLLM drops the guards
    of its graphs, and code that is right for the count of the first call alone, say an even one, would run for all.
    """
    (_, tp, _), (_, dp, dp_rank), _, _ = layout.groups
    num_shards = tp if layout.tokens_are_sharded else 1
    counts = token_counts(hidden_states, dp, dp_rank, num_shards)
    # vLLM pads to a multiple of the shards, and gives each TP rank as many.
    rows = [ceil_div(count, num_shards) for count in counts]
    return rows[dp_rank], Lengths(per_rank=[count for count in rows for _ in range(tp)])
