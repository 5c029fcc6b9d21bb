"""Experts on an NPU: on quantised values, and weights that are packed for its kernels.

Pages as in `npu`. R rows, E experts, H hidden, I intermediate, B blocks of 32.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch

from fake_impls.experts import check_experts
from fake_impls.quantize import BLOCK
from moe_ops.activations import activation_named
from moe_ops.backends.npu import ASCEND_950, HALVES, NPU_E8M0, TORCH_E4M3, groups_of, is_on_npu, soc_version, swiglu
from moe_ops.types import ExpertWeights, Quant, WeightLayout

FRACTAL_NZ = 29  # the number of the weight format in npu_format_cast

RunExperts: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights, torch.dtype], torch.Tensor]
"""Of quantised rows ``[R, H]``, scales, the counts of each expert, the experts, and the dtype of the result: ``[R, H]``."""


def can_run_quantized_experts(experts: ExpertWeights, quant: Quant, dtype: torch.dtype) -> bool:
    """Whether quantised products are computed as such: int8, and MXFP8 on A5; SwiGLU without biases."""
    if "npu" not in activation_named(experts.activation).kernels:
        return False
    if experts.w13_bias is not None or experts.w2_bias is not None:
        return False
    if dtype not in HALVES or experts.w13.dtype is not experts.w2.dtype:
        return False
    if quant is Quant.W8A8:
        return experts.w13.dtype is torch.int8
    pairs = 2 * BLOCK  # the kernels take scales in pairs
    return (
        quant is Quant.MXFP8
        and experts.w13.dtype is torch.float8_e4m3fn
        and soc_version() >= ASCEND_950
        and experts.w13.shape[2] % pairs == 0
        and experts.w2.shape[2] % pairs == 0
    )


def experts_for(experts: ExpertWeights, rows: torch.Tensor, quant: Quant, dtype: torch.dtype) -> RunExperts | None:
    """What computes these experts of rows that are grouped by expert, if one kernel does."""
    is_ours = is_on_npu(rows) and can_run_quantized_experts(experts, quant, dtype)
    return run_quantized_experts if is_ours else None


def run_quantized_experts(
    rows: torch.Tensor, scale: torch.Tensor, counts: torch.Tensor, experts: ExpertWeights, dtype: torch.dtype
) -> torch.Tensor:
    """Both products on quantised values. Pages: npu_grouped_matmul_swiglu_quant_v2 (whose group list is cumulative here),
    npu_grouped_matmul, npu_swiglu, npu_dynamic_quant.

    For bfloat16 results npu_grouped_matmul takes the weights' int8 scales in bfloat16: they are rounded.
    """
    w13, w2 = experts.w13, experts.w2
    w13_scale, w2_scale = experts.w13_scale, experts.w2_scale
    if experts.layout is WeightLayout.PLAIN:
        check_experts(counts, w13, w2)
    if w13_scale is None or w2_scale is None:
        raise ValueError("experts: w13_scale and w2_scale must be given with quantised weights, got None")
    if w13.dtype is torch.float8_e4m3fn:
        return _run_mx(rows, scale, counts, w13, w13_scale, w2, w2_scale, dtype)
    if experts.layout is WeightLayout.NPU:
        inner, inner_scale = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
            rows, [w13], [w13_scale], scale, counts.cumsum(0)
        )
        return _grouped_quantized(inner, inner_scale, counts, w2, w2_scale, dtype)
    gated = _grouped_quantized(rows, scale, counts, w13.transpose(1, 2), w13_scale, dtype)
    inner, inner_scale = torch.ops.npu.npu_dynamic_quant(swiglu(gated))
    return _grouped_quantized(inner, inner_scale, counts, w2.transpose(1, 2), w2_scale, dtype)


def _run_mx(
    rows: torch.Tensor,
    scale: torch.Tensor,
    counts: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    inner, inner_scale = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
        rows,
        [w13.transpose(1, 2)],
        [_weight_pairs(w13_scale)],
        _pairs(scale),
        counts.cumsum(0),
        dequant_mode=2,
        quant_mode=2,
        quant_dtype=TORCH_E4M3,
        weight_scale_dtype=NPU_E8M0,
        x_scale_dtype=NPU_E8M0,
    )
    return _grouped_quantized(
        inner,
        inner_scale,
        counts,
        w2.transpose(1, 2),
        _weight_pairs(w2_scale),
        dtype,
        scale_dtype=NPU_E8M0,
        per_token_scale_dtype=NPU_E8M0,
    )


def _grouped_quantized(
    rows: torch.Tensor,
    row_scale: torch.Tensor,
    counts: torch.Tensor,
    weight_EKN: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
    **scale_dtypes: int,
) -> torch.Tensor:
    if weight_scale.dtype is torch.float32 and dtype is torch.bfloat16:
        weight_scale = weight_scale.to(torch.bfloat16)
    result: torch.Tensor = torch.ops.npu.npu_grouped_matmul(
        [rows],
        [weight_EKN],
        scale=[weight_scale],
        per_token_scale=[row_scale],
        output_dtype=15 if dtype is torch.bfloat16 else 5,  # torch's numbers
        **groups_of(counts),
        **scale_dtypes,
    )[0]
    return result


def _pairs(scale: torch.Tensor) -> torch.Tensor:
    """``float8_e8m0fnu [..., B] -> bytes [..., B / 2, 2]``."""
    pairs: torch.Tensor = scale.view(torch.uint8).unflatten(-1, (-1, 2))
    return pairs


def _weight_pairs(scale: torch.Tensor) -> torch.Tensor:
    """``[E, N, B] -> bytes [E, B / 2, N, 2]``."""
    return _pairs(scale).transpose(1, 2)


def packer_for(experts: ExpertWeights) -> Callable[[ExpertWeights], ExpertWeights] | None:
    """What packs these experts: half weights, and int8 ones where A2 and A3 have a kernel for them."""
    if not is_on_npu(experts.w13) or experts.layout is not WeightLayout.PLAIN:
        return None
    is_half = experts.w13.dtype in HALVES and experts.w2.dtype is experts.w13.dtype
    is_int8 = can_run_quantized_experts(experts, Quant.W8A8, torch.bfloat16) and soc_version() < ASCEND_950
    return _pack if is_half or is_int8 else None


def _pack(experts: ExpertWeights) -> ExpertWeights:
    w13, w2 = pack_weights(experts.w13), pack_weights(experts.w2)
    return experts._replace(w13=w13, w2=w2, layout=WeightLayout.NPU)


def pack_weights(weight_ENK: torch.Tensor) -> torch.Tensor:
    """``[E, N, K] -> [E, K, N]``; int8 in the FRACTAL_NZ format, which the fused kernel reads. Page: npu_format_cast."""
    weight_EKN = weight_ENK.transpose(1, 2).contiguous()
    if weight_EKN.dtype is not torch.int8:
        return weight_EKN
    packed: torch.Tensor = torch.ops.npu.npu_format_cast(weight_EKN, FRACTAL_NZ)
    return packed
