"""The whole stage, composed of its steps: prepare -> route -> dispatch -> experts -> combine -> finalize."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fake_impls.checks import FLOATS, check_at_most, check_choice, check_dtype
from fake_impls.layout import common_rows, expert_parallel_rank, largest
from fake_impls.strategies.all2all import check_tokens
from fake_impls.strategies.allgather import check_counts
from moe_ops.collectives import on_rank_zero
from moe_ops.dispatchers import combine, dispatch
from moe_ops.dispatchers.local import weigh_input
from moe_ops.experts import run_experts
from moe_ops.groups import ParallelGroups
from moe_ops.quantize import quantize_activations
from moe_ops.route import route
from moe_ops.shared_experts import add_shared_experts
from moe_ops.strategies import active_rows, allgather, finalize, lay_out_like_prepared, output_reduction, prepare
from moe_ops.types import (
    Dispatch,
    ExpertWeights,
    PrepareOutput,
    Quant,
    Routing,
    SharedExperts,
    State,
    Strategy,
)

DEFAULT_DISPATCH = {
    Strategy.ALLGATHER: Dispatch.LOCAL,
    Strategy.ALL2ALL: Dispatch.ALL_TO_ALL,
    Strategy.MC2: Dispatch.FIXED_CAPACITY,
}


def moe_stage(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    experts: ExpertWeights,
    *,
    routing: Routing,
    strategy: Strategy,
    groups: ParallelGroups,
    dispatch: Dispatch | None = None,
    reduce_results: bool = False,
    padded_num_tokens: int | None = None,
    mc2_mask: torch.Tensor | None = None,
    max_tokens_across_dp: int | None = None,
    max_tokens_across_pcp: int | None = None,
    num_tokens_across_ep: Sequence[int] | None = None,
    tokens_are_sharded: bool = False,
    shared_expert_dp: bool = False,
    quant: Quant = Quant.NONE,
    input_ids: torch.Tensor | None = None,
    shared_experts: SharedExperts | None = None,
) -> torch.Tensor:
    """Run this rank's part of a MoE layer. Rows that pad are routed nowhere and change no real row.

    Args:
        hidden_states: ``[T, H]`` float32, bfloat16 or float16.
        router_logits: ``[T, E]``.
        experts: this rank's experts, ``(E + num_redundant_experts) / EP`` of them. Without an EP group: all of them; in the
            ALLGATHER DP form, their intermediate axis sharded over DP x PCP x TP.
        routing: how experts are chosen.
        strategy: how tokens reach the ranks of their experts. ALLGATHER routes before it gathers: ids and weights travel (8 K
            bytes a token), not logits (4 E).
        groups: the process groups.
        dispatch: LOCAL goes with ALLGATHER, the others with ALL2ALL and MC2. None: ALLGATHER LOCAL, ALL2ALL ALL_TO_ALL, MC2
            FIXED_CAPACITY. Without an EP group nothing is exchanged.
        reduce_results: as in `finalize`. The ALLGATHER DP form returns one TP rank's summand without it, shared experts
            included: `output_reduction` says so.
        padded_num_tokens: as in `prepare`.
        mc2_mask: as in `prepare`. Tokens that it excludes come back as zero (from the routed experts).
        max_tokens_across_dp: as in `prepare`; ALL2ALL with FIXED_CAPACITY: the largest T of any rank.
        max_tokens_across_pcp: as in `prepare`.
        num_tokens_across_ep: as in `prepare`; with FIXED_CAPACITY and sharded tokens: T of each EP rank, from which the rows
            common to all follow. Shared experts of a shard read the rows of the TP group's other ranks from it.
        tokens_are_sharded: as in `prepare`.
        shared_expert_dp: as in `prepare`.
        quant: what is done to activations before they travel (ALLGATHER EP form, ALL_TO_ALL, FIXED_CAPACITY) or where they are
            (ALLGATHER DP form), and again between the experts' two products.
        input_ids: int ``[T]``, for hash routing.
        shared_experts: experts that every token goes through, which are added.

    Returns:
        ``[T, H]``.

    Raises:
        ValueError, TypeError, RuntimeError: as the steps do, and for arguments that do not go together.

    For what it does not return (expert load, rows beyond a smaller capacity) compose the steps: each is a function of its own.
    """
    layer = _Layer(experts, routing, strategy, groups, _dispatch_kind(strategy, groups, dispatch), quant)
    _check(layer, tokens_are_sharded)
    check_dtype("moe_stage", "hidden_states", hidden_states, FLOATS)
    counts = num_tokens_across_ep
    if strategy is Strategy.ALLGATHER:
        output, state = _run_gathered(
            hidden_states,
            router_logits,
            layer,
            input_ids,
            max_tokens_across_dp=max_tokens_across_dp,
            max_tokens_across_pcp=max_tokens_across_pcp,
            num_tokens_across_ep=counts,
            tokens_are_sharded=tokens_are_sharded,
        )
    else:
        if tokens_are_sharded and counts is not None:
            check_counts("moe_stage", hidden_states.shape[0], counts, groups.ep.size, groups.ep.rank)
            if mc2_mask is None and padded_num_tokens is None:
                padded_num_tokens = largest(counts) * groups.tp.size
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
        num_chunks = 1 if tokens_are_sharded or shared_expert_dp else groups.tp.size
        common = prepared.hidden_states.shape[0]  # which MC2 has on all ranks of EP by contract
        if strategy is Strategy.ALL2ALL:
            common = common_rows(common, max_tokens_across_dp, counts if tokens_are_sharded else None, num_chunks)
        output, state = _run_exchanged(prepared, layer, input_ids, common)
    return _finish(output, state, layer, hidden_states, shared_experts, tokens_are_sharded, counts, reduce_results)


class _Layer(NamedTuple):
    """What is the same in every call of a layer."""

    experts: ExpertWeights
    routing: Routing
    strategy: Strategy
    groups: ParallelGroups
    dispatch: Dispatch
    quant: Quant

    @property
    def num_local_experts(self) -> int:
        return self.experts.w13.shape[0]

    @property
    def travels_quantized(self) -> bool:
        """Whether activations are quantised before they travel. Weights on the input come first, where the experts are."""
        return self.quant is not Quant.NONE and not self.routing.apply_router_weight_on_input


def _dispatch_kind(strategy: Strategy, groups: ParallelGroups, dispatch: Dispatch | None) -> Dispatch:
    check_choice("moe_stage", "strategy", strategy, Strategy)
    kind = DEFAULT_DISPATCH[strategy] if dispatch is None else dispatch
    check_choice("moe_stage", "dispatch", kind, Dispatch)
    if (strategy is Strategy.ALLGATHER) != (kind is Dispatch.LOCAL) and groups.ep.size > 1:
        raise ValueError(f"moe_stage: dispatch must be LOCAL for ALLGATHER and for no other, got {kind} for {strategy}")
    return kind if groups.ep.size > 1 else Dispatch.LOCAL


def _check(layer: _Layer, tokens_are_sharded: bool) -> None:
    groups, routing = layer.groups, layer.routing
    check_choice("moe_stage", "quant", layer.quant, Quant)
    num_slots = routing.num_experts + routing.num_redundant_experts
    if layer.num_local_experts * groups.ep.size != num_slots:
        raise ValueError(
            f"moe_stage: experts must hold num_experts / EP = {num_slots} / {groups.ep.size} experts, "
            f"got {layer.num_local_experts}"
        )
    if routing.num_redundant_experts and routing.logical_to_physical is None:
        raise ValueError(
            f"moe_stage: logical_to_physical must be given with {routing.num_redundant_experts} redundant experts, got None"
        )
    # The ALLGATHER DP form sums over DP, PCP and TP: that must be all ranks that hold a share of the experts.
    ranks = _num_summed(groups)
    if layer.strategy is Strategy.ALLGATHER and not tokens_are_sharded and groups.ep.size not in (1, ranks):
        raise ValueError(
            f"moe_stage: ALLGATHER needs an EP group of DP * PCP * TP = {ranks} ranks, or none, got {groups.ep.size}"
        )


def _num_summed(groups: ParallelGroups) -> int:
    return groups.dp.size * groups.pcp.size * groups.tp.size


def _run_gathered(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    layer: _Layer,
    input_ids: torch.Tensor | None,
    *,
    max_tokens_across_dp: int | None,
    max_tokens_across_pcp: int | None,
    num_tokens_across_ep: Sequence[int] | None,
    tokens_are_sharded: bool,
) -> tuple[torch.Tensor, State]:
    """Route this rank's tokens, gather all, and compute this rank's share of each."""
    check_tokens("prepare", hidden_states, router_logits)
    topk_weights, topk_ids = route(router_logits, layer.routing, input_ids=input_ids)
    tensors, fill = [hidden_states, topk_ids, topk_weights], [0, -1, 0]
    if layer.travels_quantized and tokens_are_sharded:
        quantized, scale = quantize_activations(hidden_states, quant=layer.quant)
        tensors, fill = [quantized, topk_ids, topk_weights, scale], [0, -1, 0, 0]
    gathered, state = allgather.gather(
        tensors,
        fill=fill,
        groups=layer.groups,
        max_tokens_across_dp=max_tokens_across_dp,
        max_tokens_across_pcp=max_tokens_across_pcp,
        num_tokens_across_ep=num_tokens_across_ep,
        tokens_are_sharded=tokens_are_sharded,
    )
    if not tokens_are_sharded and layer.groups.ep.size == 1:
        layer = layer._replace(experts=_bias_once(layer.experts, layer.groups))
    hidden, ids, weights, *scales = gathered
    output = _run_experts(hidden, ids, weights, layer, scales[0] if scales else None, None, hidden_states.dtype)
    return output, state


def _run_exchanged(
    prepared: PrepareOutput, layer: _Layer, input_ids: torch.Tensor | None, common: int
) -> tuple[torch.Tensor, State]:
    """Route the prepared rows, send them to their experts and the results back."""
    x, state = prepared.hidden_states, prepared.state
    if input_ids is not None:
        input_ids = lay_out_like_prepared(input_ids, state, strategy=layer.strategy, groups=layer.groups)
    is_active = active_rows(prepared, groups=layer.groups)
    topk_weights, topk_ids = route(prepared.router_logits, layer.routing, is_active=is_active, input_ids=input_ids)
    if layer.dispatch is Dispatch.FIXED_CAPACITY:  # as many as any rank has: nothing is dropped
        check_at_most("moe_stage", "rows of a rank", x.shape[0], common, "those common to the EP group")
    payload, scale = quantize_activations(x, quant=layer.quant) if layer.travels_quantized else (x, None)
    return _run_experts(payload, topk_ids, topk_weights, layer, scale, common, x.dtype), state


def _run_experts(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    layer: _Layer,
    scale: torch.Tensor | None,
    capacity: int | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Dispatch, experts, combine."""
    ep, is_weighed = layer.groups.ep, layer.routing.apply_router_weight_on_input
    dispatched = dispatch(
        hidden_states,
        topk_ids,
        topk_weights,
        kind=layer.dispatch,
        num_local_experts=layer.num_local_experts,
        ep=ep,
        capacity=capacity,
        scale=scale,
    )
    local = dispatched.local
    rows = weigh_input(local.rows, local.state) if is_weighed else local.rows
    rows = run_experts(rows, local.counts, layer.experts, scale=local.scale, quant=layer.quant, dtype=dtype)
    return combine(rows, dispatched, ep=ep, is_weighed=is_weighed)


