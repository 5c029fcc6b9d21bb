"""AllGather: every rank sees all tokens, computes its own experts' share of each, and the shares are summed.

The DP form gathers over DP and then, around that, over PCP; finalize reduces in reverse. The EP form, for tokens that are a
sequence-parallel shard, gathers once over EP, which spans DP, PCP and TP.
"""

from collections.abc import Sequence

import torch

from fake_impls.layout import largest
from fake_impls.strategies import allgather as shapes
from fake_impls.strategies.all2all import check_tokens
from moe_ops._library import define
from moe_ops.collectives import all_reduce, copy_rows, expand_rows, start_gather_rows, start_reduce_scatter
from moe_ops.groups import ParallelGroups, check_group
from moe_ops.overlap import Finish
from moe_ops.quantize import quantize_activations
from moe_ops.strategies.all2all import unchanged
from moe_ops.types import DataParallelState, ExpertParallelState, PrepareOutput, Quant, State, UnchangedState


def _gather_dp(
    tensors: Sequence[torch.Tensor],
    fill: Sequence[int],
    max_tokens_across_dp: int,
    max_tokens_across_pcp: int,
    dp_group: str,
    dp_size: int,
    pcp_group: str,
    pcp_size: int,
) -> tuple[list[torch.Tensor], int, int, int, int]:
    num_tokens = tensors[0].shape[0]
    padded, before_pcp, padded_before_pcp = shapes.dp_rows(
        num_tokens, max_tokens_across_dp, max_tokens_across_pcp, dp_size, pcp_size
    )
    if dp_size == 1 and pcp_size == 1:
        gathered = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    else:
        gathered = _start_gather_dp(tensors, fill, padded, padded_before_pcp, dp_group, dp_size, pcp_group, pcp_size)()
    return gathered, num_tokens, padded, before_pcp, padded_before_pcp


def _start_gather_dp(
    tensors: Sequence[torch.Tensor],
    fill: Sequence[int],
    padded: int,
    padded_before_pcp: int,
    dp_group: str,
    dp_size: int,
    pcp_group: str,
    pcp_size: int,
) -> Finish[list[torch.Tensor]]:
    """Gather over DP, then over PCP; the last of the two is in flight."""
    if dp_size > 1:
        check_group("prepare", "dp", dp_group, dp_size)
        wait = start_gather_rows(tensors, rows=padded, fill=fill, size=dp_size, group=dp_group)
        if pcp_size == 1:
            return wait
        tensors = wait()
    check_group("prepare", "pcp", pcp_group, pcp_size)
    return start_gather_rows(tensors, rows=padded_before_pcp, fill=fill, size=pcp_size, group=pcp_group)


def _reduce_dp(
    hidden_states: torch.Tensor,
    num_tokens: int,
    num_tokens_before_pcp: int,
    padded_num_tokens_before_pcp: int,
    dp_group: str,
    dp_size: int,
    pcp_group: str,
    pcp_size: int,
) -> torch.Tensor:
    shapes.check_gathered(hidden_states, padded_num_tokens_before_pcp, pcp_size)
    if dp_size == 1 and pcp_size == 1:
        return copy_rows(hidden_states, 0, num_tokens)
    return _start_reduce_dp(hidden_states, num_tokens, num_tokens_before_pcp, dp_group, dp_size, pcp_group, pcp_size)()


def _start_reduce_dp(
    hidden_states: torch.Tensor,
    num_tokens: int,
    num_tokens_before_pcp: int,
    dp_group: str,
    dp_size: int,
    pcp_group: str,
    pcp_size: int,
) -> Finish[torch.Tensor]:
    """Reduce-scatter over PCP, then over DP; the last of the two is in flight."""
    if pcp_size > 1:
        check_group("finalize", "pcp", pcp_group, pcp_size)
        wait_pcp = start_reduce_scatter(hidden_states, pcp_size, pcp_group)
        if dp_size == 1:
            return lambda: wait_pcp().narrow(0, 0, num_tokens)
        hidden_states = wait_pcp().narrow(0, 0, num_tokens_before_pcp)
    check_group("finalize", "dp", dp_group, dp_size)
    wait = start_reduce_scatter(hidden_states, dp_size, dp_group)
    return lambda: wait().narrow(0, 0, num_tokens)


