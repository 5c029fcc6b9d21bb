"""The whole stage, composed of its steps: prepare -> route -> dispatch -> experts -> combine -> finalize."""

from collections.abc import Iterable, Sequence
from operator import index

import torch

from fake_impls.checks import FLOATS, check_choice, check_dtype
from fake_impls.layout import common_rows, largest
from fake_impls.strategies.allgather import check_counts
from moe_ops.groups import Group, ParallelGroups
from moe_ops.layer import Ending, Layer, run_exchanged, run_gathered
from moe_ops.overlap import Steps, at_once
from moe_ops.strategies import prepare
from moe_ops.types import Dispatch, ExpertWeights, Quant, Routing, SharedExperts, Strategy, WeightLayout

DEFAULT_DISPATCH = {
    Strategy.ALLGATHER: Dispatch.LOCAL,
    Strategy.ALL2ALL: Dispatch.ALL_TO_ALL,
    Strategy.MC2: Dispatch.FIXED_CAPACITY,
}


def moe_stage_steps(
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
    overlap_gate: bool = False,
) -> Steps[torch.Tensor]:
    """Run this rank's part of a MoE layer. Rows that pad are routed nowhere and change no real row.

    Args:
        hidden_states: ``[T, H]`` float32, bfloat16 or float16.
        router_logits: ``[T, E]``.
        experts: this rank's experts, ``(E + num_redundant_experts) / EP`` of them, perhaps packed by `prepack_experts`. Without
            an EP group: all of them; in the ALLGATHER DP form, their intermediate axis sharded over DP x PCP x TP.
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
        shared_experts: experts that every token goes through, which are added. They run while rows travel, as far as they need
            no collective.
        overlap_gate: ALLGATHER: gather the hidden states while routing, and then ids and weights: one collective more. Ignored
            by the other strategies, which have to route before they send.

    Returns:
        ``[T, H]``. `moe_stage_steps` is `moe_stage` as a stream of work, for `interleave`.

    Raises:
        ValueError, TypeError, RuntimeError: as the steps do, and for arguments that do not go together.

    For what it does not return (expert load, rows beyond a smaller capacity) compose the steps: each is a function of its own.
    Gradients: see the README; that of a rank is the gradient of the sum over all ranks of what they differentiate.
    """
    groups = _specialize(groups, [*experts, *(shared_experts or ())])
    layer = Layer(experts, routing, strategy, groups, _dispatch_kind(strategy, groups, dispatch), quant)
    _check(layer, tokens_are_sharded)
    check_dtype("moe_stage", "hidden_states", hidden_states, FLOATS)
    counts = num_tokens_across_ep
    ending = Ending(hidden_states, shared_experts, layer, tokens_are_sharded, counts, reduce_results)
    if strategy is Strategy.ALLGATHER:
        lengths = {
            "max_tokens_across_dp": max_tokens_across_dp,
            "max_tokens_across_pcp": max_tokens_across_pcp,
            "num_tokens_across_ep": counts,
            "tokens_are_sharded": tokens_are_sharded,
        }
        return run_gathered(router_logits, layer, input_ids, lengths, ending, overlap_gate)
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
    return run_exchanged(prepared, layer, input_ids, common, ending)


moe_stage = at_once(moe_stage_steps, "moe_stage")


def _specialize(groups: ParallelGroups, weights: Iterable[object]) -> ParallelGroups:
    """Plain numbers where ``torch.compile(dynamic=True)`` makes symbols of them: group sizes, ranks and the shapes of weights,
    none of which changes from call to call."""
    if not torch.compiler.is_dynamo_compiling():
        return groups
    for weight in weights:
        if isinstance(weight, torch.Tensor):
            for size in weight.shape:
                index(size)
    tp, dp, ep, pcp = [Group(name, index(size), index(rank)) for name, size, rank in groups]
    return ParallelGroups(tp, dp, ep, pcp)


def _dispatch_kind(strategy: Strategy, groups: ParallelGroups, dispatch: Dispatch | None) -> Dispatch:
    check_choice("moe_stage", "strategy", strategy, Strategy)
    kind = DEFAULT_DISPATCH[strategy] if dispatch is None else dispatch
    check_choice("moe_stage", "dispatch", kind, Dispatch)
    if (strategy is Strategy.ALLGATHER) != (kind is Dispatch.LOCAL) and groups.ep.size > 1:
        raise ValueError(f"moe_stage: dispatch must be LOCAL for ALLGATHER and for no other, got {kind} for {strategy}")
    return kind if groups.ep.size > 1 else Dispatch.LOCAL


def _check(layer: Layer, tokens_are_sharded: bool) -> None:
    groups, routing = layer.groups, layer.routing
    check_choice("moe_stage", "quant", layer.quant, Quant)
    if layer.experts.layout is WeightLayout.VLLM_CPU and layer.quant is not Quant.NONE:
        raise ValueError(f"moe_stage: quant must be NONE with packed experts, got {layer.quant}")
    num_slots = routing.num_experts + routing.num_redundant_experts
    if layer.num_local_experts * groups.ep.size != num_slots:
        raise ValueError(
            f"moe_stage: experts must hold num_experts / EP = {num_slots} / {groups.ep.size} experts, "
            f"got {layer.num_local_experts}"
        )
    if routing.num_redundant_experts and routing.logical_to_physical is None and routing.select_experts is None:
        raise ValueError(
            f"moe_stage: logical_to_physical must be given with {routing.num_redundant_experts} redundant experts, got None"
        )
    # The ALLGATHER DP form sums over DP, PCP and TP: that must be all ranks that hold a share of the experts.
    ranks = layer.num_summed
    if layer.strategy is Strategy.ALLGATHER and not tokens_are_sharded and groups.ep.size not in (1, ranks):
        raise ValueError(
            f"moe_stage: ALLGATHER needs an EP group of DP * PCP * TP = {ranks} ranks, or none, got {groups.ep.size}"
        )
