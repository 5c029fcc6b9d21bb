"""Experts on weights that another library's kernel has packed, once, when the model is loaded."""

import torch

from fake_impls.backends.vllm_cpu import check_weights
from fake_impls.checks import FLOATS
from fake_impls.experts import ACTIVATIONS
from moe_ops.backends import vllm_cpu
from moe_ops.types import ExpertWeights, WeightLayout


def prepack_experts(experts: ExpertWeights) -> ExpertWeights:
    """The same experts, packed for the fastest kernel that there is for them; as they are, where that reads plain weights.

    On a CPU that is vLLM's kernel, if vLLM is installed. Packed weights take as much memory as plain ones, and only `moe_stage`
    reads them: drop the plain ones. They have no gradient, and activations are not quantised with them.

    Args:
        experts: in any dtype that experts have; quantised ones come back as they are.

    Returns:
        the experts, `layout` saying how they lie in memory.
    """
    return pack_for_vllm(experts) if why_not_vllm(experts) is None else experts


def why_not_vllm(experts: ExpertWeights) -> str | None:
    """Why vLLM's CPU kernel cannot take these experts; None if it can."""
    w13, w2 = experts.w13, experts.w2
    sizes = w2.shape[1:]
    if experts.layout is not WeightLayout.PLAIN:
        return "they are packed already"
    if w13.device.type != "cpu" or w13.dtype not in FLOATS or w2.dtype != w13.dtype:
        return f"they are {w13.dtype} on {w13.device.type}"
    if experts.activation not in ACTIVATIONS or any(size % vllm_cpu.ALIGNMENT or not size for size in sizes):
        return f"H and I are {tuple(sizes)}, not multiples of {vllm_cpu.ALIGNMENT}"
    return None if vllm_cpu.load() else "vLLM's CPU kernels are not installed"


def pack_for_vllm(experts: ExpertWeights) -> ExpertWeights:
    """Experts that vLLM's CPU kernel reads.

    Raises:
        ValueError: it cannot take them; the message says why. Or a weight or bias does not fit the others.
        TypeError: a dtype differs from that of the other weights.
    """
    reason = why_not_vllm(experts)
    if reason is not None:
        raise ValueError(f"pack_for_vllm: experts must fit vLLM's CPU kernel, but {reason}")
    check_weights(*experts[:4])
    w13, w2 = vllm_cpu.pack(experts.w13), vllm_cpu.pack(experts.w2)
    return experts._replace(w13=w13, w2=w2, layout=WeightLayout.VLLM_CPU)


def run_packed_experts(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: ExpertWeights,
    *,
    first_expert: int,
    is_weighed: bool,
) -> torch.Tensor:
    """The weighted sum of the chosen experts' results, of the experts that are here.

    Args:
        hidden_states: ``[N, H]``.
        topk_ids: int32 or int64 ``[N, K]``, ids of the whole layer; -1, and ids of other ranks' experts, go nowhere.
        topk_weights: float32 ``[N, K]``.
        experts: packed.
        first_expert: id of this rank's first expert.
        is_weighed: whether the weights go into the experts' input instead of on their output.

    Returns:
        ``[N, H]``, zero for rows that have no expert here.
    """
    output: torch.Tensor = vllm_cpu.vllm_cpu_experts(
        hidden_states, topk_ids, topk_weights, first_expert, *experts[:4], experts.activation, is_weighed
    )
    return output
