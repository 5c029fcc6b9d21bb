"""Prepare and finalize for every strategy, behind one signature each.

prepare -> route -> dispatch -> experts -> combine -> finalize
^^^^^^^                                              ^^^^^^^^
"""

from collections.abc import Sequence

import torch

from fake_impls.checks import check_choice, check_dtype, check_equal
from moe_ops.groups import ParallelGroups
from moe_ops.overlap import Finish
from moe_ops.strategies import all2all, allgather, mc2
from moe_ops.types import (
    ExpertParallelState,
    PrepareOutput,
    Quant,
    Reduction,
    ShardState,
    State,
    Strategy,
    UnchangedState,
)

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


def prepare(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    *,
    strategy: Strategy,
    groups: ParallelGroups,
    padded_num_tokens: int | None = None,
    mc2_mask: torch.Tensor | None = None,
    max_tokens_across_dp: int | None = None,
    max_tokens_across_pcp: int | None = None,
    num_tokens_across_ep: Sequence[int] | None = None,
    tokens_are_sharded: bool = False,
    shared_expert_dp: bool = False,
    quant: Quant = Quant.NONE,
) -> PrepareOutput:
    """Lay the tokens of this rank out for dispatch. Rows that are added are zero and come after the real ones.

    An argument that a strategy does not name is ignored by it. Where nothing is to be done the inputs themselves are
    returned; otherwise no result aliases an input. 0 tokens are a count like any other.

    | strategy | rows of the result | all-gathers |
    |---|---|---|
    | ALL2ALL | ``ceil(T / TP)``: chunk `tp.rank` of the padded tokens | none |
    | MC2 | ``padded_num_tokens / TP``: likewise | none |
    | ALLGATHER, DP form | ``DP * max_tokens_across_dp``; with PCP, ``PCP * max_tokens_across_pcp`` | over DP, over PCP |
    | ALLGATHER, EP form | ``sum(num_tokens_across_ep)``, or ``EP * T`` | over EP |

    Args:
        hidden_states: ``[T, H]``, the tokens of this rank; equal on all ranks of a TP group, unless sharded.
        router_logits: ``[T, E]``.
        strategy: ALLGATHER takes its EP form when `tokens_are_sharded`, its DP form otherwise.
        groups: the process groups; which of them are used depends on the strategy.
        padded_num_tokens: MC2: rows that each TP group pads to, a multiple of TP and at least T, the same on all
            ranks of EP. None: the rows of `mc2_mask`.
        mc2_mask: MC2: bool ``[padded_num_tokens]``, a prefix of True: which of the TP group's tokens are real. For sharded
            tokens, all shards of the group have as many rows.
        max_tokens_across_dp: ALLGATHER, DP form: rows that each rank of DP pads to, at least T and the same on all of
            them. None: T is the same on all of them.
        max_tokens_across_pcp: ALLGATHER, DP form: rows that the result of the DP gather (``DP * max_tokens_across_dp``, or
            T without DP) is padded to before the PCP gather, the same on all ranks of PCP. None: they have as many.
        num_tokens_across_ep: ALLGATHER, EP form: T of each EP rank. None: T is the same on all of them.
        tokens_are_sharded: the tokens are a sequence-parallel shard already: they are not chunked over TP, and
            finalize returns the shard.
        shared_expert_dp: ALL2ALL and MC2: each TP rank keeps all tokens of its TP group instead of a chunk, for
            shared experts that are replicated; MC2 still pads.
        quant: ALLGATHER, EP form: quantise before the gather, so that fewer bytes travel. The other strategies
            return the tokens as they are: there it is dispatch that quantises.

    Raises:
        ValueError: an argument has the wrong dimensions, rows, length or group size; the message names it.
        TypeError: an argument has the wrong type or dtype.
        RuntimeError: a process group is not initialised. Compiled code raises for row counts, too.
    """
    check_choice("prepare", "strategy", strategy, Strategy)
    check_choice("prepare", "quant", quant, Quant)
    if strategy is Strategy.ALL2ALL:
        keep_all_tokens = tokens_are_sharded or shared_expert_dp
        return all2all.prepare(hidden_states, router_logits, groups=groups, keep_all_tokens=keep_all_tokens)
    if strategy is Strategy.MC2:
        return mc2.prepare(
            hidden_states,
            router_logits,
            groups=groups,
            padded_num_tokens=padded_num_tokens,
            mc2_mask=mc2_mask,
            tokens_are_sharded=tokens_are_sharded,
            shared_expert_dp=shared_expert_dp,
        )
    return allgather.prepare(
        hidden_states,
        router_logits,
        groups=groups,
        max_tokens_across_dp=max_tokens_across_dp,
        max_tokens_across_pcp=max_tokens_across_pcp,
        num_tokens_across_ep=num_tokens_across_ep,
        tokens_are_sharded=tokens_are_sharded,
        quant=quant,
    )