def _gather_ep(
    tensors: Sequence[torch.Tensor], counts: Sequence[int] | None, group: str, size: int, rank: int
) -> tuple[list[torch.Tensor], int, int]:
    check_group("prepare", "ep", group, size, rank)
    num_tokens = tensors[0].shape[0]
    if counts is not None:
        shapes.check_counts("prepare", num_tokens, counts, size, rank)
    rows = num_tokens if counts is None else largest(counts)
    return _start_gather_ep(tensors, rows, counts, group, size)(), num_tokens, rows


def _start_gather_ep(
    tensors: Sequence[torch.Tensor], rows: int, counts: Sequence[int] | None, group: str, size: int
) -> Finish[list[torch.Tensor]]:
    return start_gather_rows(tensors, rows=rows, fill=[0] * len(tensors), size=size, group=group, counts=counts)


def _reduce_ep(
    hidden_states: torch.Tensor, num_tokens: int, counts: Sequence[int] | None, group: str, size: int
) -> torch.Tensor:
    return _start_reduce_ep(hidden_states, num_tokens, counts, group, size)()


def _start_reduce_ep(
    hidden_states: torch.Tensor, num_tokens: int, counts: Sequence[int] | None, group: str, size: int
) -> Finish[torch.Tensor]:
    check_group("finalize", "ep", group, size)
    shapes.check_gathered_over_ep(hidden_states, num_tokens, counts, size)
    blocks = hidden_states if counts is None else expand_rows(hidden_states, counts)
    wait = start_reduce_scatter(blocks, size, group)
    return lambda: wait().narrow(0, 0, num_tokens)


prepare_allgather_dp = define(
    "prepare_allgather_dp(Tensor[] tensors, int[] fill, SymInt max_tokens_across_dp, SymInt max_tokens_across_pcp,"
    " str dp_group, int dp_size, str pcp_group, int pcp_size) -> (Tensor[], SymInt, SymInt, SymInt, SymInt)",
    composite=_gather_dp,
)
finalize_allgather_dp = define(
    "finalize_allgather_dp(Tensor hidden_states, SymInt num_tokens, SymInt num_tokens_before_pcp,"
    " SymInt padded_num_tokens_before_pcp, str dp_group, int dp_size, str pcp_group, int pcp_size) -> Tensor",
    composite=_reduce_dp,
)
prepare_allgather_ep = define(
    "prepare_allgather_ep(Tensor[] tensors, SymInt[]? num_tokens_across_ep, str group, int size, SymInt rank)"
    " -> (Tensor[], SymInt, SymInt)",
    composite=_gather_ep,
)
finalize_allgather_ep = define(
    "finalize_allgather_ep(Tensor hidden_states, SymInt num_tokens, SymInt[]? num_tokens_across_ep, str group, int size)"
    " -> Tensor",
    composite=_reduce_ep,
)


def gather(
    tensors: Sequence[torch.Tensor],
    *,
    fill: Sequence[int],
    groups: ParallelGroups,
    max_tokens_across_dp: int | None,
    max_tokens_across_pcp: int | None,
    num_tokens_across_ep: Sequence[int] | None,
    tokens_are_sharded: bool,
) -> tuple[list[torch.Tensor], State]:
    """Gather the rows of tensors that travel together: over EP if sharded, else over DP, then PCP.

    The DP form has rows that pad, with `fill` (0 or -1) in them; the EP form has none.
    """
    if tokens_are_sharded:
        return gather_over_ep(tensors, groups, num_tokens_across_ep)
    return _gather_over_dp(tensors, fill, groups, max_tokens_across_dp, max_tokens_across_pcp)


