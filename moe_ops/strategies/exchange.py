"""ALL2ALL and MC2: each TP rank sends its own chunk of the tokens to the experts; finalize gathers the chunks back.

They differ in the length that tokens are padded to. ALL2ALL pads those of a TP group to a multiple of TP. MC2 pads to a length
that all ranks share, so that every rank holds as many rows.

T tokens of this rank, P padded tokens of the TP group, N rows of a chunk, K top-k, H hidden.
"""

from functools import partial

import torch

from fake_impls.checks import check_at_most
from fake_impls.layout import padded_rows, rows_per_rank
from fake_impls.strategies import exchange as shapes
from moe_ops._library import Wait, blocking, define, is_known
from moe_ops.backends import FusedExchange, exchange_for
from moe_ops.collectives import all_gather, chunk_rows, chunk_tokens, first_rows, pad_rows
from moe_ops.dispatchers import EXCHANGES
from moe_ops.experts import run_experts
from moe_ops.groups import Group, check_group
from moe_ops.lengths import active_tokens, known_longest
from moe_ops.overlap import Steps, Transfer
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
    trains,
)
from moe_ops.types import (
    Dispatch,
    Layout,
    Lengths,
    PrepareOutput,
    Quant,
    Reduction,
    ShardState,
    StageOutput,
    State,
    Strategy,
)


def gather_chunks(hidden_states: torch.Tensor, num_tokens: int, group: str, size: int) -> Wait[torch.Tensor]:
    """Gather equal chunks over TP and cut the padding: ``[P / TP, H] -> [num_tokens, H]``."""
    check_group("finalize", "tp", group, size)
    wait = all_gather(hidden_states, size, group)
    return lambda: wait().narrow(0, 0, num_tokens)


