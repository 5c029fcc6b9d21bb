"""The ops between prepare and finalize, written out by hand: the same results in as few aten calls, without checks.

T tokens, H hidden, E experts, K top-k, W ranks, R = T * K rows, B bytes of a packed row.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def route(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores_TE = logits_TE.softmax(1)
    chosen_TK = scores_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    weights_TK = scores_TE.gather(1, chosen_TK)
    return weights_TK / weights_TK.sum(1, keepdim=True), chosen_TK.to(torch.int32)


def permute_by_expert(x_TH: torch.Tensor, ids_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    ids_R = ids_TK.flatten().to(torch.int64)
    order_R = ids_R.argsort(stable=True)
    counts_E = ids_R.new_zeros(num_experts).scatter_add_(0, ids_R, torch.ones_like(ids_R))
    positions_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.shape[0]))
    return x_TH.index_select(0, order_R // ids_TK.shape[1]), counts_E, positions_R.view(ids_TK.shape)


def unpermute(rows_RH: torch.Tensor, weights_TK: torch.Tensor, positions_TK: torch.Tensor) -> torch.Tensor:
    total_TH = rows_RH.new_zeros(positions_TK.shape[0], rows_RH.shape[1], dtype=torch.float32)
    for choice, positions_T in enumerate(positions_TK.unbind(1)):
        total_TH += rows_RH.index_select(0, positions_T).to(torch.float32) * weights_TK[:, choice].unsqueeze(1)
    return total_TH.to(rows_RH.dtype)


def plan_copies(ids_TK: torch.Tensor, num_local_experts: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rank_TK = ids_TK.to(torch.int64).div(num_local_experts, rounding_mode="floor")
    goes_TW = torch.zeros(ids_TK.shape[0], size, dtype=torch.int64).scatter_(1, rank_TK, 1)
    counts_W = goes_TW.sum(0)
    return torch.where(goes_TW > 0, goes_TW.cumsum(0) - 1 + (counts_W.cumsum(0) - counts_W), -1), counts_W


def pack_copies(tensors: Sequence[torch.Tensor], positions_TW: torch.Tensor, rows: int) -> torch.Tensor:
    source_S = positions_TW.new_empty(rows + 1)
    row_TW = torch.arange(positions_TW.shape[0]).unsqueeze(1).expand_as(positions_TW)
    source_S.scatter_(0, torch.where(positions_TW >= 0, positions_TW, rows).flatten(), row_TW.flatten())
    return pack_rows(tensors).index_select(0, source_S[:rows])


def pack_rows(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors], dim=1)


def unpack_rows(packed_TB: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    widths = [tensor.shape[1] * tensor.element_size() for tensor in like]
    parts = packed_TB.split(widths, dim=1)
    return [part.contiguous().view(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]


def grouped_linear(rows_RH: torch.Tensor, counts_E: torch.Tensor, weight_ENH: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(rows_RH, weight_ENH.transpose(1, 2), offs=counts_E.cumsum(0, dtype=torch.int32))
