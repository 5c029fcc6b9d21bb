"""The whole stage, composed of its steps: prepare -> route -> dispatch -> experts -> combine -> finalize."""

from collections.abc import Iterable
from operator import index
from typing import cast

import torch

from fake_impls.checks import FLOATS, check_choice, check_dim, check_dtype, check_same_rows
from fake_impls.strategies.exchange import check_tokens
from moe_ops._library import refuse_forward_mode
from moe_ops.backends import row_experts_for
from moe_ops.groups import Group, ParallelGroups
from moe_ops.lengths import resolve_lengths
from moe_ops.overlap import Steps, run_stream
from moe_ops.shared_experts import check_lengths
from moe_ops.steps import StageCall
from moe_ops.strategies import strategy_of
from moe_ops.types import (
    Dispatch,
    ExpertWeights,
    Layout,
    Lengths,
    Quant,
    Routing,
    SharedExperts,
    StageOutput,
)


def moe_stage(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor | None,
    experts: ExpertWeights,
    routing: Routing,
    layout: Layout,
    *,
    lengths: Lengths = Lengths(),
    quant: Quant = Quant.NONE,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    shared_experts: SharedExperts | None = None,
    reduce_results: bool = False,
    overlap_gate: bool = False,
) -> torch.Tensor:
    """Run this rank's part of a MoE layer. Rows that pad are routed nowhere and change no real row.

    Args:
        hidden_states: ``[T, H]`` float32, bfloat16 or float16.
        router_logits: ``[T, E]``; None if `topk_weights` are given.
        experts: this rank's experts, ``(E + num_redundant_experts) / EP`` of them, perhaps packed by `prepack_experts`. Without
            an EP group: all of them; ALLGATHER then takes their intermediate axis to be sharded over DP x PCP x TP.
        routing: how experts are chosen.
        layout: how the stage is laid over ranks. ALLGATHER routes before it gathers: ids and weights travel (8 K bytes a
            token), not logits (4 E).
        lengths: what is known of token counts. Every form takes every field. Where there are other ranks, ALLGATHER, MC2 and
            FIXED_CAPACITY need one of them. Tokens that the mask leaves out come back as zero (from the routed experts).
        quant: what is done to activations before they travel (ALLGATHER EP form, ALL_TO_ALL, FIXED_CAPACITY) or where they are
            (ALLGATHER DP form), and again between the experts' two products.
        topk_ids: int ``[T, K]``, -1 for none: the choice was made elsewhere. What is no expert's id goes nowhere; an expert
            that is in a row twice counts twice, each time with its own weight.
        topk_weights: float ``[T, K]``: and so were the weights, which get a gradient. Without them the logits of the chosen
            experts weigh, by `routing`.
        shared_experts: experts that every token goes through, which are added. They run while rows travel, as far as they need
            no collective.
        reduce_results: as in `finalize`. The ALLGATHER DP form returns one TP rank's summand without it, shared experts
            included: `output_reduction` says so.
        overlap_gate: ALLGATHER: gather the hidden states while routing, and then ids and weights: one collective more. The
            other strategies have to route before they send, and refuse it.

    Returns:
        ``[T, H]``, no rows for no tokens.

    Raises:
        ValueError, TypeError, RuntimeError: as the steps do, and for arguments that do not go together.

    Gradients: docs/gradients.md; that of a rank is the gradient of the sum over all ranks of what they differentiate.

    Example: experts divided over two data parallel ranks, of which neither knows more than its own tokens::

        layout = mo.Layout(mo.Strategy.ALL2ALL, mo.ParallelGroups.from_process_groups(dp=pg, ep=pg))
        y = mo.moe_stage(x, x @ gate.T, experts, mo.Routing(top_k=2, num_experts=8), layout)
    """
    call = StageCall(
        hidden_states,
        router_logits,
        experts,
        routing,
        layout,
        lengths,
        quant,
        topk_ids,
        topk_weights,
        shared_experts,
        reduce_results,
        overlap_gate,
        False,
    )
    return cast(torch.Tensor, run_stream(_start(call)))


def run_stage(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor | None,
    experts: ExpertWeights,
    routing: Routing,
    layout: Layout,
    *,
    lengths: Lengths = Lengths(),
    quant: Quant = Quant.NONE,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    shared_experts: SharedExperts | None = None,
    reduce_results: bool = False,
    overlap_gate: bool = False,
) -> StageOutput:
    """`moe_stage`, and what it decided on the way: the experts of each token, their weights, and how many rows were dropped.

    Arguments and errors are those of `moe_stage`.

    Example: the load of the experts, and a record for router replay::

        out = mo.run_stage(x, router_logits, experts, routing, layout, lengths=lengths)
        load = count_expert_load(out.topk_ids, num_experts=routing.num_experts)
        again = mo.moe_stage(x, router_logits, experts, routing, layout, lengths=lengths, topk_ids=out.topk_ids)
    """
    call = StageCall(
        hidden_states,
        router_logits,
        experts,
        routing,
        layout,
        lengths,
        quant,
        topk_ids,
        topk_weights,
        shared_experts,
        reduce_results,
        overlap_gate,
        True,
    )
    return cast(StageOutput, run_stream(_start(call)))