def _prepare_all2all(
    hidden_states: torch.Tensor, router_logits: torch.Tensor, group: str, size: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    check_group("prepare", "tp", group, size, rank)
    num_tokens = hidden_states.shape[0]
    padded = padded_rows(num_tokens, size)
    hidden_chunk = chunk_rows(hidden_states, padded, size, rank)
    return hidden_chunk, chunk_rows(router_logits, padded, size, rank), num_tokens, padded


def _prepare_mc2(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    mask: torch.Tensor | None,
    padded_num_tokens: int,
    group: str,
    size: int,
    rank: int,
) -> list[torch.Tensor]:
    if size > 1:
        check_group("prepare", "tp", group, size, rank)
    tensors = [hidden_states, router_logits] if mask is None else [hidden_states, router_logits, mask]
    return [chunk_rows(tensor, padded_num_tokens, size, rank) for tensor in tensors]


def _finalize_mc2(
    hidden_states: torch.Tensor, num_tokens: int, padded_num_tokens: int, group: str, size: int
) -> torch.Tensor:
    if size == 1:
        return first_rows(hidden_states, num_tokens)
    return gather_chunks(hidden_states, num_tokens, group, size)()


prepare_all2all = define(
    "prepare_all2all(Tensor hidden_states, Tensor router_logits, str group, int size, SymInt rank)"
    " -> (Tensor, Tensor, SymInt, SymInt)",
    composite=_prepare_all2all,
    check=shapes.check_prepare_all2all,
)
finalize_all2all = define(
    "finalize_all2all(Tensor hidden_states, SymInt num_tokens, str group, int size) -> Tensor",
    composite=blocking(gather_chunks),
    check=shapes.check_finalize_all2all,
)
prepare_mc2 = define(
    "prepare_mc2(Tensor hidden_states, Tensor router_logits, Tensor? mask, SymInt padded_num_tokens, str group,"
    " int size, SymInt rank) -> Tensor[]",
    composite=_prepare_mc2,
    check=shapes.check_prepare_mc2,
)
finalize_mc2 = define(
    "finalize_mc2(Tensor hidden_states, SymInt num_tokens, SymInt padded_num_tokens, str group, int size) -> Tensor",
    composite=_finalize_mc2,
    check=shapes.check_finalize_mc2,
)


def chunks_of(op: str, num_tokens: int, lengths: Lengths, layout: Layout) -> ShardState:
    """P, and into how many chunks it is cut."""
    tp, mask = layout.groups.tp.size, lengths.mask
    num_chunks = 1 if layout.tokens_are_sharded or layout.shared_expert_dp else tp
    if layout.strategy is Strategy.ALL2ALL:
        return ShardState(num_tokens, padded_rows(num_tokens, num_chunks), num_chunks)
    if mask is not None:
        padded = mask.shape[0] // tp if layout.tokens_are_sharded else mask.shape[0]
    else:
        longest = known_longest(op, lengths, "MC2")
        padded = longest if layout.tokens_are_sharded else padded_rows(longest, tp)
    return ShardState(num_tokens, padded, num_chunks)


def _is_unchanged(state: ShardState) -> bool:
    """Whether prepare has nothing to do, and so finalize neither."""
    return state.num_chunks == 1 and is_known(state.num_tokens == state.padded_num_tokens)


def _chunk_group(state: ShardState, layout: Layout) -> Group:
    return Group.single() if state.num_chunks == 1 else layout.groups.tp


def prepare(
    hidden_states: torch.Tensor, router_logits: torch.Tensor, layout: Layout, lengths: Lengths, quant: Quant
) -> PrepareOutput:
    """Pad and chunk over TP; the identity where there is nothing to do. No collective.

    A sequence-parallel shard is a chunk already, which MC2 pads to the common length.
    """
    if quant is not Quant.NONE:
        raise ValueError(
            f"prepare: quant must be NONE for {layout.strategy.name}, whose dispatch quantises, got {quant}"
        )
    num_tokens = hidden_states.shape[0]
    state = chunks_of("prepare", num_tokens, lengths, layout)
    mask = active_tokens(num_tokens, lengths, layout)
    if _is_unchanged(state):
        return PrepareOutput(hidden_states, router_logits, mask, None, state)
    group, padded = _chunk_group(state, layout), state.padded_num_tokens
    if layout.strategy is Strategy.ALL2ALL and mask is None:
        hidden_chunk, logits_chunk, num_tokens, padded = prepare_all2all(hidden_states, router_logits, *group)
        return PrepareOutput(hidden_chunk, logits_chunk, None, None, ShardState(num_tokens, padded, state.num_chunks))
    hidden_chunk, logits_chunk, *masks = prepare_mc2(hidden_states, router_logits, mask, padded, *group)
    return PrepareOutput(hidden_chunk, logits_chunk, masks[0] if masks else None, None, state)


def finalize(hidden_states: torch.Tensor, state: State, layout: Layout) -> torch.Tensor:
    """Gather the chunks over TP, where prepare cut them, and cut the padding. At most one all-gather over TP."""
    state = _own_state("finalize", state)
    if _is_unchanged(state):
        shapes.check_chunk(hidden_states, state.padded_num_tokens)
        return hidden_states
    name, size, _ = _chunk_group(state, layout)
    output: torch.Tensor
    if layout.strategy is Strategy.ALL2ALL:
        output = finalize_all2all(hidden_states, state.num_tokens, name, size)
    else:
        output = finalize_mc2(hidden_states, state.num_tokens, state.padded_num_tokens, name, size)
    return output


def lay_out(x: torch.Tensor, state: State, layout: Layout) -> torch.Tensor:
    """Pad and cut per-token integers like the tokens. No collective."""
    state = _own_state("lay_out_like_prepared", state)
    if _is_unchanged(state):
        return x
    rank = 0 if state.num_chunks == 1 else layout.groups.tp.rank
    chunk: torch.Tensor = chunk_tokens(x, state.padded_num_tokens, state.num_chunks, rank, -1)
    return chunk


def _own_state(op: str, state: State) -> ShardState:
    if not isinstance(state, ShardState):
        raise TypeError(f"{op}: state must be that of an ALL2ALL or MC2 prepare, got {type(state).__name__}")
    return state


def reduction(layout: Layout) -> Reduction:
    """Every exchange brings back finished rows."""
    return Reduction.COMPLETE


def capacity_of(state: ShardState, call: StageCall) -> int | None:
    """Rows that every rank sends to every rank: as many as any rank has, so that nothing is dropped. None for other kinds."""
    if call.layout.dispatch is not Dispatch.FIXED_CAPACITY:
        return None
    rows = state.padded_num_tokens // state.num_chunks
    if call.layout.strategy is Strategy.MC2:
        return rows
    capacity = rows_per_rank(known_longest("moe_stage", call.lengths, "FIXED_CAPACITY"), state.num_chunks)
    check_at_most("moe_stage", "rows of a rank", rows, capacity, "those common to the EP group")
    return capacity


def steps(call: StageCall) -> Steps[torch.Tensor | StageOutput]:
    """Route this rank's tokens, send its chunk of them to their experts, and bring the results back."""
    state = chunks_of("moe_stage", call.hidden_states.shape[0], call.lengths, call.layout)
    capacity, (tp_name, tp_size, tp_rank) = capacity_of(state, call), _chunk_group(state, call.layout)
    _, _, (ep_name, ep_size, _), _ = call.layout.groups
    choice = choose(call)
    x, weights, ids = call.hidden_states, *choice
    if not _is_unchanged(state):
        padded = state.padded_num_tokens
        x = chunk_rows(x, padded, tp_size, tp_rank)
        ids, weights = chunk_rows(ids, padded, tp_size, tp_rank, -1), chunk_rows(weights, padded, tp_size, tp_rank)
    slots, num_dropped = to_physical(ids, call.routing), None
    fused = _fused_exchange(call, x, weights, capacity)
    exchange = None if call.layout.dispatch is None else EXCHANGES.get(call.layout.dispatch)
    if fused is not None and capacity is not None:
        start = partial(_exchange_fused, call, fused, x, slots, weights, capacity)
        routed, local_part = yield Transfer(start, partial(begin_shared_experts, call))
    elif exchange is None:
        local_part = begin_shared_experts(call)
        rows, *scale = quantize_rows(call, x)
        routed = run_own_experts(call, [rows, slots, weights, *scale])
    else:
        rows, *scale = quantize_rows(call, x)
        tensors, num_local = [rows, slots, weights, *scale], call.experts.w13.shape[0]
        send = partial(exchange.dispatch, tensors, num_local, capacity, ep_name, ep_size)
        (arrived, sent), local_part = yield Transfer(send, partial(begin_shared_experts, call))
        shares = run_own_experts(call, arrived)
        routed, _ = yield Transfer(partial(exchange.combine, shares, sent, ep_name, ep_size))
        num_dropped = getattr(sent, "num_dropped", None)
    if state.num_chunks > 1:
        routed, _ = yield Transfer(partial(gather_chunks, routed, state.num_tokens, tp_name, tp_size))
    elif not _is_unchanged(state):
        routed = routed.narrow(0, 0, state.num_tokens)
    if not is_finished(call, Reduction.COMPLETE):
        routed, _ = yield Transfer(partial(finish, call, Reduction.COMPLETE, routed, local_part))
    yield result_of(call, routed, choice, num_dropped)


def _fused_exchange(
    call: StageCall, x: torch.Tensor, weights: torch.Tensor, capacity: int | None
) -> FusedExchange | None:
    """The way of the device to dispatch and combine in one op each, where it may take these rows."""
    if capacity is None or call.routing.apply_router_weight_on_input or trains(call, x, weights):
        return None
    return exchange_for(x, capacity, weights.shape[1], call.quant)


def _exchange_fused(
    call: StageCall,
    fused: FusedExchange,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    capacity: int,
) -> Wait[torch.Tensor]:
    """Dispatch, experts and combine. It leaves nothing in flight, and nothing of another stream may be, either."""
    num_rows, num_local, ep = x.shape[0], call.experts.w13.shape[0], call.layout.groups.ep
    is_given = call.topk_ids is not None
    rows, scale, counts, sent = fused.dispatch(
        pad_rows(x, capacity),
        pad_rows(topk_ids, capacity, -1),
        pad_rows(topk_weights, capacity),
        num_local_experts=num_local,
        ep=ep,
        quant=call.quant,
        has_gaps=is_given or call.routing.logical_to_physical is not None,
        may_repeat=is_given,
    )
    y = run_experts(rows, counts, call.experts, scale=scale, quant=call.quant, dtype=x.dtype)
    combined = fused.combine(y, sent, num_local_experts=num_local, ep=ep)
    if not is_known(num_rows == capacity):
        combined = combined.narrow(0, 0, num_rows)
    return lambda: combined
