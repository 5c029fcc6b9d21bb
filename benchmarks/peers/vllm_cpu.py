"""vLLM: its fused kernel for CPUs, with weights packed beforehand."""

from collections.abc import Sequence
from typing import Any

import torch

import moe_ops as mo
from benchmarks.contest import KERNEL, Entry, Implementation
from benchmarks.layer import Batch, Weights

ISA = "vec"


def build_experts(weights: Weights, _: mo.Group) -> Implementation:
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    from vllm import _custom_ops as ops

    w13, w2 = (ops.cpu_prepack_moe_weight(weight, ISA) for weight in (weights.w13, weights.w2))

    def run(hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(hidden_states)
        ops.cpu_fused_moe(out, hidden_states, w13, w2, None, None, topk_weights, topk_ids, "silu", ISA)
        return out

    return Implementation(run, _with_int32_ids)


def _with_int32_ids(batch: Batch) -> Sequence[Any]:
    return batch._replace(topk_ids=batch.topk_ids.to(torch.int32))


EXPERTS = Entry("vLLM", build_experts, requires="vllm", modes=(KERNEL,))
