"""Shared experts: an MLP that every token goes through, and how its sum joins that of the routed experts.

| tokens | weights | what is computed | collectives over TP | result |
|---|---|---|---|---|
| all of the TP group's | TP-sharded | all tokens, a part of the intermediate axis | none | one rank's summand |
| all of the TP group's | replicated | this rank's chunk of the tokens | an all-gather | complete |
| a shard | TP-sharded | the TP group's tokens, a part of the intermediate axis | an all-gather, a reduce-scatter | complete |
| a shard | replicated | the shard | none | complete |

T tokens, S rows of a shard, H hidden.
"""

import torch
import torch.nn.functional as F

from fake_impls.checks import check_dim, check_dtype
from fake_impls.experts import sum_dtype
from fake_impls.layout import largest, padded_rows
from moe_ops._library import Wait
from moe_ops.collectives import all_gather, chunk_rows, gather_rows, on_rank_zero, reduce_scatter, sum_over_ranks
from moe_ops.elementwise import each
from moe_ops.experts import activate
from moe_ops.groups import ParallelGroups, check_group
from moe_ops.lengths import known_longest, resolve_lengths, shards_of_tp
from moe_ops.packing import expand_rows
from moe_ops.types import Layout, Lengths, Reduction, SharedExperts


def run_shared_experts(
    hidden_states: torch.Tensor, shared: SharedExperts, layout: Layout, lengths: Lengths = Lengths()
) -> tuple[torch.Tensor, Reduction]:
    """Run the shared experts on this rank's tokens; the table above says how.

    Args:
        hidden_states: ``[T, H]``: the tokens of the TP group, or this rank's shard of them.
        shared: the weights.
        layout: as in `moe_stage`; of its groups TP is used.
        lengths: needed for a shard with weights that are TP-sharded.

    Returns:
        ``[T, H]`` for the tokens given, and whether it is complete or one TP rank's summand.

    Raises:
        ValueError, TypeError: a weight does not fit the tokens or the others, or lengths are needed and not said.

    Example::

        output, reduction = run_shared_experts(x, shared, layout)
    """
    lengths = resolve_lengths("shared_experts", hidden_states.shape[0], lengths, layout)
    check_lengths(shared, layout, lengths)
    local = run_local_part(hidden_states, shared, layout)
    output, reduction = _complete(local, hidden_states, shared, layout, lengths)
    return output.to(hidden_states.dtype), reduction


def check_lengths(shared: SharedExperts, layout: Layout, lengths: Lengths) -> None:
    """Raise unless lengths say what is needed of other TP ranks."""
    if _gathers_shards(shared, layout):
        known_longest("shared_experts", lengths, "shared experts that are sharded over TP, on tokens that are")
        groups = layout.groups
        is_known = lengths.mask is not None or shards_of_tp(lengths, groups) is not None
        if not is_known and groups.ep.size > 1 and groups.ep.name == groups.dp.name:
            raise ValueError(
                "shared_experts: lengths.mask must be given for shared experts that are sharded over TP, on tokens that are, "
                "where EP is the DP group: the other lengths tell nothing of other TP ranks; got none"
            )


def _gathers_shards(shared: SharedExperts, layout: Layout) -> bool:
    return layout.groups.tp.size > 1 and layout.tokens_are_sharded and shared.is_tp_sharded


def run_local_part(hidden_states: torch.Tensor, shared: SharedExperts, layout: Layout) -> torch.Tensor | None:
    """What is computed before any collective, so that it can be while rows travel; None where a collective comes first."""
    _check(hidden_states, shared)
    if _gathers_shards(shared, layout):
        return None
    tp = layout.groups.tp
    if tp.size > 1 and not layout.tokens_are_sharded and not shared.is_tp_sharded:
        padded = padded_rows(hidden_states.shape[0], tp.size)
        return _mlp(chunk_rows(hidden_states, padded, tp.size, tp.rank), shared)
    return _mlp(hidden_states, shared)