def start_gather(
    tensors: Sequence[torch.Tensor],
    *,
    fill: Sequence[int],
    groups: ParallelGroups,
    max_tokens_across_dp: int | None,
    max_tokens_across_pcp: int | None,
    num_tokens_across_ep: Sequence[int] | None,
    tokens_are_sharded: bool,
) -> Finish[tuple[list[torch.Tensor], State]]:
    """`gather` with the rows still in flight."""
    num_tokens = tensors[0].shape[0]
    if tokens_are_sharded:
        counts = _counts(num_tokens_across_ep, num_tokens, groups)
        rows = num_tokens if counts is None else largest(counts)
        state: State = ExpertParallelState(num_tokens, rows, counts or ())
        if groups.ep.size == 1:
            return lambda: (list(tensors), state)
        check_group("prepare", "ep", *groups.ep)
        wait = _start_gather_ep(tensors, rows, counts, *groups.ep[:2])
        return lambda: (wait(), state)
    dp, pcp = groups.dp[:2], groups.pcp[:2]
    if groups.dp.size == 1 and groups.pcp.size == 1:
        state = UnchangedState(num_tokens, num_tokens)
        return lambda: (list(tensors), state)
    lengths = _dp_lengths(num_tokens, groups, max_tokens_across_dp, max_tokens_across_pcp)
    padded, before_pcp, padded_before_pcp = shapes.dp_rows(num_tokens, *lengths, groups.dp.size, groups.pcp.size)
    state = DataParallelState(num_tokens, padded, before_pcp, padded_before_pcp)
    wait = _start_gather_dp(tensors, fill, padded, padded_before_pcp, *dp, *pcp)
    return lambda: (wait(), state)


def _gather_over_dp(
    tensors: Sequence[torch.Tensor],
    fill: Sequence[int],
    groups: ParallelGroups,
    max_tokens_across_dp: int | None,
    max_tokens_across_pcp: int | None,
) -> tuple[list[torch.Tensor], State]:
    num_tokens = tensors[0].shape[0]
    if groups.dp.size == 1 and groups.pcp.size == 1:
        return list(tensors), UnchangedState(num_tokens, num_tokens)
    lengths = _dp_lengths(num_tokens, groups, max_tokens_across_dp, max_tokens_across_pcp)
    gathered, *counts = prepare_allgather_dp(tensors, fill, *lengths, *groups.dp[:2], *groups.pcp[:2])
    return gathered, DataParallelState(*counts)


def _dp_lengths(
    num_tokens: int, groups: ParallelGroups, max_tokens_across_dp: int | None, max_tokens_across_pcp: int | None
) -> tuple[int, int]:
    """What each rank of DP, and of PCP, pads to: as given, or what this rank has, which is then the same on all of them."""
    rows = num_tokens if max_tokens_across_dp is None else max_tokens_across_dp
    before_pcp = (rows if groups.dp.size > 1 else num_tokens) * groups.dp.size
    return rows, before_pcp if max_tokens_across_pcp is None else max_tokens_across_pcp


def gather_over_ep(
    tensors: Sequence[torch.Tensor], groups: ParallelGroups, num_tokens_across_ep: Sequence[int] | None
) -> tuple[list[torch.Tensor], State]:
    """Gather the rows of tensors that travel together over EP, ragged counts compacted."""
    num_tokens = tensors[0].shape[0]
    counts = _counts(num_tokens_across_ep, num_tokens, groups)
    if groups.ep.size == 1:
        return list(tensors), ExpertParallelState(num_tokens, num_tokens, counts or ())
    gathered, num_tokens, padded = prepare_allgather_ep(tensors, counts, *groups.ep)
    return gathered, ExpertParallelState(num_tokens, padded, counts or ())


def _counts(
    num_tokens_across_ep: Sequence[int] | None, num_tokens: int, groups: ParallelGroups
) -> tuple[int, ...] | None:
    if isinstance(num_tokens_across_ep, torch.Tensor):
        raise TypeError("prepare: num_tokens_across_ep must be a sequence of integers, got a tensor")
    if num_tokens_across_ep is None:
        return None
    counts = tuple(num_tokens_across_ep)
    shapes.check_counts("prepare", num_tokens, counts, groups.ep.size, groups.ep.rank)
    return counts


