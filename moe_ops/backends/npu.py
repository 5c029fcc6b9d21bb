"""What torch_npu's fused ops compute of the stage on this rank, in the terms of this library.

A tensor on the device "npu" comes from torch_npu, so its ops are there when these functions are called; nothing is imported.
Each function names the page it relies on: ``torch_npu-<op>.md`` of https://gitcode.com/Ascend/op-plugin, in ``docs/context``.

N rows, K top-k, E experts, R rows for the experts, H hidden, I intermediate, B blocks of 32.
"""

from collections.abc import Callable

import torch

from fake_impls.quantize import BLOCK
from fake_impls.route import RouteSettings
from moe_ops.activations import Activation
from moe_ops.types import Quant

ASCEND_910_93, ASCEND_950 = 250, 260  # Atlas A3, and the chips of A5: torch_npu's SocVersion

TORCH_E4M3 = 24  # torch's number of the dtype, which an int argument of an op takes
NPU_E4M3, NPU_E8M0, NPU_E2M1 = 292, 293, 296  # torch_npu's, of the dtypes that it names itself
BY_CUMSUM, BY_COUNT = 0, 1  # how a group list counts rows
HALVES = (torch.bfloat16, torch.float16)


def soc_version() -> int:
    """The chip, by torch_npu's numbers."""
    version: int = torch.get_device_module("npu").get_soc_version()
    return version


soc_version._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in moe_ops.groups


def is_on_npu(x: torch.Tensor) -> bool:
    """Whether `x` is on an Ascend NPU."""
    return x.device.type == "npu"


def activation_for(x: torch.Tensor, activation: Activation) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The fused op of an activation: there is one."""
    return swiglu if is_on_npu(x) and "npu" in activation.kernels else None


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
        [rows], [weight_EKN], bias=None if bias is None else [bias], **groups_of(counts)
    )[0]
    return result


def groups_of(counts: torch.Tensor) -> dict[str, object]:
    """How rows are grouped: one tensor in and out, split along its rows. A list of one count has to be a cumulative one."""
    list_type = BY_CUMSUM if counts.shape[0] == 1 else BY_COUNT
    return {"group_list": counts, "group_list_type": list_type, "split_item": 2, "group_type": 0}


def can_quantize(x: torch.Tensor, quant: Quant) -> bool:
    """Whether a fused op quantises these rows in this format."""
    if quant in (Quant.W8A8, Quant.W4A8):
        return x.dtype in HALVES
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
        quantized = quantized.view(torch.uint8)
    return quantized, scale_of_pairs(pairs.flatten(1), x.shape[1])


def scale_of_pairs(scale: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Bytes ``[R, even number of blocks] -> float8_e8m0fnu [R, B]``."""
    return scale[:, : -(-hidden_size // BLOCK)].contiguous().view(torch.float8_e8m0fnu)


def gating_can_route(scoring: str, num_experts: int, num_groups: int) -> bool:
    """Whether the fused gating has this form of routing, within its limits on experts and groups."""
    size = num_experts // num_groups
    aligned = -(-size // 32) * 32 * num_groups
    return scoring in ("softmax", "sigmoid") and size > 2 and aligned <= 2048


def gating_top_k(logits_TE: torch.Tensor, settings: RouteSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids ``[N, K]``, int32, and all scores ``[N, E]``, before the bias. Page: npu_moe_gating_top_k.

    The op divides sigmoid scores by their sum, and those of softmax never, whatever the model does; so the scores come from its
    third result. Groups are ranked by their best expert, or with a bias by the sum of their best two.
    """
    bias = settings.e_score_correction_bias
    _, ids_TK, scores_TE = torch.ops.npu.npu_moe_gating_top_k(
        logits_TE,
        settings.top_k,
        bias=None if bias is None else bias.to(logits_TE.dtype),
        k_group=settings.topk_group,
        group_count=settings.num_expert_group,
        group_select_mode=0 if bias is None else 1,
        norm_type=1 if settings.scoring == "sigmoid" else 0,
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
