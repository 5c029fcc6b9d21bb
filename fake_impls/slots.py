"""Shapes of the slots of experts. T tokens, E experts, K top-k, R copies of an expert."""

import torch

from fake_impls.checks import check_dtype
from fake_impls.route import IDS, check_ids


def map_to_physical(topk_ids: torch.Tensor, logical_to_physical: torch.Tensor, num_slots: int) -> torch.Tensor:
    """``int [T, K], int [E] or [E, R] -> int32 [T, K]``."""
    return topk_ids.new_empty(topk_ids.shape, dtype=torch.int32)


def check_map_to_physical(topk_ids: torch.Tensor, logical_to_physical: torch.Tensor, num_slots: int) -> None:
    check_ids("route", topk_ids)
    check_dtype("route", "logical_to_physical", logical_to_physical, IDS)
    if logical_to_physical.dim() not in (1, 2):
        raise ValueError(f"route: logical_to_physical must be 1-D or 2-D, got {logical_to_physical.dim()}-D")