def prepare(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    *,
    groups: ParallelGroups,
    max_tokens_across_dp: int | None,
    max_tokens_across_pcp: int | None,
    num_tokens_across_ep: Sequence[int] | None,
    tokens_are_sharded: bool,
    quant: Quant,
) -> PrepareOutput:
    """Gather tokens and logits (and scales, in the EP form) in one all-gather a group."""
    check_tokens("prepare", hidden_states, router_logits)
    tensors = [hidden_states, router_logits]
    if quant is not Quant.NONE and tokens_are_sharded:
        quantized, scale = quantize_activations(hidden_states, quant=quant)
        tensors = [quantized, router_logits, scale]
    gathered, state = gather(
        tensors,
        fill=[0] * len(tensors),
        groups=groups,
        max_tokens_across_dp=max_tokens_across_dp,
        max_tokens_across_pcp=max_tokens_across_pcp,
        num_tokens_across_ep=num_tokens_across_ep,
        tokens_are_sharded=tokens_are_sharded,
    )
    return PrepareOutput(gathered[0], gathered[1], None, gathered[2] if len(gathered) == 3 else None, state)


def finalize(
    hidden_states: torch.Tensor, state: State, *, groups: ParallelGroups, reduce_results: bool
) -> torch.Tensor:
    """Sum what prepare gathered and cut to this rank's own tokens. One reduce-scatter for each gather of prepare.

    The DP form leaves one summand on each TP rank; with `reduce_results` an all-reduce over TP adds them up.
    """
    if isinstance(state, ExpertParallelState):
        if groups.ep.size == 1:
            return unchanged(hidden_states, state)
        counts = state.num_tokens_across_ep or None
        summed: torch.Tensor = finalize_allgather_ep(hidden_states, state.num_tokens, counts, *groups.ep[:2])
        return summed
    if isinstance(state, UnchangedState):
        hidden_states = unchanged(hidden_states, state)
    else:
        dp_state = _dp_state("finalize", state)
        lengths = dp_state.num_tokens, dp_state.num_tokens_before_pcp, dp_state.padded_num_tokens_before_pcp
        hidden_states = finalize_allgather_dp(hidden_states, *lengths, *groups.dp[:2], *groups.pcp[:2])
    if reduce_results and groups.tp.size > 1:
        reduced: torch.Tensor = all_reduce(hidden_states, groups.tp.name, groups.tp.size)
        return reduced
    return hidden_states


def start_finalize(hidden_states: torch.Tensor, state: State, *, groups: ParallelGroups) -> Finish[torch.Tensor]:
    """`finalize` without the sum over TP, with the rows still in flight, where prepare gathered any."""
    if isinstance(state, ExpertParallelState):
        return _start_reduce_ep(hidden_states, state.num_tokens, state.num_tokens_across_ep or None, *groups.ep[:2])
    dp_state = _dp_state("finalize", state)
    shapes.check_gathered(hidden_states, dp_state.padded_num_tokens_before_pcp, groups.pcp.size)
    lengths = dp_state.num_tokens, dp_state.num_tokens_before_pcp
    return _start_reduce_dp(hidden_states, *lengths, *groups.dp[:2], *groups.pcp[:2])


def lay_out(token_ids: torch.Tensor, state: State, *, groups: ParallelGroups) -> torch.Tensor:
    """Gather per-token integers like the tokens. One all-gather for each gather of prepare."""
    if isinstance(state, ExpertParallelState):
        gathered, _ = gather_over_ep([token_ids], groups, state.num_tokens_across_ep or None)
        return gathered[0]
    if isinstance(state, UnchangedState):
        return token_ids
    dp_state = _dp_state("lay_out_like_prepared", state)
    lengths = dp_state.padded_num_tokens, dp_state.padded_num_tokens_before_pcp
    gathered, _ = _gather_over_dp([token_ids], [-1], groups, *lengths)
    return gathered[0]


def _dp_state(op: str, state: State) -> DataParallelState:
    if not isinstance(state, DataParallelState):
        raise TypeError(f"{op}: state must be that of an ALLGATHER prepare, got {type(state).__name__}")
    return state
