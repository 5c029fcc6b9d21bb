"""ALLGATHER: every rank sees all tokens, computes its own experts' share of each, and the shares are summed.

The DP form gathers over DP and then, around that, over PCP; finalize reduces in reverse. The EP form, for tokens that are a
sequence-parallel shard, gathers once over EP.

T tokens of this rank, M rows that every rank pads to, H hidden.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from fake_impls.layout import expert_parallel_rank
from fake_impls.strategies import allgather as shapes
from fake_impls.strategies.exchange import check_chunk
from moe_ops._library import Wait, blocking, define
from moe_ops.collectives import gather_rows, on_rank_zero, reduce_scatter
from moe_ops.groups import Group, ParallelGroups, check_group
from moe_ops.lengths import active_tokens, known_longest
from moe_ops.overlap import Steps, Transfer
from moe_ops.packing import expand_rows
from moe_ops.quantize import quantize_activations
from moe_ops.slots import to_physical
from moe_ops.steps import (
    StageCall,
    begin_shared_experts,
    choose,
    finish,
    is_finished,
    quantize_rows,
    result_of,
    run_own_experts,
)
from moe_ops.types import (
    DataParallelState,
    ExpertParallelState,
    Layout,
    Lengths,
    PrepareOutput,
    Quant,
    Reduction,
    StageOutput,
    State,
)


def gather_over_dp(
    tensors: Sequence[torch.Tensor],
    fill: Sequence[int],
    longest: int,
    dp_group: str,
    dp_size: int,
    pcp_group: str,
    pcp_size: int,
) -> Wait[list[torch.Tensor]]:
    """Gather over DP, then over PCP; the last of the two is in flight. A group of one rank is left out."""
    rows = longest
    if dp_size > 1:
        check_group("prepare", "dp", dp_group, dp_size)
        wait = gather_rows(tensors, rows, fill, dp_size, dp_group)
        if pcp_size == 1:
            return wait
        tensors, rows = wait(), dp_size * rows
    check_group("prepare", "pcp", pcp_group, pcp_size)
    return gather_rows(tensors, rows, fill, pcp_size, pcp_group)


def reduce_over_dp(
    hidden_states: torch.Tensor,
    num_tokens: int,
    longest: int,
    dp_group: str,
    dp_size: int,
    pcp_group: str,
    pcp_size: int,
) -> Wait[torch.Tensor]:
    """Reduce-scatter over PCP, then over DP; the last of the two is in flight."""
    if pcp_size > 1:
        check_group("finalize", "pcp", pcp_group, pcp_size)
        wait_pcp = reduce_scatter(hidden_states, pcp_size, pcp_group)
        if dp_size == 1:
            return lambda: wait_pcp().narrow(0, 0, num_tokens)
        hidden_states = wait_pcp()
    check_group("finalize", "dp", dp_group, dp_size)
    wait = reduce_scatter(hidden_states, dp_size, dp_group)
    return lambda: wait().narrow(0, 0, num_tokens)


def gather_over_ep(
    tensors: Sequence[torch.Tensor],
    fill: Sequence[int],
    longest: int,
    num_tokens_across_ep: Sequence[int] | None,
    group: str,
    size: int,
) -> Wait[list[torch.Tensor]]:
    """Gather over EP; with counts, the rows that pad are left out."""
    check_group("prepare", "ep", group, size)
    return gather_rows(tensors, longest, fill, size, group, num_tokens_across_ep)


def reduce_over_ep(
    hidden_states: torch.Tensor,
    num_tokens: int,
    longest: int,
    num_tokens_across_ep: Sequence[int] | None,
    group: str,
    size: int,
) -> Wait[torch.Tensor]:
    """Reduce-scatter over EP."""
    check_group("finalize", "ep", group, size)
    blocks = hidden_states if num_tokens_across_ep is None else expand_rows(hidden_states, num_tokens_across_ep)
    wait = reduce_scatter(blocks, size, group)
    return lambda: wait().narrow(0, 0, num_tokens)


prepare_allgather_dp = define(
    "prepare_allgather_dp(Tensor[] tensors, int[] fill, SymInt longest, str dp_group, int dp_size, str pcp_group,"
    " int pcp_size) -> Tensor[]",
    composite=blocking(gather_over_dp),
    check=shapes.check_prepare_allgather_dp,
)
finalize_allgather_dp = define(
    "finalize_allgather_dp(Tensor hidden_states, SymInt num_tokens, SymInt longest, str dp_group, int dp_size,"
    " str pcp_group, int pcp_size) -> Tensor",
    composite=blocking(reduce_over_dp),
    check=shapes.check_finalize_allgather_dp,
)
prepare_allgather_ep = define(
    "prepare_allgather_ep(Tensor[] tensors, int[] fill, SymInt longest, SymInt[]? num_tokens_across_ep, str group,"
    " int size) -> Tensor[]",
    composite=blocking(gather_over_ep),
    check=shapes.check_prepare_allgather_ep,
)
finalize_allgather_ep = define(
    "finalize_allgather_ep(Tensor hidden_states, SymInt num_tokens, SymInt longest, SymInt[]? num_tokens_across_ep,"
    " str group, int size) -> Tensor",
    composite=blocking(reduce_over_ep),
    check=shapes.check_finalize_allgather_ep,
)


def gathered_axes(layout: Layout) -> ParallelGroups:
    """The groups that the DP form works on: those that EP spans, or all without an EP group.

    Where EP is the DP group, or the TP group, itself, each rank of the other axes holds the same experts, and computes its own
    tokens: there is nothing to gather or to sum over them.

    Raises:
        ValueError: EP is another group, of which it cannot be told what it spans.
    """
    tp, dp, ep, pcp = groups = layout.groups
    num_ranks = dp.size * pcp.size * tp.size
    if layout.tokens_are_sharded or ep.size in (1, num_ranks):
        return groups
    single = Group.single()
    if ep.name == dp.name:
        return ParallelGroups(single, dp, ep, single)
    if ep.name == tp.name:
        return ParallelGroups(tp, single, ep, single)
    raise ValueError(
        f"ALLGATHER: ep must be a group of DP * PCP * TP = {num_ranks} ranks, the dp or the tp group itself, or none, got "
        f"{ep.name!r} of {ep.size} ranks"
    )


def _starting_state(
    op: str, num_tokens: int, lengths: Lengths, layout: Layout, axes: ParallelGroups
) -> DataParallelState | ExpertParallelState:
    """What prepare returns, and what it pads to."""
    rows = num_tokens if _is_single(layout, axes) else known_longest(op, lengths, "ALLGATHER")
    if layout.tokens_are_sharded:
        return ExpertParallelState(num_tokens, rows, tuple(lengths.per_rank or ()))
    return DataParallelState(num_tokens, rows)


def _is_single(layout: Layout, axes: ParallelGroups) -> bool:
    """Whether there is no other rank to gather from, or to sum with."""
    return axes.ep.size == 1 if layout.tokens_are_sharded else axes.dp.size * axes.pcp.size == 1


def _gather_arguments(state: State, axes: ParallelGroups) -> tuple[Any, ...]:
    """What the steps of the form take after the tensors: lengths, counts and groups."""
    if isinstance(state, ExpertParallelState):
        return state.padded_num_tokens, state.num_tokens_across_ep or None, *axes.ep[:2]
    return state.padded_num_tokens, *axes.dp[:2], *axes.pcp[:2]


def prepare(
    hidden_states: torch.Tensor, router_logits: torch.Tensor, layout: Layout, lengths: Lengths, quant: Quant
) -> PrepareOutput:
    """Gather tokens, logits, mask and scales, all in one all-gather a group. The EP form quantises first, if asked to."""
    num_tokens, axes = hidden_states.shape[0], gathered_axes(layout)
    state = _starting_state("prepare", num_tokens, lengths, layout, axes)
    mask = active_tokens(num_tokens, lengths, layout)
    rows = [hidden_states]
    if quant is not Quant.NONE:
        if not layout.tokens_are_sharded:
            raise ValueError(f"prepare: quant must be NONE for the DP form of ALLGATHER, got {quant}")
        rows = list(quantize_activations(hidden_states, quant=quant))
    tensors = [rows[0], router_logits, *rows[1:], *([] if mask is None else [mask])]
    if not _is_single(layout, axes):
        gather = prepare_allgather_ep if layout.tokens_are_sharded else prepare_allgather_dp
        tensors = gather(tensors, [0] * len(tensors), *_gather_arguments(state, axes))
    scale = tensors[2] if len(rows) == 2 else None
    return PrepareOutput(tensors[0], tensors[1], None if mask is None else tensors[-1], scale, state)


def finalize(hidden_states: torch.Tensor, state: State, layout: Layout) -> torch.Tensor:
    """Sum what prepare gathered and cut to this rank's own tokens. One reduce-scatter for each gather of prepare."""
    state, axes = _own_state("finalize", state, layout), gathered_axes(layout)
    if _is_single(layout, axes):
        check_chunk(hidden_states, state.num_tokens)
        return hidden_states
    reduce = finalize_allgather_ep if layout.tokens_are_sharded else finalize_allgather_dp
    summed: torch.Tensor = reduce(hidden_states, state.num_tokens, *_gather_arguments(state, axes))
    return summed


