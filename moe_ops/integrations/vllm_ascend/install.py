"""The layer of this library in the place of vllm-ascend's."""

import os
from importlib.metadata import version

from moe_ops.integrations.vllm import VARIABLE

SUPPORTED = "0.30"
"""Of vllm-ascend: the release whose interface this adapter was written to."""

NAME = "RoutedExperts"
"""Of vLLM's layer, for which vllm-ascend registers its own."""


def register() -> None:
    """Replace vllm-ascend's routed experts, which it has registered, if the environment asks for it. A second call changes
    nothing.

    Raises:
        RuntimeError: the version of vllm-ascend is not supported, or it has not registered the layer that is to be replaced.
    """
    if os.environ.get(VARIABLE, "0") != "1":
        return
    found = version("vllm-ascend")
    if not found.startswith(f"{SUPPORTED}."):
        raise RuntimeError(f"moe_ops: {VARIABLE}=1 needs vllm-ascend {SUPPORTED}.*, got {found}")
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm_ascend.ops.fused_moe.routed_experts import AscendRoutedExperts

    from moe_ops.integrations.vllm_ascend.routed_experts import MoeOpsRoutedExperts

    registered = op_registry_oot.get(NAME)
    if registered is MoeOpsRoutedExperts:
        return
    if registered is not AscendRoutedExperts:
        raise RuntimeError(f"moe_ops: vllm-ascend must have registered AscendRoutedExperts, got {registered}")
    del op_registry_oot[NAME]  # register_oot replaces nothing
    RoutedExperts.register_oot(MoeOpsRoutedExperts, name=NAME)
