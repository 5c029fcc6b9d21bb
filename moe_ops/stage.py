"""The whole stage, composed of its steps: prepare -> route -> dispatch -> experts -> combine -> finalize."""

from collections.abc import Sequence

import torch

from fake_impls.layout import common_rows
from moe_ops.dispatchers.all_to_all import combine_all_to_all, dispatch_all_to_all
from moe_ops.dispatchers.local import combine_local, dispatch_local
from moe_ops.experts import run_experts
from moe_ops.groups import Group, ParallelGroups
from moe_ops.route import route
from moe_ops.strategies import active_rows, allgather, finalize, prepare
from moe_ops.types import ExpertWeights, PrepareOutput, Routing, Strategy


def moe_stage(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    experts: ExpertWeights,
    *,
    routing: Routing,
    strategy: Strategy,
    groups: ParallelGroups,
    reduce_results: bool = False,
    padded_num_tokens: int | None = None,
    mc2_mask: torch.Tensor | None = None,
    max_tokens_across_dp: int | None = None,
    max_tokens_across_pcp: int | None = None,
    num_tokens_across_ep: Sequence[int] | None = None,
    tokens_are_sharded: bool = False,
    shared_expert_dp: bool = False,
) -> torch.Tensor:
    """Run this rank's part of a MoE layer. Rows that pad are routed nowhere and change no real row.

    ALL2ALL and MC2 exchange rows by an even all-to-all over EP, for which all its ranks need the same number of rows: MC2
    has it by contract; ALL2ALL takes it from `max_tokens_across_dp` (from `num_tokens_across_ep` when sharded), or holds the
    counts to be equal where that is None. ALLGATHER routes before it gathers, so that ids and weights travel (8 K bytes a
    token) and not logits (4 E).

    Args:
        hidden_states: ``[T, H]`` float32, bfloat16 or float16.
        router_logits: ``[T, E]``.
        experts: this rank's experts, ``E / EP`` of them. Without an EP group: all experts, their intermediate axis
            sharded over DP x PCP x TP.
        routing: how experts are chosen.
        strategy: how tokens reach the ranks of their experts.
        groups: the process groups.
        reduce_results: as in `finalize`: the ALLGATHER DP form returns one TP rank's summand without it.
        padded_num_tokens: as in `prepare`.
        mc2_mask: as in `prepare`. Tokens that it excludes come back as zero.
        max_tokens_across_dp: as in `prepare`; ALL2ALL: the largest T of any rank.
        max_tokens_across_pcp: as in `prepare`.
        num_tokens_across_ep: as in `prepare`; ALL2ALL, sharded: T of each EP rank.
        tokens_are_sharded: as in `prepare`.
        shared_expert_dp: as in `prepare`.

    Returns:
        ``[T, H]``.

    Raises:
        ValueError, TypeError, RuntimeError: as the steps do.
    """
    num_local_experts = experts.w13.shape[0]
    if num_local_experts * groups.ep.size != routing.num_experts:
        raise ValueError(
            f"moe_stage: experts must hold num_experts / EP = {routing.num_experts} / {groups.ep.size} experts, "
            f"got {num_local_experts}"
        )
    if strategy is Strategy.ALLGATHER and not tokens_are_sharded:
        _check_all_axes_are_summed(groups)
    if strategy is Strategy.ALLGATHER:
        topk_weights, topk_ids = route(router_logits, routing)
        (hidden, topk_ids, topk_weights), state = allgather.gather(
            [hidden_states, topk_ids, topk_weights],
            fill=[0, -1, 0],
            groups=groups,
            max_tokens_across_dp=max_tokens_across_dp,
            max_tokens_across_pcp=max_tokens_across_pcp,
            num_tokens_across_ep=num_tokens_across_ep,
            tokens_are_sharded=tokens_are_sharded,
        )
        output = _run_local(hidden, topk_ids, topk_weights, experts, groups.ep)
    else:
        prepared = prepare(
            hidden_states,
            router_logits,
            strategy=strategy,
            groups=groups,
            padded_num_tokens=padded_num_tokens,
            mc2_mask=mc2_mask,
            tokens_are_sharded=tokens_are_sharded,
            shared_expert_dp=shared_expert_dp,
        )
        state, rows = prepared.state, prepared.hidden_states.shape[0]
        if strategy is Strategy.ALL2ALL:  # MC2 has rows common to EP by contract
            num_chunks = groups.tp.size if tokens_are_sharded or not shared_expert_dp else 1
            counts = num_tokens_across_ep if tokens_are_sharded else None
            rows = common_rows(rows, max_tokens_across_dp, counts, num_chunks)
        output = _run_exchanged(prepared, rows, experts, routing, groups)
    return finalize(output, state, strategy=strategy, groups=groups, reduce_results=reduce_results)


def _check_all_axes_are_summed(groups: ParallelGroups) -> None:
    """The ALLGATHER DP form sums over DP, PCP and TP: that must be all ranks that hold a share of the experts."""
    ranks = groups.dp.size * groups.pcp.size * groups.tp.size
    if groups.ep.size not in (1, ranks):
        raise ValueError(
            f"moe_stage: ALLGATHER needs an EP group of DP * PCP * TP = {ranks} ranks, or none, got {groups.ep.size}"
        )


def _run_exchanged(
    prepared: PrepareOutput, rows: int, experts: ExpertWeights, routing: Routing, groups: ParallelGroups
) -> torch.Tensor:
    """Route the prepared rows, send them to their experts and the results back."""
    hidden = prepared.hidden_states
    topk_weights, topk_ids = route(prepared.router_logits, routing)
    topk_ids = torch.where(active_rows(prepared, groups=groups).unsqueeze(1), topk_ids, -1)
    if groups.ep.size == 1:
        return _run_local(hidden, topk_ids, topk_weights, experts, groups.ep)
    dispatched = dispatch_all_to_all(hidden, topk_ids, topk_weights, rows=rows, ep=groups.ep)
    output = _run_local(*dispatched, experts, groups.ep)
    return combine_all_to_all(output, num_rows=hidden.shape[0], rows=rows, ep=groups.ep)


def _run_local(
    hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: ExpertWeights, ep: Group
) -> torch.Tensor:
    """The share of this rank's experts in each row."""
    num_local_experts = experts.w13.shape[0]
    first_expert = ep.rank * num_local_experts
    dispatched = dispatch_local(hidden_states, topk_ids, first_expert=first_expert, num_local_experts=num_local_experts)
    return combine_local(run_experts(dispatched.rows, dispatched.counts, experts), topk_weights, dispatched)
