"""What a device, or another library's kernel, does in its own way: the questions that steps ask.

A step asks for the way of the device to do a thing and gets a function, or None: then it does it as everywhere. So no step
names a device, and a new one is a module beside these and an answer here. (An op that has a kernel for a device needs no
question: see `moe_ops._library.add_kernel`.)
"""

from collections.abc import Callable

import torch

from moe_ops.activations import Activation
from moe_ops.backends import npu, npu_experts, npu_mc2, vllm_cpu
from moe_ops.backends.npu_experts import RunExperts
from moe_ops.backends.npu_mc2 import FusedExchange as FusedExchange
from moe_ops.backends.vllm_cpu import RunRows
from moe_ops.types import ExpertWeights, Quant, WeightLayout


def activation_for(x: torch.Tensor, activation: Activation) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What computes an activation, ``[R, 2 * I] -> [R, I]``, in one op."""
    return npu.activation_for(x, activation)


def experts_for(experts: ExpertWeights, rows: torch.Tensor, quant: Quant, dtype: torch.dtype) -> RunExperts | None:
    """What computes quantised experts of rows that are grouped by expert, with results of `dtype`."""
    return npu_experts.experts_for(experts, rows, quant, dtype)


def product_for(experts: ExpertWeights) -> Callable[..., torch.Tensor] | None:
    """What multiplies rows that are grouped by expert with packed weights: as the op ``grouped_linear`` with plain ones."""
    return npu.grouped_linear if experts.layout is WeightLayout.NPU else None


def row_experts_for(experts: ExpertWeights) -> RunRows | None:
    """What groups rows by expert, computes the experts, and weighs and sums the results, all in one kernel."""
    return vllm_cpu.run_rows if experts.layout is WeightLayout.VLLM_CPU else None


def packer_for(experts: ExpertWeights) -> Callable[[ExpertWeights], ExpertWeights] | None:
    """What packs these experts for a faster kernel."""
    return npu_experts.packer_for(experts) or vllm_cpu.packer_for(experts)


def exchange_for(x: torch.Tensor, rows: int, top_k: int, quant: Quant) -> FusedExchange | None:
    """What sends rows to their experts and sums what comes back in one op each, where every rank brings `rows` of them. It has
    no gradient."""
    return npu_mc2.EXCHANGE if npu_mc2.can_exchange(x, rows, top_k, quant) else None
