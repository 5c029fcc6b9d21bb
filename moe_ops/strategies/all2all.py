"""All2All: each TP rank sends its own chunk of the tokens to the experts; finalize gathers the chunks back.

T tokens, P tokens padded to a multiple of TP, H hidden.
"""

import torch

from fake_impls.checks import check_dim, check_equal
from fake_impls.layout import padded_rows
from fake_impls.strategies import all2all as shapes
from moe_ops._library import define
from moe_ops.collectives import chunk_rows, chunk_tokens, start_all_gather
from moe_ops.groups import ParallelGroups, check_group
from moe_ops.overlap import Finish
from moe_ops.types import PrepareOutput, ShardState, State, UnchangedState


def _prepare(
    hidden_states: torch.Tensor, router_logits: torch.Tensor, group: str, size: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    check_group("prepare", "tp", group, size, rank)
    shapes.check_tokens("prepare", hidden_states, router_logits)
    num_tokens = hidden_states.shape[0]
    padded = padded_rows(num_tokens, size)
    hidden_chunk = chunk_rows(hidden_states, padded, size, rank)
    return hidden_chunk, chunk_rows(router_logits, padded, size, rank), num_tokens, padded


def _finalize(hidden_states: torch.Tensor, num_tokens: int, group: str, size: int) -> torch.Tensor:
    shapes.check_chunk("finalize", hidden_states, num_tokens, size)
    return start_gather_chunks(hidden_states, num_tokens, group, size)()


def start_gather_chunks(hidden_states: torch.Tensor, num_tokens: int, group: str, size: int) -> Finish[torch.Tensor]:
    """Gather equal chunks over TP and cut the padding."""
    check_group("finalize", "tp", group, size)
    wait = start_all_gather(hidden_states, size, group)
    return lambda: wait().narrow(0, 0, num_tokens)


prepare_all2all = define(
    "prepare_all2all(Tensor hidden_states, Tensor router_logits, str group, int size, SymInt rank)"
    " -> (Tensor, Tensor, SymInt, SymInt)",
    composite=_prepare,
)
finalize_all2all = define(
    "finalize_all2all(Tensor hidden_states, SymInt num_tokens, str group, int size) -> Tensor", composite=_finalize
)


def prepare(
    hidden_states: torch.Tensor, router_logits: torch.Tensor, *, groups: ParallelGroups, keep_all_tokens: bool
) -> PrepareOutput:
    """Chunk the tokens over TP; the identity when every rank keeps all of its tokens or TP is 1. No collective."""
    if keep_all_tokens or groups.tp.size == 1:
        shapes.check_tokens("prepare", hidden_states, router_logits)
        num_tokens = hidden_states.shape[0]
        return PrepareOutput(hidden_states, router_logits, None, None, UnchangedState(num_tokens, num_tokens))
    hidden_chunk, logits_chunk, num_tokens, padded = prepare_all2all(hidden_states, router_logits, *groups.tp)
    return PrepareOutput(hidden_chunk, logits_chunk, None, None, ShardState(num_tokens, padded, groups.tp.size))


def chunk(x: torch.Tensor, *, groups: ParallelGroups) -> torch.Tensor:
    """One tensor, padded and chunked over TP as prepare does it. No collective."""
    size = groups.tp.size
    chunked: torch.Tensor = chunk_tokens(x, padded_rows(x.shape[0], size), size, groups.tp.rank)
    return chunked


def finalize(hidden_states: torch.Tensor, state: State, *, groups: ParallelGroups) -> torch.Tensor:
    """Gather the chunks over TP and cut the padding. One all-gather over TP."""
    if isinstance(state, UnchangedState):
        return unchanged(hidden_states, state)
    num_tokens = shard_state("finalize", state).num_tokens
    output: torch.Tensor = finalize_all2all(hidden_states, num_tokens, groups.tp.name, groups.tp.size)
    return output


def start_finalize(hidden_states: torch.Tensor, state: State, *, groups: ParallelGroups) -> Finish[torch.Tensor]:
    """`finalize` with the chunks still in flight."""
    num_tokens = shard_state("finalize", state).num_tokens
    shapes.check_chunk("finalize", hidden_states, num_tokens, groups.tp.size)
    return start_gather_chunks(hidden_states, num_tokens, groups.tp.name, groups.tp.size)


def lay_out(token_ids: torch.Tensor, state: State, *, groups: ParallelGroups) -> torch.Tensor:
    """Pad and cut per-token integers like the tokens, for MC2, too. No collective."""
    if isinstance(state, UnchangedState):
        return token_ids
    _, padded, num_chunks = shard_state("lay_out_like_prepared", state)
    chunk_ids: torch.Tensor = chunk_tokens(token_ids, padded, num_chunks, 0 if num_chunks == 1 else groups.tp.rank, -1)
    return chunk_ids


def unchanged(hidden_states: torch.Tensor, state: State) -> torch.Tensor:
    """`hidden_states`, if it has the rows that prepare returned: those that it was given."""
    check_dim("finalize", "hidden_states", hidden_states, 2)
    check_equal("finalize", "rows of hidden_states", hidden_states.shape[0], state.num_tokens, "state.num_tokens")
    return hidden_states


def shard_state(op: str, state: State) -> ShardState:
    """The state, if it is that of ALL2ALL or MC2."""
    if not isinstance(state, ShardState):
        raise TypeError(f"{op}: state must be that of an ALL2ALL or MC2 prepare, got {type(state).__name__}")
    return state
