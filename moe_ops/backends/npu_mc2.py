"""The exchange of a fixed capacity by MC2, which sends rows straight to their experts and sums what comes back.

Pages: ``torch_npu-npu_moe_distribute_dispatch_v2.md`` and ``..._combine_v2.md`` of https://gitcode.com/Ascend/op-plugin, in
``docs/context``. For Atlas A3 and the chips of A5; on A2 the mask of the op is one flag a row, first all that are True, which
cannot say that a single choice goes nowhere, so the portable exchange serves A2.

N rows of this rank (as many on all ranks), K top-k, H hidden, E experts of a rank, W ranks, A = N * W * min(E, K) rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.distributed_c10d import GroupName

from fake_impls.checks import check_at_least, check_at_most
from moe_ops._library import is_known
from moe_ops.backends.npu import ASCEND_910_93, ASCEND_950, BY_COUNT, TORCH_E4M3, is_on_npu, scale_of_pairs, soc_version
from moe_ops.groups import Group, check_group
from moe_ops.types import Quant

MAX_ROWS, MAX_TOP_K = 512, 16
MIN_WIDTH, MAX_WIDTH = 1024, 8192  # of a row, on A3
QUANT_MODES = {Quant.NONE: 0, Quant.W8A8: 2, Quant.W4A8: 2, Quant.MXFP8: 4}


class FusedExchange(NamedTuple):
    """The two halves of an exchange, each of which is one op; see `dispatch` and `combine`."""

    dispatch: Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, "Mc2State"]]
    combine: Callable[..., torch.Tensor]


class Mc2State(NamedTuple):
    """What combine needs of dispatch. The kernel's own tensors mean nothing to anything but its other half.

    Attributes:
        topk_ids: int32 ``[N, K]``, all of them experts.
        topk_weights: float32 ``[N, K]``.
        is_choice: bool ``[N, K]``, which of them count.
        assist_info: int32, of the kernel.
        receive_counts: int32, of the kernel.
        tp_receive_counts: int32, of the kernel.
        expand_scales: float32 ``[A]`` of the kernel on A5, else None.
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    is_choice: torch.Tensor
    assist_info: torch.Tensor
    receive_counts: torch.Tensor
    tp_receive_counts: torch.Tensor
    expand_scales: torch.Tensor | None


def can_exchange(x: torch.Tensor, rows: int, top_k: int, quant: Quant) -> bool:
    """Whether MC2 takes rows like these, of which every rank brings `rows`. It has no gradient, and no form for no rows.

    All ranks have to decide alike, so how many rows `x` has says nothing. A count that the compiler does not know is held
    to fit, and checked when the code runs.
    """
    if not is_on_npu(x) or x.dtype not in (torch.bfloat16, torch.float16) or quant not in QUANT_MODES:
        return False
    if soc_version() < (ASCEND_950 if quant is Quant.MXFP8 else ASCEND_910_93):
        return False
    if top_k > MAX_TOP_K or (soc_version() < ASCEND_950 and not MIN_WIDTH <= x.shape[1] <= MAX_WIDTH):
        return False
    if isinstance(rows, int) and not torch.compiler.is_dynamo_compiling():
        return 0 < rows <= MAX_ROWS
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return guard_or_true(rows <= MAX_ROWS) and not is_known(rows == 0)


def dispatch(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    num_local_experts: int,
    ep: Group,
    quant: Quant,
    has_gaps: bool,
    may_repeat: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, Mc2State]:
    """Send each row to its experts: rows ``[A, H]`` grouped by expert, their scales, counts ``[E]``, and the state.

    All ranks bring as many rows. Choices that are -1 go nowhere; without `has_gaps` they are all of a row, or none. With
    `may_repeat` an expert may stand in a row more than once. Only the first ``counts.sum()`` rows are written. Quantised on the
    way, if asked to.

    Raises:
        ValueError: more rows or choices than the kernel takes.
    """
    check_group("dispatch", "ep", ep.name, ep.size, ep.rank)
    check_at_least("dispatch", "rows of a rank", x.shape[0], 1, "what MC2 takes")
    check_at_most("dispatch", "rows of a rank", x.shape[0], MAX_ROWS, "those that MC2 takes")
    num_experts = num_local_experts * ep.size
    check_at_most("dispatch", "top_k", topk_ids.shape[1], min(MAX_TOP_K, num_experts), "that of MC2")
    if may_repeat:
        topk_ids, topk_weights = _merge_repeated(topk_ids, topk_weights)
    is_choice_NK = topk_ids >= 0
    # Ids have to be experts, and different ones in each row, masked or not.
    if has_gaps:
        spare_NK = _free_experts(topk_ids, is_choice_NK, num_experts)
    else:
        spare_NK = torch.arange(topk_ids.shape[1], device=topk_ids.device, dtype=torch.int32)
    ids_NK = torch.where(is_choice_NK, topk_ids.to(torch.int32), spare_NK)
    arguments = _axis(num_local_experts, ep)
    is_a5 = soc_version() >= ASCEND_950
    if is_a5:
        arguments["expert_scales"] = topk_weights
    if quant is Quant.MXFP8:
        arguments["y_dtype"] = TORCH_E4M3
    rows, scale, assist_info, counts, receive_counts, tp_receive_counts, expand_scales = (
        torch.ops.npu.npu_moe_distribute_dispatch_v2(
            x,
            ids_NK,
            x_active_mask=is_choice_NK,
            quant_mode=QUANT_MODES[quant],
            expert_token_nums_type=BY_COUNT,
            **arguments,
        )
    )
    if quant is Quant.NONE:
        scale = None
    elif quant is Quant.MXFP8:
        scale = scale_of_pairs(scale.view(torch.uint8), x.shape[1])
    state = Mc2State(
        ids_NK,
        topk_weights,
        is_choice_NK,
        assist_info,
        receive_counts,
        tp_receive_counts,
        # Without expert_scales the kernel returns [A], and its meta function [0]: not to be used.
        expand_scales if is_a5 else None,
    )
    return rows, scale, counts, state


