"""Shared experts: an MLP that every token goes through, and how its sum joins that of the routed experts.

| tokens | weights | what is computed | collectives over TP | result |
|---|---|---|---|---|
| all of the TP group's | TP-sharded | all tokens, a part of the intermediate axis | none | one rank's summand |
| all of the TP group's | replicated | this rank's chunk of the tokens | an all-gather | complete |
| a shard | TP-sharded | the TP group's tokens, a part of the intermediate axis | an all-gather, a reduce-scatter | complete |
| a shard | replicated | the shard | none | complete |

T tokens, S rows of a shard, H hidden.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fake_impls.checks import check_dim, check_dtype
from fake_impls.layout import padded_rows
from moe_ops.collectives import all_reduce, on_rank_zero
from moe_ops.experts import activate
from moe_ops.groups import ParallelGroups
from moe_ops.strategies import all2all, allgather
from moe_ops.types import Reduction, ShardState, SharedExperts


def run_shared_experts(
    hidden_states: torch.Tensor,
    shared: SharedExperts,
    *,
    groups: ParallelGroups,
    tokens_are_sharded: bool = False,
    num_tokens_across_tp: Sequence[int] | None = None,
) -> tuple[torch.Tensor, Reduction]:
    """Run the shared experts on this rank's tokens; the table above says how.

    Args:
        hidden_states: ``[T, H]``: the tokens of the TP group, or this rank's shard of them.
        shared: the weights.
        groups: the process groups, of which TP is used.
        tokens_are_sharded: whether the tokens are a sequence-parallel shard.
        num_tokens_across_tp: rows of each TP rank's shard; None: as many on all.

    Returns:
        ``[T, H]`` for the tokens given, and whether it is complete or one TP rank's summand.

    Raises:
        ValueError, TypeError: a weight does not fit the tokens or the others.
    """
    local = run_local_part(hidden_states, shared, groups=groups, tokens_are_sharded=tokens_are_sharded)
    return _complete(local, hidden_states, shared, groups, tokens_are_sharded, num_tokens_across_tp)


def run_local_part(
    hidden_states: torch.Tensor, shared: SharedExperts, *, groups: ParallelGroups, tokens_are_sharded: bool
) -> torch.Tensor | None:
    """What is computed before any collective, so that it can be while rows travel; None where a collective comes first."""
    _check(hidden_states, shared)
    if groups.tp.size > 1 and not tokens_are_sharded and not shared.is_tp_sharded:
        return _mlp(all2all.chunk(hidden_states, groups=groups), shared)
    if groups.tp.size > 1 and tokens_are_sharded and shared.is_tp_sharded:
        return None
    return _mlp(hidden_states, shared)


def _complete(
    local: torch.Tensor | None,
    hidden_states: torch.Tensor,
    shared: SharedExperts,
    groups: ParallelGroups,
    tokens_are_sharded: bool,
    num_tokens_across_tp: Sequence[int] | None,
) -> tuple[torch.Tensor, Reduction]:
    """The rest of `run_shared_experts`."""
    tp = groups.tp
    if local is None:
        over_tp = ParallelGroups(tp=tp, ep=tp)
        gathered, gathered_state = allgather.gather_over_ep([hidden_states], over_tp, num_tokens_across_tp)
        summed = allgather.finalize(_mlp(gathered[0], shared), gathered_state, groups=over_tp, reduce_results=False)
        return summed, Reduction.COMPLETE
    if tp.size == 1 or tokens_are_sharded:
        return local, Reduction.COMPLETE
    if shared.is_tp_sharded:
        return local, Reduction.PARTIAL_OVER_TP
    num_tokens = hidden_states.shape[0]
    state = ShardState(num_tokens, padded_rows(num_tokens, tp.size), tp.size)
    return all2all.finalize(local, state, groups=groups), Reduction.COMPLETE


def add_shared_experts(
    routed: torch.Tensor,
    reduction: Reduction,
    hidden_states: torch.Tensor,
    shared: SharedExperts,
    *,
    groups: ParallelGroups,
    reduce_results: bool,
    tokens_are_sharded: bool = False,
    num_tokens_across_tp: Sequence[int] | None = None,
    local_part: torch.Tensor | None = None,
) -> torch.Tensor:
    """The routed experts' output with the shared experts' added, every sum over TP taken once.

    Args:
        routed: ``[T, H]``: what finalize returned without `reduce_results`.
        reduction: whether it is complete or one TP rank's summand, by `output_reduction`.
        hidden_states: ``[T, H]``, as in `run_shared_experts`.
        shared: likewise.
        groups: likewise.
        reduce_results: complete a summand by one all-reduce over TP. Without it a summand stays one, and a result that was
            complete stays complete.
        tokens_are_sharded: as in `run_shared_experts`.
        num_tokens_across_tp: likewise.
        local_part: what `run_local_part` computed, if it was called before.
    """
    if local_part is None:
        local_part = run_local_part(hidden_states, shared, groups=groups, tokens_are_sharded=tokens_are_sharded)
    output, output_reduction = _complete(
        local_part, hidden_states, shared, groups, tokens_are_sharded, num_tokens_across_tp
    )
    if reduction is Reduction.COMPLETE:
        return routed + (output if output_reduction is Reduction.COMPLETE else _sum_over_tp(output, groups))
    if output_reduction is Reduction.PARTIAL_OVER_TP:
        return _sum_over_tp(routed + output, groups) if reduce_results else routed + output
    return _sum_over_tp(routed, groups) + output if reduce_results else routed + on_rank_zero(output, groups.tp.rank)


def _sum_over_tp(x: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    total: torch.Tensor = all_reduce(x, groups.tp.name, groups.tp.size)
    return total


def _check(hidden_states: torch.Tensor, shared: SharedExperts) -> None:
    """Weights of the dtype of the tokens, that fit them and each other."""
    check_dim("shared_experts", "hidden_states", hidden_states, 2)
    weights = {"w13": shared.w13, "w2": shared.w2, "gate": shared.gate}
    for name, weight in weights.items():
        if weight is not None:
            check_dim("shared_experts", name, weight, 2)
            check_dtype("shared_experts", name, weight, (hidden_states.dtype,))
    width, inner = hidden_states.shape[1], shared.w2.shape[1]
    gate_shape = (1, width) if shared.gate is None else tuple(shared.gate.shape)
    if tuple(shared.w13.shape) != (2 * inner, width) or shared.w2.shape[0] != width or gate_shape != (1, width):
        raise ValueError(
            f"shared_experts: w13 must be [2 * I, H], w2 [H, I] and gate [1, H] for H = {width}, got "
            f"{tuple(shared.w13.shape)}, {tuple(shared.w2.shape)} and {gate_shape}"
        )


def _mlp(x_TH: torch.Tensor, shared: SharedExperts) -> torch.Tensor:
    y_TH = F.linear(activate(F.linear(x_TH, shared.w13), shared.activation), shared.w2)
    return y_TH if shared.gate is None else torch.sigmoid(F.linear(x_TH, shared.gate)) * y_TH
