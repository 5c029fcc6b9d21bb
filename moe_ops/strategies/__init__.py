"""Prepare and finalize for every strategy, behind one signature each, and the table of strategies.

prepare -> route -> dispatch -> experts -> combine -> finalize
^^^^^^^                                              ^^^^^^^^
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fake_impls.checks import check_choice, check_dtype, check_equal
from fake_impls.strategies.exchange import check_tokens
from moe_ops._library import refuse_forward_mode
from moe_ops.collectives import all_reduce
from moe_ops.lengths import resolve_lengths
from moe_ops.overlap import Steps
from moe_ops.steps import StageCall
from moe_ops.strategies import allgather, exchange
from moe_ops.types import Dispatch, Layout, Lengths, PrepareOutput, Quant, Reduction, StageOutput, State, Strategy

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


class StrategySteps(NamedTuple):
    """A strategy: pure functions, and the kinds of dispatch that it goes with, of which the first is its own.

    Attributes:
        prepare: takes hidden states, logits, the layout, resolved lengths and the format of activations.
        finalize: takes rows, prepare's state and the layout; leaves a sum over TP open.
        lay_out: takes per-token integers, prepare's state and the layout.
        reduction: takes the layout; says whether finalize leaves a sum over TP open.
        steps: the whole stage as a stream of work.
        dispatches: kinds of dispatch.
    """

    prepare: Callable[[torch.Tensor, torch.Tensor, Layout, Lengths, Quant], PrepareOutput]
    finalize: Callable[[torch.Tensor, State, Layout], torch.Tensor]
    lay_out: Callable[[torch.Tensor, State, Layout], torch.Tensor]
    reduction: Callable[[Layout], Reduction]
    steps: Callable[[StageCall], Steps[torch.Tensor | StageOutput]]
    dispatches: tuple[Dispatch, ...]


_exchange = (exchange.prepare, exchange.finalize, exchange.lay_out, exchange.reduction, exchange.steps)
STRATEGIES = {
    Strategy.ALL2ALL: StrategySteps(*_exchange, (Dispatch.ALL_TO_ALL, Dispatch.FIXED_CAPACITY)),
    Strategy.MC2: StrategySteps(*_exchange, (Dispatch.FIXED_CAPACITY, Dispatch.ALL_TO_ALL)),
    Strategy.ALLGATHER: StrategySteps(
        allgather.prepare,
        allgather.finalize,
        allgather.lay_out,
        allgather.reduction,
        allgather.steps,
        (Dispatch.LOCAL,),
    ),
}


def strategy_of(op: str, layout: Layout) -> StrategySteps:
    """The row of the table.

    Raises:
        TypeError: `layout` is not one, or a field of it is of another kind.
        ValueError: its dispatch does not go with its strategy.
    """
    check_choice(op, "layout", layout, Layout)
    check_choice(op, "layout.strategy", layout.strategy, Strategy)
    row = STRATEGIES[layout.strategy]
    if layout.dispatch is not None:
        check_choice(op, "layout.dispatch", layout.dispatch, Dispatch)
        if layout.dispatch not in row.dispatches:
            allowed = " or ".join(kind.name for kind in row.dispatches)
            raise ValueError(
                f"{op}: layout.dispatch must be {allowed} for {layout.strategy.name}, got {layout.dispatch}"
            )
    return row


def prepare(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    layout: Layout,
    lengths: Lengths = Lengths(),
    quant: Quant = Quant.NONE,
) -> PrepareOutput:
    """Lay the tokens of this rank out for dispatch. Rows that are added are zero and come after the real ones.

    Where nothing is to be done the inputs themselves are returned; otherwise no result aliases an input. 0 tokens are a count
    like any other.

    | strategy | rows of the result | all-gathers |
    |---|---|---|
    | ALL2ALL | ``ceil(T / TP)``: chunk `tp.rank` of the padded tokens | none |
    | MC2 | ``ceil(longest / TP)``, or ``P / TP`` with a mask ``[P]``: likewise | none |
    | ALLGATHER, DP form | ``PCP * DP * longest`` | over DP, over PCP |
    | ALLGATHER, EP form | ``sum(per_rank)``, or ``EP * longest`` | over EP |

    Args:
        hidden_states: ``[T, H]``, the tokens of this rank; equal on all ranks of a TP group, unless sharded.
        router_logits: ``[T, E]``.
        layout: how the stage is laid over ranks.
        lengths: what is known of token counts. ALL2ALL needs nothing; the others, where there are other ranks, need `longest`
            or what it follows from.
        quant: ALLGATHER, EP form: quantise before the gather, so that fewer bytes travel. The others quantise later, where they
            dispatch.

    Raises:
        ValueError: an argument has the wrong dimensions, rows, length or group size; the message names it.
        TypeError: an argument has the wrong type or dtype.
        RuntimeError: a process group is not initialised. Compiled code raises for row counts, too.

    Example::

        out = mo.prepare(x, router_logits, layout, lengths=mo.Lengths(longest=5))
        y = mo.finalize(expert_output, out.state, layout)
    """
    row = strategy_of("prepare", layout)
    check_choice("prepare", "quant", quant, Quant)
    check_tokens("prepare", hidden_states, router_logits)
    refuse_forward_mode("prepare", (hidden_states, router_logits))
    lengths = resolve_lengths("prepare", hidden_states.shape[0], lengths, layout)
    return row.prepare(hidden_states, router_logits, layout, lengths, quant)


def finalize(hidden_states: torch.Tensor, state: State, layout: Layout, reduce_results: bool = False) -> torch.Tensor:
    """Bring the rows that `prepare` made back to the tokens that it was given, ``[num_tokens, H]``, and sum where it gathered.

    ALL2ALL and MC2 gather the chunks over TP; ALLGATHER reduce-scatters over each group that prepare gathered over.

    Args:
        hidden_states: ``[rows of prepare's result, H]``, what the experts made of them.
        state: that of the prepare whose rows these are.
        layout: the one that prepare had.
        reduce_results: also finish a result that is partial over TP (see `output_reduction`) by one all-reduce. A
            complete result is never reduced again.

    Returns:
        ``[num_tokens, H]``: the tokens that prepare was given.

    Raises:
        ValueError: `hidden_states` has not the rows that prepare returned.
        TypeError: `state` is that of another strategy.
        RuntimeError: a process group is not initialised.

    Example::

        y = mo.finalize(expert_output, out.state, layout, reduce_results=True)
    """
    row = strategy_of("finalize", layout)
    refuse_forward_mode("finalize", (hidden_states,))
    output = row.finalize(hidden_states, state, layout)
    if reduce_results and row.reduction(layout) is Reduction.PARTIAL_OVER_TP:
        reduced: torch.Tensor = all_reduce(output, *layout.groups.tp[:2])
        return reduced
    return output


def lay_out_like_prepared(x: torch.Tensor, state: State, layout: Layout) -> torch.Tensor:
    """Put per-token integers, such as token ids, in the rows of the prepared tokens.

    Args:
        x: integers ``[T]`` or ``[T, ...]``, one row for each token that prepare was given.
        state: that of the prepare.
        layout: the one that prepare had.

    Returns:
        ``[rows of prepare's result, ...]``, -1 in the rows that prepare added. ALLGATHER gathers them, by one all-gather
        over each group that prepare gathered over; the other strategies communicate nothing.

    Raises:
        ValueError: `x` has not the rows that prepare was given.
        TypeError: `x` is not of integers, or `state` is that of another strategy.

    Example::

        input_ids = mo.lay_out_like_prepared(input_ids, out.state, layout)
    """
    row = strategy_of("lay_out_like_prepared", layout)
    check_dtype("lay_out_like_prepared", "x", x, INTEGERS)
    if x.dim() < 1:
        raise ValueError("lay_out_like_prepared: x must have at least 1 dimension, got 0-D")
    check_equal("lay_out_like_prepared", "rows of x", x.shape[0], state.num_tokens, "state.num_tokens")
    return row.lay_out(x, state, layout)


def output_reduction(layout: Layout) -> Reduction:
    """Whether finalize, without `reduce_results`, returns a finished value or one TP rank's summand of it.

    Only the ALLGATHER DP form leaves a sum open: it reduces over DP and PCP, and EP spans TP, too.

    Example::

        if mo.output_reduction(layout) is mo.Reduction.PARTIAL_OVER_TP:
            y = my_all_reduce_over_tp(y)
    """
    return strategy_of("output_reduction", layout).reduction(layout)
