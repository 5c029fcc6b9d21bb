"""Experts on weights that another library's kernel has packed, once, when the model is loaded."""

import torch
import torch.nn.functional as F

from fake_impls.backends.vllm_cpu import check_weights
from fake_impls.checks import FLOATS
from fake_impls.experts import ACTIVATIONS
from moe_ops.backends import npu, vllm_cpu
from moe_ops.types import ExpertWeights, Quant, WeightLayout


def prepack_experts(experts: ExpertWeights) -> ExpertWeights:
    """The same experts, packed for the fastest kernel that there is for them; as they are, where that reads plain weights.

    On a CPU that is vLLM's kernel, if vLLM is installed; quantised weights come back as they are, and activations are not
    quantised with packed ones. On an Ascend NPU, weights in half precision are transposed, and int8 ones (A2, A3; for
    ``Quant.W8A8``) put in the format of the fused kernel, which ``torch.npu.config.allow_internal_format`` has to allow.

    Packed weights take as much memory as plain ones (on a CPU I is filled up to a multiple of 32), and only the experts read
    them: drop the others. They have no gradient.

    Args:
        experts: in any dtype that experts have.

    Returns:
        the experts, `layout` saying how they lie in memory.
    """
    if npu.is_on_npu(experts.w13):
        return _pack_for_npu(experts)
    return pack_for_vllm(experts) if why_not_vllm(experts) is None else experts


def _pack_for_npu(experts: ExpertWeights) -> ExpertWeights:
    """Half weights, and int8 ones where A2 and A3 have a kernel for them; others are read as they are."""
    is_half = experts.w13.dtype in (torch.bfloat16, torch.float16) and experts.w2.dtype is experts.w13.dtype
    is_int8 = npu.can_run_quantized_experts(experts, Quant.W8A8, torch.bfloat16) and npu.soc_version() < npu.ASCEND_950
    if experts.layout is not WeightLayout.PLAIN or not (is_half or is_int8):
        return experts
    w13, w2 = npu.pack_weights(experts.w13), npu.pack_weights(experts.w2)
    return experts._replace(w13=w13, w2=w2, layout=WeightLayout.NPU)


def why_not_vllm(experts: ExpertWeights) -> str | None:
    """Why vLLM's CPU kernel cannot take these experts; None if it can."""
    w13, w2 = experts.w13, experts.w2
    sizes = w2.shape[1:]
    if experts.layout is not WeightLayout.PLAIN:
        return "they are packed already"
    if w13.device.type != "cpu" or w13.dtype not in FLOATS or w2.dtype != w13.dtype:
        return f"they are {w13.dtype} on {w13.device.type}"
    if experts.activation not in ACTIVATIONS:
        return f"their activation is {experts.activation!r}"
    if sizes[0] % vllm_cpu.ALIGNMENT or not sizes.numel():
        return f"H and I are {tuple(sizes)}, of which H is no multiple of {vllm_cpu.ALIGNMENT}, or one is 0"
    return None if vllm_cpu.load() else "vLLM's CPU kernels are not installed"


def pack_for_vllm(experts: ExpertWeights) -> ExpertWeights:
    """Experts that vLLM's CPU kernel reads; I is filled up with zeros to a multiple of 32, which changes no result.

    Raises:
        ValueError: it cannot take them; the message says why. Or a weight or bias does not fit the others.
        TypeError: a dtype differs from that of the other weights.
    """
    reason = why_not_vllm(experts)
    if reason is not None:
        raise ValueError(f"pack_for_vllm: experts must fit vLLM's CPU kernel, but {reason}")
    check_weights(*experts[:4])
    experts = _fill_up(experts, -experts.w2.shape[2] % vllm_cpu.ALIGNMENT)
    w13, w2 = vllm_cpu.pack(experts.w13), vllm_cpu.pack(experts.w2)
    return experts._replace(w13=w13, w2=w2, layout=WeightLayout.VLLM_CPU)


def _fill_up(experts: ExpertWeights, count: int) -> ExpertWeights:
    """With `count` more zeros in I: of the gate and of up, of which every activation makes zero, and in the inputs of w2."""
    if count == 0:
        return experts
    axis = 1 if experts.activation == "swigluoai" else 2  # gate and up in turn, or one after the other

    def outputs(x_EO: torch.Tensor) -> torch.Tensor:
        parts = x_EO.unflatten(1, (-1, 2) if axis == 1 else (2, -1))
        shape = list(parts.shape)
        shape[axis] = count
        return torch.cat((parts, parts.new_zeros(shape)), axis).flatten(1, 2)

    bias = None if experts.w13_bias is None else outputs(experts.w13_bias)
    return experts._replace(w13=outputs(experts.w13), w2=F.pad(experts.w2, (0, count)), w13_bias=bias)


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
