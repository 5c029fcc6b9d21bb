"""What torch_npu's fused ops compute of the stage on this rank, in the terms of this library.

A tensor on the device "npu" comes from torch_npu, so its ops are there when these functions are called; nothing is imported.
Each function names the page it relies on: ``torch_npu-<op>.md`` of https://gitcode.com/Ascend/op-plugin, in ``docs/context``.

N rows, K top-k, E experts, R rows for the experts, H hidden, I intermediate, B blocks of 32.
"""

import torch

from fake_impls.experts import check_experts
from fake_impls.quantize import BLOCK
from moe_ops.types import ExpertWeights, Quant, WeightLayout

ASCEND_910_93, ASCEND_950 = 250, 260  # Atlas A3, and the chips of A5: torch_npu's SocVersion

TORCH_E4M3 = 24  # torch's number of the dtype, which an int argument of an op takes
NPU_E4M3, NPU_E8M0, NPU_E2M1 = 292, 293, 296  # torch_npu's, of the dtypes that it names itself
BY_CUMSUM, BY_COUNT = 0, 1  # how a group list counts rows
FRACTAL_NZ = 29  # the number of the weight format in npu_format_cast


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # Dynamo need not look into it
def soc_version() -> int:
    """The chip, by torch_npu's numbers."""
    version: int = torch.get_device_module("npu").get_soc_version()
    return version


def is_on_npu(x: torch.Tensor) -> bool:
    """Whether `x` is on an Ascend NPU."""
    return x.device.type == "npu"


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """``[R, 2 * I] -> [R, I]``: SiLU of the first half, times the second. Page: npu_swiglu."""
    result: torch.Tensor = torch.ops.npu.npu_swiglu(x, -1)
    return result


