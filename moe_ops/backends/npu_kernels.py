"""Kernels for Ascend NPUs of the ops that compute: torch_npu's fused ops where they have the op's meaning, else the portable
kernel. Both are made of ops that torch_npu converts to its graphs, so either may stand in a graph in place of the op."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fake_impls.route import RouteSettings
from moe_ops import experts, quantize  # noqa: F401  # which define the ops
from moe_ops._library import KERNELS, PORTABLE, add_kernel, is_known
from moe_ops.backends import npu
from moe_ops.dispatchers.local import sources
from moe_ops.route import choose_by_sorting, route_kernel
from moe_ops.types import Quant

KEY = "PrivateUse1"  # the dispatch key that torch_npu takes
ROUTABLE = (torch.bfloat16, torch.float16, torch.float32, torch.int8)
"""Dtypes that npu_moe_init_routing_v2 takes."""


def _quantize(x: torch.Tensor, quant: Quant, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if npu.can_quantize(x, quant):
        return npu.quantize(x, quant)
    quantized, scale = KERNELS[name][PORTABLE](x)
    return quantized, scale


def _quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize(x, Quant.W8A8, "quantize_int8")


def _quantize_mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize(x, Quant.MXFP8, "quantize_mxfp8")


def _quantize_mxfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize(x, Quant.MXFP4, "quantize_mxfp4")


def _choose(
    logits_TE: torch.Tensor, is_active_T1: torch.Tensor | None, settings: RouteSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    if not npu.gating_can_route(settings.scoring, logits_TE.shape[1], settings.num_expert_group):
        return choose_by_sorting(logits_TE, is_active_T1, settings)
    # The op need not return ids of experts for rows with NaN, which those that are not active may hold, too.
    is_nan_T1 = (logits_TE != logits_TE).any(dim=1, keepdim=True)  # torchair converts no isnan
    is_usable_T1 = ~is_nan_T1 if is_active_T1 is None else is_active_T1 & ~is_nan_T1
    ids_TK, scores_TE = npu.gating_top_k(torch.where(is_usable_T1, logits_TE, 0.0), settings)
    return ids_TK, torch.where(is_nan_T1, torch.nan, scores_TE)


def _permute(
    tensors: Sequence[torch.Tensor], topk_ids: torch.Tensor, first_expert: int, num_local_experts: int
) -> list[torch.Tensor]:
    num_rows, top_k = topk_ids.shape
    local_NK = topk_ids - first_expert
    is_local_NK = (local_NK >= 0) & (local_NK < num_local_experts)
    local_NK = torch.where(is_local_NK, local_NK, num_local_experts).to(torch.int32)
    routable = [tensor for tensor in tensors if tensor.dim() == 2 and tensor.dtype in ROUTABLE]
    carrier = routable[0] if routable else topk_ids.new_zeros(num_rows, 1, dtype=torch.int8)
    rows, counts, positions_R = npu.init_routing(carrier, local_NK, num_local_experts)
    positions_NK = torch.where(is_local_NK, positions_R.view(num_rows, top_k), -1).to(torch.int64)
    source_R = sources(positions_NK, num_rows * top_k).clamp(max=num_rows - 1)
    carried = next((index for index, tensor in enumerate(tensors) if tensor is carrier), None)
    permuted = [rows if index == carried else tensor.index_select(0, source_R) for index, tensor in enumerate(tensors)]
    return [*permuted, counts, positions_NK]


def _unpermute(rows: torch.Tensor, weights: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
    num_choices = positions.shape[0] * positions.shape[1]
    # The op takes one row for each choice; without weights the sum is over ranks, and K small.
    if weights is None or not is_known(rows.shape[0] == num_choices) or not rows.shape[0]:
        summed: torch.Tensor = KERNELS["unpermute"][PORTABLE](rows, weights, positions)
        return summed
    # Rows that no choice went to may hold NaN, and so may weights of choices that went nowhere. For any such choice there is
    # such a row, whose zeros it reads.
    went_NK = positions >= 0
    is_used_R = sources(positions, rows.shape[0]) < positions.shape[0]
    place_R = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32)
    unused = torch.where(is_used_R, 0, place_R).amax(dim=0)
    filled = torch.where(is_used_R.unsqueeze(1), rows, 0)
    return npu.finalize_routing(filled, torch.where(went_NK, weights, 0.0), torch.where(went_NK, positions, unused))


def _grouped_linear(
    rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    # float32 rows of float16 weights: the kernel takes one dtype, and so rounds its results to float16.
    bias = bias if bias is None else bias.to(weight.dtype)
    return npu.grouped_linear(rows.to(weight.dtype), counts, weight.transpose(1, 2), bias).to(rows.dtype)


def _on_npu(name: str, kernel: Callable[..., Any], *args: Any) -> Any:
    """Other devices may have the same dispatch key."""
    first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    return kernel(*args) if npu.is_on_npu(first) else KERNELS[name][PORTABLE](*args)


for _name, _kernel in (
    ("quantize_int8", _quantize_int8),
    ("quantize_mxfp8", _quantize_mxfp8),
    ("quantize_mxfp4", _quantize_mxfp4),
    ("route", partial(route_kernel, _choose)),
    ("permute_by_expert", _permute),
    ("unpermute", _unpermute),
    ("grouped_linear", _grouped_linear),
):
    add_kernel(_name, partial(_on_npu, _name, _kernel), KEY)