def lay_out(x: torch.Tensor, state: State, layout: Layout) -> torch.Tensor:
    """Gather per-token integers like the tokens. One all-gather for each gather of prepare."""
    state, axes = _own_state("lay_out_like_prepared", state, layout), gathered_axes(layout)
    if _is_single(layout, axes):
        return x
    gather = prepare_allgather_ep if layout.tokens_are_sharded else prepare_allgather_dp
    gathered: list[torch.Tensor] = gather([x], [-1], *_gather_arguments(state, axes))
    return gathered[0]


def _own_state(op: str, state: State, layout: Layout) -> DataParallelState | ExpertParallelState:
    wanted = ExpertParallelState if layout.tokens_are_sharded else DataParallelState
    if not isinstance(state, wanted):
        form = "EP" if layout.tokens_are_sharded else "DP"
        raise TypeError(
            f"{op}: state must be that of an ALLGATHER prepare in its {form} form, got {type(state).__name__}"
        )
    return state


def reduction(layout: Layout) -> Reduction:
    """The EP form sums over TP, too. The DP form does not, and leaves the sum open where TP ranks hold different experts."""
    if not layout.tokens_are_sharded and gathered_axes(layout).tp.size > 1:
        return Reduction.PARTIAL_OVER_TP
    return Reduction.COMPLETE