def grouped_linear(
    rows: torch.Tensor, counts: torch.Tensor, weight_EKN: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``[R, K] -> [R, N]``; rows past the last group are not written. Page: npu_grouped_matmul.

    The weight may be a transposed view, which the kernel reads as it is. The bias of bfloat16 rows is float32.
    """
    if bias is not None and rows.dtype is torch.bfloat16:
        bias = bias.to(torch.float32)
    result: torch.Tensor = torch.ops.npu.npu_grouped_matmul(
        [rows], [weight_EKN], bias=None if bias is None else [bias], **_groups(counts)
    )[0]
    return result


def _groups(counts: torch.Tensor) -> dict[str, object]:
    """How rows are grouped: one tensor in and out, split along its rows. A list of one count has to be a cumulative one."""
    list_type = BY_CUMSUM if counts.shape[0] == 1 else BY_COUNT
    return {"group_list": counts, "group_list_type": list_type, "split_item": 2, "group_type": 0}


def can_quantize(x: torch.Tensor, quant: Quant) -> bool:
    """Whether a fused op quantises these rows in this format."""
    if quant in (Quant.W8A8, Quant.W4A8):
        return x.dtype in (torch.bfloat16, torch.float16)
    if quant is Quant.NONE or soc_version() < ASCEND_950 or (x.dtype is torch.float32 and x.shape[1] < BLOCK):
        return False
    return quant is Quant.MXFP8 or x.shape[1] % 2 == 0


def quantize(x: torch.Tensor, quant: Quant) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_activations`. Pages: npu_dynamic_quant, npu_dynamic_mx_quant (scale_alg 0 is the OCP specification).

    MX scales come as ``[N, ceil(B / 2), 2]`` bytes, a pair of blocks at a time, and are laid out as ``[N, B]`` here.
    """
    quantized: torch.Tensor
    if quant in (Quant.W8A8, Quant.W4A8):
        quantized, scale = torch.ops.npu.npu_dynamic_quant(x)
        return quantized, scale
    dtype = NPU_E4M3 if quant is Quant.MXFP8 else NPU_E2M1
    quantized, pairs = torch.ops.npu.npu_dynamic_mx_quant(x, dst_type=dtype)
    if quant is Quant.MXFP4:
        quantized = quantized.view(torch.float4_e2m1fn_x2)
    return quantized, scale_of_pairs(pairs.flatten(1), x.shape[1])


def scale_of_pairs(scale: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Bytes ``[R, even number of blocks] -> float8_e8m0fnu [R, B]``."""
    return scale[:, : -(-hidden_size // BLOCK)].contiguous().view(torch.float8_e8m0fnu)


def gating_can_route(scoring: str, num_experts: int, num_groups: int) -> bool:
    """Whether the fused gating has this form of routing, within its limits on experts and groups."""
    size = num_experts // num_groups
    aligned = -(-size // 32) * 32 * num_groups
    return scoring in ("softmax", "sigmoid") and size > 2 and aligned <= 2048


def gating_top_k(
    logits_TE: torch.Tensor,
    top_k: int,
    scoring: str,
    num_groups: int,
    topk_group: int,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[N, K]``, int32, and all scores ``[N, E]``, before the bias. Page: npu_moe_gating_top_k.

    The op divides sigmoid scores by their sum, and those of softmax never, whatever the model does; so the scores come from its
    third result. Groups are ranked by their best expert, or with a bias by the sum of their best two.
    """
    _, ids_TK, scores_TE = torch.ops.npu.npu_moe_gating_top_k(
        logits_TE,
        top_k,
        bias=None if bias is None else bias.to(logits_TE.dtype),
        k_group=topk_group,
        group_count=num_groups,
        group_select_mode=0 if bias is None else 1,
        norm_type=1 if scoring == "sigmoid" else 0,
        out_flag=True,
    )
    return ids_TK, scores_TE


def init_routing(
    x: torch.Tensor, local_ids_NK: torch.Tensor, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows grouped by expert ``[N * K, H]``, int64 counts ``[E]``, and int32 positions ``[N * K]``, -1 for ids that are E.

    Page: npu_moe_init_routing_v2. Rows past the counts are not written. E is the id of all experts that are elsewhere: one more
    than the active range, whose bounds have to be constants.
    """
    rows, positions, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
        x,
        local_ids_NK,
        active_num=-1,  # all; a number of rows would have to be a constant
        expert_num=num_local_experts + 1,
        expert_tokens_num_type=BY_COUNT,
        expert_tokens_num_flag=True,
        active_expert_range=[0, num_local_experts],
    )
    return rows, counts, positions


def finalize_routing(rows: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``[N * K, H], float32 [N, K], int [N, K] -> [N, H]``, summed in float32. Page: npu_moe_finalize_routing, drop_pad_mode 2.

    Every choice reads a row: one that went nowhere has to have the position of a row of zeros, since what its weight of 0 is
    multiplied with may be infinite.
    """
    summed: torch.Tensor = torch.ops.npu.npu_moe_finalize_routing(
        rows.to(torch.float32),
        None,
        None,
        None,
        weights,
        positions.flatten().to(torch.int32),
        None,
        2,
    )
    return summed.to(rows.dtype)


def can_run_quantized_experts(experts: ExpertWeights, quant: Quant, dtype: torch.dtype) -> bool:
    """Whether quantised products are computed as such: int8, and MXFP8 on A5; SwiGLU without biases."""
    if experts.activation != "silu" or experts.w13_bias is not None or experts.w2_bias is not None:
        return False
    if dtype not in (torch.bfloat16, torch.float16) or experts.w13.dtype is not experts.w2.dtype:
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
    if experts.layout is WeightLayout.NPU:
        inner, inner_scale = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
            rows, [w13], [w13_scale], scale, counts.cumsum(0)
        )
        return _grouped_quantized(inner, inner_scale, counts, w2, w2_scale, dtype)
    gated = _grouped_quantized(rows, scale, counts, w13.transpose(1, 2), w13_scale, dtype)
    inner, inner_scale = torch.ops.npu.npu_dynamic_quant(swiglu(gated))
    return _grouped_quantized(inner, inner_scale, counts, w2.transpose(1, 2), w2_scale, dtype)


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
        **_groups(counts),
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


def pack_weights(weight_ENK: torch.Tensor) -> torch.Tensor:
    """``[E, N, K] -> [E, K, N]``; int8 in the FRACTAL_NZ format, which the fused kernel reads. Page: npu_format_cast."""
    weight_EKN = weight_ENK.transpose(1, 2).contiguous()
    if weight_EKN.dtype is not torch.int8:
        return weight_EKN
    packed: torch.Tensor = torch.ops.npu.npu_format_cast(weight_EKN, FRACTAL_NZ)
    return packed