def _bias_once(experts: ExpertWeights, groups: ParallelGroups) -> ExpertWeights:
    """Keep the output's bias on one of the ranks whose results are summed, where they share the intermediate axis."""
    if experts.w2_bias is None or _num_summed(groups) == 1:
        return experts
    rank = expert_parallel_rank(
        groups.dp.rank, groups.pcp.rank, groups.tp.rank, pcp_size=groups.pcp.size, tp_size=groups.tp.size
    )
    return experts._replace(w2_bias=on_rank_zero(experts.w2_bias, rank))


def _finish(
    output: torch.Tensor,
    state: State,
    layer: _Layer,
    hidden_states: torch.Tensor,
    shared_experts: SharedExperts | None,
    tokens_are_sharded: bool,
    num_tokens_across_ep: Sequence[int] | None,
    reduce_results: bool,
) -> torch.Tensor:
    """Finalize and add the shared experts."""
    groups, strategy = layer.groups, layer.strategy
    if shared_experts is None:
        return finalize(output, state, strategy=strategy, groups=groups, reduce_results=reduce_results)
    counts = None
    if tokens_are_sharded and num_tokens_across_ep is not None and groups.ep.size > 1:
        first = groups.ep.rank - groups.tp.rank  # TP ranks follow one another in EP
        counts = num_tokens_across_ep[first : first + groups.tp.size]
    return add_shared_experts(
        finalize(output, state, strategy=strategy, groups=groups),
        output_reduction(strategy=strategy, groups=groups, tokens_are_sharded=tokens_are_sharded),
        hidden_states,
        shared_experts,
        groups=groups,
        reduce_results=reduce_results,
        tokens_are_sharded=tokens_are_sharded,
        num_tokens_across_tp=counts,
    )