def moe_stage_steps(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor | None,
    experts: ExpertWeights,
    routing: Routing,
    layout: Layout,
    *,
    lengths: Lengths = Lengths(),
    quant: Quant = Quant.NONE,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    shared_experts: SharedExperts | None = None,
    reduce_results: bool = False,
    overlap_gate: bool = False,
) -> Steps[torch.Tensor]:
    """`moe_stage` as a stream of work, for `interleave`. Its result is that of `moe_stage`.

    Arguments and errors are those of `moe_stage`: raised here, or where lengths are missing when the stream starts.

    Example: two halves of a batch, of which the rows of one travel while the experts of the other compute::

        first, second = mo.interleave(
            mo.moe_stage_steps(x1, logits1, experts, routing, layout),
            mo.moe_stage_steps(x2, logits2, experts, routing, layout),
        )
    """
    call = StageCall(
        hidden_states,
        router_logits,
        experts,
        routing,
        layout,
        lengths,
        quant,
        topk_ids,
        topk_weights,
        shared_experts,
        reduce_results,
        overlap_gate,
        False,
    )
    return cast("Steps[torch.Tensor]", _start(call))  # Dynamo does not subscript aliases


def _start(call: StageCall) -> Steps[torch.Tensor | StageOutput]:
    """Check the arguments, and start the stream of the strategy."""
    x, experts, layout = call.hidden_states, call.experts, call.layout
    row = strategy_of("moe_stage", layout)
    refuse_forward_mode("moe_stage", (x, call.router_logits, experts, call.topk_weights, call.shared_experts))
    check_dtype("moe_stage", "hidden_states", x, FLOATS)
    check_dim("moe_stage", "hidden_states", x, 2)
    if call.router_logits is not None:
        check_tokens("moe_stage", x, call.router_logits)
    if call.topk_ids is not None:
        check_same_rows("moe_stage", "topk_ids", call.topk_ids, "hidden_states", x)
    elif call.topk_weights is not None:
        raise ValueError("moe_stage: topk_ids must be given with topk_weights, got None")
    groups = _specialize(layout.groups, [*experts, *(call.shared_experts or ())])
    kind = Dispatch.LOCAL if groups.ep.size == 1 else layout.dispatch or row.dispatches[0]
    layout = layout._replace(groups=groups, dispatch=kind)
    call = call._replace(layout=layout, lengths=resolve_lengths("moe_stage", x.shape[0], call.lengths, layout))
    _check(call, sends_rows=Dispatch.LOCAL not in row.dispatches)
    return row.steps(call)


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


def _check(call: StageCall, *, sends_rows: bool) -> None:
    groups, routing, strategy = call.layout.groups, call.routing, call.layout.strategy
    check_choice("moe_stage", "quant", call.quant, Quant)
    if row_experts_for(call.experts) is not None and call.quant is not Quant.NONE:
        raise ValueError(f"moe_stage: quant must be NONE with packed experts, got {call.quant}")
    num_slots, num_local = routing.num_experts + routing.num_redundant_experts, call.experts.w13.shape[0]
    if num_local * groups.ep.size != num_slots:
        raise ValueError(
            f"moe_stage: experts must hold num_experts / EP = {num_slots} / {groups.ep.size} experts, got {num_local}"
        )
    if routing.num_redundant_experts and routing.logical_to_physical is None:
        raise ValueError(
            f"moe_stage: logical_to_physical must be given with {routing.num_redundant_experts} redundant experts, got None"
        )
    if groups.ep.size == 1 and groups.tp.size > 1 and (sends_rows or call.layout.tokens_are_sharded):
        raise ValueError(
            f"moe_stage: layout.groups.ep must be given for {strategy.name} with TP {groups.tp.size} and tokens that TP ranks "
            "divide, got none: experts that are sharded over TP would each see a part of the tokens; ALLGATHER takes such "
            "experts with tokens that are whole on each TP rank"
        )
    if sends_rows and call.overlap_gate:
        raise ValueError(f"moe_stage: overlap_gate must be False for {strategy.name}, which routes before it sends")
    if call.shared_experts is not None:
        check_lengths(call.shared_experts, call.layout, call.lengths)