def steps(call: StageCall) -> Steps[torch.Tensor | StageOutput]:
    """Route this rank's tokens, gather all, and compute this rank's share of each."""
    layout, routing = call.layout, call.routing
    axes, left_open = gathered_axes(layout), reduction(layout)
    state = _starting_state("moe_stage", call.hidden_states.shape[0], call.lengths, layout, axes)
    is_single, arguments = _is_single(layout, axes), _gather_arguments(state, axes)
    gather, reduce = (gather_over_ep, reduce_over_ep) if layout.tokens_are_sharded else (gather_over_dp, reduce_over_dp)
    # Only the EP form quantises what travels.
    x, *scale = quantize_rows(call, call.hidden_states) if layout.tokens_are_sharded else [call.hidden_states]
    if is_single:
        choice, local_part = choose(call), begin_shared_experts(call)
        rows = [x, to_physical(choice[1], routing), choice[0], *scale]
    elif call.overlap_gate:
        first = partial(gather, [x, *scale], [0] * (1 + len(scale)), *arguments)
        (x, *scale), choice = yield Transfer(first, partial(choose, call))
        routes = [to_physical(choice[1], routing), choice[0]]
        routes, local_part = yield Transfer(
            partial(gather, routes, [-1, 0], *arguments), partial(begin_shared_experts, call)
        )
        rows = [x, *routes, *scale]
    else:
        choice = choose(call)
        rows = [x, to_physical(choice[1], routing), choice[0], *scale]
        send = partial(gather, rows, [0, -1, 0, 0][: len(rows)], *arguments)
        rows, local_part = yield Transfer(send, partial(begin_shared_experts, call))
    routed = run_own_experts(_with_bias_once(call), rows)
    if not is_single:
        routed, _ = yield Transfer(partial(reduce, routed, state.num_tokens, *arguments))
    if not is_finished(call, left_open):
        routed, _ = yield Transfer(partial(finish, call, left_open, routed, local_part))
    yield result_of(call, routed, choice, None)


def _with_bias_once(call: StageCall) -> StageCall:
    """Keep the output's bias on one of the ranks whose results are summed, where they share the intermediate axis."""
    experts, (tp, dp, ep, pcp) = call.experts, call.layout.groups
    is_shared = not call.layout.tokens_are_sharded and ep.size == 1 and dp.size * pcp.size * tp.size > 1
    if experts.w2_bias is None or not is_shared:
        return call
    rank = expert_parallel_rank(dp.rank, pcp.rank, tp.rank, pcp_size=pcp.size, tp_size=tp.size)
    return call._replace(experts=experts._replace(w2_bias=on_rank_zero(experts.w2_bias, rank)))