def _complete(
    local: torch.Tensor | None, hidden_states: torch.Tensor, shared: SharedExperts, layout: Layout, lengths: Lengths
) -> tuple[torch.Tensor, Reduction]:
    """The rest of `run_shared_experts`."""
    tp, num_tokens = layout.groups.tp, hidden_states.shape[0]
    if local is None:
        return _run_on_all_shards(hidden_states, shared, layout, lengths), Reduction.COMPLETE
    if tp.size == 1 or layout.tokens_are_sharded:
        return local, Reduction.COMPLETE
    if shared.is_tp_sharded:
        return local, Reduction.PARTIAL_OVER_TP
    check_group("shared_experts", "tp", *tp)
    return all_gather(local, tp.size, tp.name)().narrow(0, 0, num_tokens), Reduction.COMPLETE


def _run_on_all_shards(
    hidden_states: torch.Tensor, shared: SharedExperts, layout: Layout, lengths: Lengths
) -> torch.Tensor:
    """Gather the shards of the TP group, compute a part of the intermediate axis of each, and sum the parts of this one."""
    name, size, _ = layout.groups.tp
    check_group("shared_experts", "tp", name, size)
    counts = shards_of_tp(lengths, layout.groups)
    rows = known_longest("shared_experts", lengths, "") if counts is None else largest(counts)
    (gathered,) = gather_rows([hidden_states], rows, [0], size, name, counts)()
    parts = _mlp(gathered, shared)
    summed = reduce_scatter(parts if counts is None else expand_rows(parts, counts), size, name)()
    return summed.narrow(0, 0, hidden_states.shape[0])


def add_shared_experts(
    routed: torch.Tensor,
    reduction: Reduction,
    hidden_states: torch.Tensor,
    shared: SharedExperts,
    layout: Layout,
    lengths: Lengths = Lengths(),
    *,
    reduce_results: bool,
    local_part: torch.Tensor | None = None,
) -> Wait[torch.Tensor]:
    """The routed experts' output with the shared experts' added, every sum over TP taken once; the last one is in flight.

    Args:
        routed: ``[T, H]``: what finalize returned without `reduce_results`.
        reduction: whether it is complete or one TP rank's summand, by `output_reduction`.
        hidden_states: ``[T, H]``, as in `run_shared_experts`.
        shared: likewise.
        layout: likewise.
        lengths: likewise.
        reduce_results: complete a summand by one all-reduce over TP. Without it a summand stays one, and a result that was
            complete stays complete.
        local_part: what `run_local_part` computed, if it was called before.
    """
    if local_part is None:
        local_part = run_local_part(hidden_states, shared, layout)
    output, output_reduction = _complete(local_part, hidden_states, shared, layout, lengths)
    output, groups = output.to(routed.dtype), layout.groups
    if reduction is Reduction.COMPLETE:
        if output_reduction is Reduction.COMPLETE:
            return lambda: routed + output
        summed = _sum_over_tp(output, groups)
        return lambda: routed + summed()
    if output_reduction is Reduction.PARTIAL_OVER_TP:
        return _sum_over_tp(routed + output, groups) if reduce_results else lambda: routed + output
    if reduce_results:
        summed = _sum_over_tp(routed, groups)
        return lambda: summed() + output
    return lambda: routed + on_rank_zero(output, groups.tp.rank)


def _sum_over_tp(x: torch.Tensor, groups: ParallelGroups) -> Wait[torch.Tensor]:
    return sum_over_ranks(x, groups.tp.name, groups.tp.size)


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
    """In float32 for float16 tokens: the result may be beyond float16 where its product with the gate, or a sum, is not."""
    inner_TI, dtype = activate(F.linear(x_TH, shared.w13), shared.activation), sum_dtype(x_TH.dtype)
    y_TH = F.linear(inner_TI.to(dtype), shared.w2.to(dtype))
    return y_TH if shared.gate is None else each(torch.sigmoid, F.linear(x_TH, shared.gate)) * y_TH