def finalize(
    hidden_states: torch.Tensor,
    state: State,
    *,
    strategy: Strategy,
    groups: ParallelGroups,
    reduce_results: bool = False,
) -> torch.Tensor:
    """Undo what prepare did to the rows, and sum where it gathered.

    ALL2ALL and MC2 gather the chunks over TP; ALLGATHER reduce-scatters over each group that prepare gathered over.

    Args:
        hidden_states: ``[rows of prepare's result, H]``, what the experts made of them.
        state: that of the prepare whose rows these are.
        strategy: the one that prepare had.
        groups: those that prepare had.
        reduce_results: also finish a result that is partial over TP (see `output_reduction`) by one all-reduce. A
            complete result is never reduced again.

    Returns:
        ``[num_tokens, H]``: the tokens that prepare was given.

    Raises:
        ValueError: `hidden_states` has not the rows that prepare returned.
        RuntimeError: a process group is not initialised.
    """
    check_choice("finalize", "strategy", strategy, Strategy)
    if strategy is Strategy.ALL2ALL:
        return all2all.finalize(hidden_states, state, groups=groups)
    if strategy is Strategy.MC2:
        return mc2.finalize(hidden_states, state, groups=groups)
    return allgather.finalize(hidden_states, state, groups=groups, reduce_results=reduce_results)


def start_finalize(
    hidden_states: torch.Tensor, state: State, *, strategy: Strategy, groups: ParallelGroups
) -> Finish[torch.Tensor]:
    """`finalize` without `reduce_results`, with the rows still in flight."""
    is_single = isinstance(state, ExpertParallelState) and groups.ep.size == 1
    if is_single or isinstance(state, UnchangedState) or (isinstance(state, ShardState) and state.num_chunks == 1):
        output = finalize(hidden_states, state, strategy=strategy, groups=groups)
        return lambda: output
    if strategy is Strategy.ALL2ALL:
        return all2all.start_finalize(hidden_states, state, groups=groups)
    if strategy is Strategy.MC2:
        return mc2.start_finalize(hidden_states, state, groups=groups)
    return allgather.start_finalize(hidden_states, state, groups=groups)


def lay_out_like_prepared(
    input_ids: torch.Tensor, state: State, *, strategy: Strategy, groups: ParallelGroups
) -> torch.Tensor:
    """Put per-token integers, such as the token ids of hash routing, in the rows of the prepared tokens.

    Args:
        input_ids: integers ``[T]`` or ``[T, ...]``, one row for each token that prepare was given.
        state: that of the prepare.
        strategy: the one that prepare had.
        groups: those that prepare had.

    Returns:
        ``[rows of prepare's result, ...]``, -1 in the rows that prepare added. ALLGATHER gathers them, by one all-gather
        over each group that prepare gathered over; the other strategies communicate nothing.
    """
    check_choice("lay_out_like_prepared", "strategy", strategy, Strategy)
    check_dtype("lay_out_like_prepared", "input_ids", input_ids, INTEGERS)
    num_tokens = state.num_tokens
    if input_ids.dim() < 1:
        raise ValueError("lay_out_like_prepared: input_ids must have at least 1 dimension, got 0-D")
    check_equal("lay_out_like_prepared", "rows of input_ids", input_ids.shape[0], num_tokens, "state.num_tokens")
    if strategy in (Strategy.ALL2ALL, Strategy.MC2):
        return all2all.lay_out(input_ids, state, groups=groups)
    return allgather.lay_out(input_ids, state, groups=groups)


def output_reduction(*, strategy: Strategy, groups: ParallelGroups, tokens_are_sharded: bool = False) -> Reduction:
    """Whether finalize, without `reduce_results`, returns a finished value or one TP rank's summand of it.

    Only the AllGather DP form leaves a sum open: it reduces over DP and PCP, and EP spans TP, too.
    """
    check_choice("output_reduction", "strategy", strategy, Strategy)
    if strategy is Strategy.ALLGATHER and not tokens_are_sharded and groups.tp.size > 1:
        return Reduction.PARTIAL_OVER_TP
    return Reduction.COMPLETE


def active_rows(prepared: PrepareOutput, *, groups: ParallelGroups) -> torch.Tensor:
    """bool ``[rows]``: which rows of an ALL2ALL or MC2 prepare hold real tokens, and are not masked."""
    rows, state = prepared.hidden_states.shape[0], prepared.state
    is_chunk = isinstance(state, ShardState) and state.num_chunks > 1
    start = groups.tp.rank * rows if is_chunk else 0
    is_real = torch.arange(rows, device=prepared.hidden_states.device) < state.num_tokens - start
    return is_real if prepared.mc2_mask is None else is_real & prepared.mc2_mask
