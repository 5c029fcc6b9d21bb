"""vLLM's MoE layers through this library: a plugin of vLLM, off unless ``MOE_OPS_VLLM=1``.

This module imports no vLLM: vLLM loads it, in every process, by its entry point (``vllm.general_plugins``).
"""

import os

VARIABLE = "MOE_OPS_VLLM"
SUPPORTED = "0.32"


def register() -> None:
    """Replace vLLM's MoE runner, if the environment asks for it. A second call changes nothing.

    On vllm-ascend nothing is replaced here: its worker registers its own layers later, and refuses a name that is taken. There
    the adapter is a worker, `moe_ops.integrations.vllm_ascend.worker.Worker`.

    Raises:
        ValueError: the variable has another value than 0 or 1.
        RuntimeError: the version of vLLM is not supported.
    """
    asked = os.environ.get(VARIABLE, "0")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {asked!r}")
    if asked != "1":
        return
    import vllm
    from vllm.platforms import current_platform

    if current_platform.device_type == "npu":
        return
    version = vllm.__version__
    if not version.startswith(f"{SUPPORTED}."):
        raise RuntimeError(f"moe_ops: {VARIABLE}=1 needs vllm {SUPPORTED}.*, got {version}")
    from moe_ops.integrations.vllm.runner import install

    install()
