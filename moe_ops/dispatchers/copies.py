"""Copies of rows for other ranks: one for each rank that has an expert of the row, however many experts it has there.

Ids and weights travel with the hidden states (8 K bytes a row), so the rank that has the experts weighs and sums their results
before it sends one row back. N rows of this rank, K top-k, H hidden, W ranks, B bytes of a packed row.
"""

from collections.abc import Sequence

import torch

from fake_impls.dispatchers import copies as shapes
from moe_ops._library import define
from moe_ops.collectives import pack_rows


def _plan_copies(
    topk_ids: torch.Tensor, num_local_experts: int, size: int, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    shapes.check_plan(topk_ids, num_local_experts, capacity)
    rank_NK = topk_ids.to(torch.int64).div(num_local_experts, rounding_mode="floor")  # -1 stays -1
    rank_NK = torch.where((topk_ids >= 0) & (rank_NK < size), rank_NK, size)
    goes_NW = torch.zeros(topk_ids.shape[0], size + 1, dtype=torch.int64, device=topk_ids.device)
    goes_NW = goes_NW.scatter_(1, rank_NK, 1)[:, :size]
    slots_NW = goes_NW.cumsum(0) - 1
    counts_W = goes_NW.sum(0)
    if capacity is None:
        positions_NW = slots_NW + (counts_W.cumsum(0) - counts_W)
    else:
        goes_NW = goes_NW * (slots_NW < capacity)
        positions_NW = slots_NW + torch.arange(size, device=topk_ids.device) * capacity
    positions_NW = torch.where(goes_NW > 0, positions_NW, -1)
    return positions_NW.clone(memory_format=torch.contiguous_format), counts_W


def _pack_copies(
    tensors: Sequence[torch.Tensor], positions: torch.Tensor, rows: int, fill: Sequence[int]
) -> torch.Tensor:
    shapes.check_copies(tensors, positions)
    num_rows = positions.shape[0]
    # One row more than there are, which is the fill: places that no copy takes are copies of it.
    packed_NB = pack_rows(tensors, num_rows + 1, fill)
    source_S = positions.new_full((rows + 1,), num_rows)  # one place more, for copies that go nowhere
    places_NW = torch.where(positions >= 0, positions, rows)
    row_NW = torch.arange(num_rows, device=positions.device).unsqueeze(1).expand_as(positions)
    source_S.scatter_(0, places_NW.flatten(), row_NW.flatten())
    copies_SB: torch.Tensor = packed_NB.index_select(0, source_S[:rows])
    return copies_SB


plan_copies = define(
    "plan_copies(Tensor topk_ids, int num_local_experts, int size, SymInt? capacity) -> (Tensor, Tensor)",
    kernel=_plan_copies,
    fake=shapes.plan_copies,
)
pack_copies = define(
    "pack_copies(Tensor[] tensors, Tensor positions, SymInt rows, int[] fill) -> Tensor",
    kernel=_pack_copies,
    fake=shapes.pack_copies,
)
