"""Which of vLLM's MoE layers the stage can run."""

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from fake_impls.checks import FLOATS
from moe_ops.activations import ACTIVATIONS, SWIGLU_ALPHA, SWIGLU_LIMIT


def why_not(runner: Any, vllm_config: VllmConfig) -> str | None:
    """Why a layer is left to vLLM; None if the stage can run it.

    Args:
        runner: a ``MoERunner`` of which all but its way to run is set up.
        vllm_config: that of the engine.
    """
    experts, config = runner.routed_experts, runner.moe_config
    manager = experts.expert_map_manager
    swiglu = experts.swiglu_limit, experts.swiglu_alpha, experts.swiglu_beta
    of_gpt_oss = (SWIGLU_LIMIT, SWIGLU_ALPHA, 1.0)
    reasons = {
        f"its experts are quantised ({type(experts.quant_method).__name__})": type(experts.quant_method)
        is not UnquantizedFusedMoEMethod,
        f"its weights are {experts.params_dtype}": experts.params_dtype not in FLOATS,
        f"its activation is {config.activation.value}": config.activation.value not in ACTIVATIONS,
        f"limit, alpha and beta of its SwiGLU are {swiglu}": any(
            value not in (None, wanted) for value, wanted in zip(swiglu, of_gpt_oss, strict=True)
        )
        or (config.activation is not MoEActivation.SWIGLUOAI and swiglu != (None, None, None)),
        **common_reasons(config, runner.router),
        "shared experts are fused with the routed ones": manager.num_fused_shared_experts > 0,
        "of dual-batch overlap": runner.enable_dbo,
        "chosen experts are to be returned": getattr(vllm_config.model_config, "enable_return_routed_experts", False),
        f"additional_config is no dict but {type(vllm_config.additional_config).__name__}": not isinstance(
            vllm_config.additional_config, dict
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def common_reasons(config: Any, router: Any) -> dict[str, bool]:
    """Why the stage cannot run a layer of this ``FusedMoEConfig``, on any platform, and which of it applies."""
    return {
        f"{config.num_experts} experts are not divided evenly by {config.ep_size} ranks": config.num_experts
        % config.ep_size
        != 0,
        "its router has zero experts": isinstance(router, ZeroExpertRouter),
        "hidden states or weights are padded": config.hidden_dim != config.hidden_dim_unpadded
        or config.intermediate_size_per_partition != config.intermediate_size_per_partition_unpadded,
        "of prefill context parallelism": config.pcp_size > 1,
        "of LoRA": config.is_lora_enabled,
    }