def _merge_repeated(topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each expert of a row once, with the sum of its weights; -1 in the other places."""
    top_k = topk_ids.shape[1]
    is_same_NKK = topk_ids.unsqueeze(2) == topk_ids.unsqueeze(1)
    place_K = torch.arange(top_k, device=topk_ids.device)
    is_before_KK = place_K.unsqueeze(0) < place_K.unsqueeze(1)
    is_repeated_NK = (is_same_NKK & is_before_KK).any(dim=2)
    summed_NK = torch.where(is_same_NKK, topk_weights.unsqueeze(1), 0.0).sum(dim=2)
    return torch.where(is_repeated_NK, -1, topk_ids), summed_NK


def _free_experts(topk_ids: torch.Tensor, is_choice_NK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int32 ``[N, K]``: for each choice of nothing an expert that its row has not, a different one for each."""
    top_k = topk_ids.shape[1]
    # Of twice as many candidates as there are choices, half are free in any row, or all that there are else.
    candidate_C = torch.arange(min(2 * top_k, num_experts), device=topk_ids.device, dtype=torch.int32)
    is_taken_NC = (topk_ids.unsqueeze(2) == candidate_C).any(dim=1)
    free_NC = torch.sort(is_taken_NC, dim=1, stable=True).indices
    which_NK = (~is_choice_NK).to(torch.int64).cumsum(1) - 1
    return free_NC.gather(1, which_NK.clamp(min=0)).to(torch.int32)


def combine(expert_rows: torch.Tensor, state: Mc2State, *, num_local_experts: int, ep: Group) -> torch.Tensor:
    """``[A, H] -> [N, H]``: weigh and sum what the experts made of each row; zero for rows that went nowhere."""
    arguments = _axis(num_local_experts, ep)
    if state.expand_scales is not None:
        arguments["expand_scales"] = state.expand_scales
    summed: torch.Tensor = torch.ops.npu.npu_moe_distribute_combine_v2(
        expert_rows,
        state.topk_ids,
        state.assist_info,
        state.receive_counts,
        state.topk_weights,
        tp_send_counts=state.tp_receive_counts,
        x_active_mask=state.is_choice,
        **arguments,
    )
    return torch.where(state.is_choice.any(dim=1, keepdim=True), summed, 0)  # other rows are not written


def _axis(num_local_experts: int, ep: Group) -> dict[str, object]:
    """The group, and how it is used: no experts that ranks share, and no second axis (given as one of a single rank, as
    vllm-ascend does on these chips). global_bs 0: all ranks bring as many rows, which a mask needs."""
    communicator = hccl_communicator(ep.name, ep.rank)
    return {
        "group_ep": communicator,
        "ep_world_size": ep.size,
        "ep_rank_id": ep.rank,
        "moe_expert_num": num_local_experts * ep.size,
        "group_tp": communicator,
        "tp_world_size": 1,
        "tp_rank_id": 0,
        "expert_shard_type": 0,
        "shared_expert_rank_num": 0,
        "global_bs": 0,
    }


def hccl_communicator(group: str, rank: int) -> str:
    """The name of a process group's HCCL communicator, which fused ops go by."""
    backend = _resolve_process_group(GroupName(group))._get_backend(torch.device("npu"))
    name: str = backend.get_hccl_comm_name(rank)  # type: ignore[attr-defined]
    return name


hccl_communicator._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in moe_ops.groups
EXCHANGE = FusedExchange(dispatch, combine)
