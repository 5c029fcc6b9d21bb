"""The worker: ``vllm serve ... --worker-cls moe_ops.integrations.vllm_ascend.worker.Worker``."""

from typing import Any

from vllm_ascend.worker.worker import NPUWorker

from moe_ops.integrations.vllm_ascend.install import register


class Worker(NPUWorker):
    """vllm-ascend's, in which MoE layers run as the stage if ``MOE_OPS_VLLM=1``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        register()
