"""What the pages of MC2's two halves say that they compute, over gloo ranks; as `documented`.

N rows of a rank (as many on all), K top-k, H hidden, L experts of a rank, W ranks, A = N * W * min(L, K) rows.
"""

from typing import Any

import torch
import torch.distributed as dist

from .documented import ASCEND_950, E4M3_GRID, HALVES, OUTPUTS, Chip, documents, int8_rows, mx_rows, require, unwritten

INFO = 128  # numbers of a row in assist_info_for_combine
communicators: dict[str, dist.ProcessGroup] = {}
"""The process groups by the names of their communicators; a test fills it."""


def gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The tensors of all ranks, which may be of any dtype."""
    gathered = [torch.empty(tensor.numel() * tensor.element_size(), dtype=torch.uint8) for _ in range(group.size())]
    dist.all_gather(gathered, tensor.contiguous().flatten().view(torch.uint8), group=group)
    return [part.view(tensor.dtype).view(tensor.shape) for part in gathered]


def check_axis(
    op: str, ids_NK: torch.Tensor, mask: torch.Tensor | None, hidden: int, num_experts: int, axis: dict[str, Any]
) -> tuple[dist.ProcessGroup, torch.Tensor]:
    """What both halves require of what both are given; the group, and which choices count."""
    group = communicators[axis["group_ep"]]
    num_rows, top_k = ids_NK.shape
    require(
        op,
        (group.size(), group.rank()) == (axis["ep_world_size"], axis["ep_rank_id"]),
        "the size and rank of the group",
    )
    require(op, 2 <= group.size() <= 768 and 1 <= num_experts <= 1024, "2 to 768 ranks and 1 to 1024 experts")
    require(op, num_experts % group.size() == 0, "as many experts on each rank")
    require(op, axis["tp_world_size"] in (0, 1) and axis["tp_rank_id"] == 0, "no second axis here")
    require(op, axis["shared_expert_rank_num"] == axis["expert_shard_type"] == 0, "no ranks of shared experts here")
    require(op, Chip.soc_version >= ASCEND_950 or 1024 <= hidden <= 8192, "H in [1024, 8192]")
    require(op, 0 < num_rows <= 512 and 0 < top_k <= min(16, num_experts), "1 to 512 rows, and 1 to 16 choices")
    rows_of_ranks = [int(count) for count in gather(torch.tensor([num_rows]), group)]
    require(
        op, axis["global_bs"] == 0 and set(rows_of_ranks) == {num_rows}, "as many rows on all ranks, with global_bs 0"
    )
    require(op, ids_NK.dtype is torch.int32 and ((ids_NK >= 0) & (ids_NK < num_experts)).all(), "int32 ids of experts")
    require(op, all(len(set(row)) == top_k for row in ids_NK.tolist()), "different ids in each row")
    if mask is None:
        return group, torch.ones(num_rows, top_k, dtype=torch.bool)
    require(
        op, mask.dtype is torch.bool and mask.shape in ((num_rows,), (num_rows, top_k)), "a bool mask [N] or [N, K]"
    )
    if mask.dim() == 1:
        require(op, not (mask[1:] & ~mask[:-1]).any(), "a mask [N] with all True before all False")
        mask = mask.unsqueeze(1).expand(num_rows, top_k)
    return group, mask.contiguous()


AXIS = (
    "group_ep",
    "ep_world_size",
    "ep_rank_id",
    "tp_world_size",
    "tp_rank_id",
    "shared_expert_rank_num",
    "expert_shard_type",
    "global_bs",
)


def axis_of(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options.pop(name, "" if name.startswith("group") else 0) for name in AXIS}


@documents
def npu_moe_distribute_dispatch_v2(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    x_active_mask: torch.Tensor | None = None,
    expert_scales: torch.Tensor | None = None,
    quant_mode: int = 0,
    expert_token_nums_type: int = 1,
    y_dtype: int | None = None,
    group_tp: str = "",
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    op = "npu_moe_distribute_dispatch_v2"
    axis = axis_of(options | {"group_ep": group_ep, "ep_world_size": ep_world_size, "ep_rank_id": ep_rank_id})
    (num_rows, hidden), top_k, is_a5 = x.shape, expert_ids.shape[1], Chip.soc_version >= ASCEND_950
    group, is_choice = check_axis(op, expert_ids, x_active_mask, hidden, moe_expert_num, axis)
    require(op, x.dtype in HALVES and x.shape[:1] == expert_ids.shape[:1], "bfloat16 or float16 x [N, H]")
    require(
        op, quant_mode in ((0, 2, 4) if is_a5 else (0, 2)) and expert_token_nums_type == 1, "such a mode of the chip"
    )
    require(op, (quant_mode == 4) == (y_dtype is not None), "the dtype of MX elements, and of no others")
    require(op, is_a5 or expert_scales is None, "no expert_scales on A3")
    if quant_mode == 4:
        payload, scale = mx_rows(x, E4M3_GRID, 8)
        dtype = OUTPUTS[y_dtype or 0]
    elif quant_mode == 2:
        payload, scale = int8_rows(x)
        dtype = torch.int8
    else:
        payload, scale, dtype = x, unwritten((num_rows,), torch.float32), x.dtype
    weights = unwritten(expert_ids.shape, torch.float32) if expert_scales is None else expert_scales
    require(op, weights.dtype is torch.float32 and weights.shape == expert_ids.shape, "float32 expert_scales [N, K]")
    sent = [gather(tensor, group) for tensor in (payload, scale, weights, expert_ids, is_choice)]
    local, size = moe_expert_num // group.size(), group.size()
    capacity = num_rows * size * min(local, top_k)
    rows, scales = unwritten((capacity, hidden), payload.dtype), unwritten((capacity, *scale.shape[1:]), scale.dtype)
    expand_scales = unwritten((capacity,) if is_a5 else (0,), torch.float32)
    info = unwritten((max(num_rows * top_k, capacity * INFO),), torch.int32)
    counts, ends, place = torch.zeros(local, dtype=torch.int64), [], 0
    for expert in range(local):
        # Rows of an expert come in no order that a page states.
        for source in reversed(range(size)):
            payload_s, scale_s, weights_s, ids_s, is_choice_s = (gathered[source] for gathered in sent)
            is_here = is_choice_s & (ids_s == group.rank() * local + expert)
            for row, choice in is_here.nonzero().tolist():
                rows[place], scales[place] = payload_s[row], scale_s[row]
                if is_a5:
                    expand_scales[place] = weights_s[row, choice]
                info[place * INFO : place * INFO + 3] = torch.tensor([source, row, choice])
                counts[expert] += 1
                place += 1
            ends.append(place)
    receive_counts = torch.tensor(ends, dtype=torch.int32)
    return rows.view(dtype), scales, info, counts, receive_counts, unwritten((1,), torch.int32), expand_scales


@documents
def npu_moe_distribute_combine_v2(
    expand_x: torch.Tensor,
    expert_ids: torch.Tensor,
    assist_info_for_combine: torch.Tensor,
    ep_send_counts: torch.Tensor,
    expert_scales: torch.Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    *,
    tp_send_counts: torch.Tensor | None = None,
    x_active_mask: torch.Tensor | None = None,
    expand_scales: torch.Tensor | None = None,
    group_tp: str = "",
    **options: Any,
) -> torch.Tensor:
    op = "npu_moe_distribute_combine_v2"
    axis = axis_of(options | {"group_ep": group_ep, "ep_world_size": ep_world_size, "ep_rank_id": ep_rank_id})
    group, is_choice = check_axis(op, expert_ids, x_active_mask, expand_x.shape[1], moe_expert_num, axis)
    local = moe_expert_num // group.size()
    capacity = expert_ids.shape[0] * group.size() * min(local, expert_ids.shape[1])
    require(op, expand_x.dtype in HALVES and len(expand_x) == capacity, "bfloat16 or float16 rows [A, H]")
    require(
        op, expert_scales.dtype is torch.float32 and expert_scales.shape == expert_ids.shape, "float32 weights [N, K]"
    )
    require(
        op, ep_send_counts.dtype is torch.int32 and ep_send_counts.shape == (group.size() * local,), "dispatch's counts"
    )
    require(op, (expand_scales is not None) == (Chip.soc_version >= ASCEND_950), "expand_scales on A5 alone")
    returned = [gather(tensor, group) for tensor in (expand_x, assist_info_for_combine, ep_send_counts)]
    came_back: dict[tuple[int, int], torch.Tensor] = {}
    for rows, info, ends in zip(*returned, strict=True):
        for place in range(int(ends[-1])):
            source, row, choice = info[place * INFO : place * INFO + 3].tolist()
            if source == group.rank():
                came_back[row, choice] = rows[place]
    require(op, sorted(came_back) == [tuple(place) for place in is_choice.nonzero().tolist()], "the mask of dispatch")
    result = unwritten((len(expert_ids), expand_x.shape[1]), expand_x.dtype)
    for row, is_choice_K in enumerate(is_choice.tolist()):
        total_H = torch.zeros(expand_x.shape[1])
        for choice, counts in enumerate(is_choice_K):
            if counts:
                total_H += came_back[row, choice].float() * expert_scales[row, choice]
        if any(is_choice_K):
            result[row] = total_H.to(expand_x.dtype)
    return result
