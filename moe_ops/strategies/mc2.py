"""MC2: as All2All, but every rank holds the same number of rows, and a mask says which of them are real.

T tokens, P padded tokens (common to the EP group), H hidden.
"""

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fake_impls.checks import check_dim
from fake_impls.strategies import mc2 as shapes
from moe_ops._library import define
from moe_ops.collectives import chunk_rows, copy_rows, pad_rows
from moe_ops.groups import Group, ParallelGroups, check_group
from moe_ops.overlap import Finish
from moe_ops.strategies.all2all import shard_state, start_gather_chunks, unchanged
from moe_ops.types import PrepareOutput, ShardState, State, UnchangedState


def _prepare(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    mc2_mask: torch.Tensor | None,
    padded_num_tokens: int,
    group: str,
    size: int,
    rank: int,
) -> tuple[list[torch.Tensor], int, int]:
    shapes.check_prepare(hidden_states, router_logits, mc2_mask, padded_num_tokens, size)
    if size > 1:
        check_group("prepare", "tp", group, size, rank)
    tensors = [hidden_states, router_logits] if mc2_mask is None else [hidden_states, router_logits, mc2_mask]
    chunks = [chunk_rows(tensor, padded_num_tokens, size, rank) for tensor in tensors]
    return chunks, hidden_states.shape[0], padded_num_tokens


def _chunk_mask(mask: torch.Tensor, num_rows: int, size: int, rank: int) -> torch.Tensor:
    shapes.chunk_mc2_mask(mask, num_rows, size, rank)
    return pad_rows(copy_rows(mask, rank * num_rows, num_rows), mask.shape[0] // size)


def _finalize(
    hidden_states: torch.Tensor, num_tokens: int, padded_num_tokens: int, group: str, size: int
) -> torch.Tensor:
    shapes.check_finalize(hidden_states, padded_num_tokens, size)
    if size == 1:
        return copy_rows(hidden_states, 0, num_tokens)
    return start_gather_chunks(hidden_states, num_tokens, group, size)()


prepare_mc2 = define(
    "prepare_mc2(Tensor hidden_states, Tensor router_logits, Tensor? mc2_mask, SymInt padded_num_tokens, str group,"
    " int size, SymInt rank) -> (Tensor[], SymInt, SymInt)",
    composite=_prepare,
)
chunk_mc2_mask = define(
    "chunk_mc2_mask(Tensor mask, SymInt num_rows, int size, SymInt rank) -> Tensor", composite=_chunk_mask
)
finalize_mc2 = define(
    "finalize_mc2(Tensor hidden_states, SymInt num_tokens, SymInt padded_num_tokens, str group, int size) -> Tensor",
    composite=_finalize,
)


def prepare(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    *,
    groups: ParallelGroups,
    padded_num_tokens: int | None,
    mc2_mask: torch.Tensor | None,
    tokens_are_sharded: bool,
    shared_expert_dp: bool,
) -> PrepareOutput:
    """Pad to the common length and chunk over TP, the mask with the tokens. No collective.

    A sequence-parallel shard is one chunk already: it is padded to the common chunk length, and its mask is the part of
    the TP group's mask that belongs to the shard's own tokens, all shards of the group having as many rows. With
    `shared_expert_dp` each TP rank keeps all tokens.
    """
    check_dim("prepare", "hidden_states", hidden_states, 2)
    num_tokens = hidden_states.shape[0]
    padded, mask, tp = padded_num_tokens, mc2_mask, groups.tp
    if padded is None and mask is not None:
        check_dim("prepare", "mc2_mask", mask, 1)
        padded = mask.shape[0]
    if padded is None:
        if not tokens_are_sharded:
            raise ValueError("prepare: MC2 needs padded_num_tokens or mc2_mask, got None for both")
        padded = num_tokens * tp.size
    shapes.check_padded("prepare", padded, tp.size)
    if tokens_are_sharded:
        if mask is not None and tp.size > 1:
            shapes.check_mask("prepare", mask, padded, tp.size)
            mask = chunk_mc2_mask(mask, num_tokens, tp.size, tp.rank)
        padded = padded // tp.size
    if tokens_are_sharded or shared_expert_dp:
        tp = Group.single()
    if tp.size == 1 and statically_known_true(num_tokens == padded):
        shapes.check_prepare(hidden_states, router_logits, mask, padded, 1)
        return PrepareOutput(hidden_states, router_logits, mask, None, UnchangedState(num_tokens, padded))
    chunks, num_tokens, padded = prepare_mc2(hidden_states, router_logits, mask, padded, *tp)
    mask = chunks[2] if mask is not None else None
    return PrepareOutput(chunks[0], chunks[1], mask, None, ShardState(num_tokens, padded, tp.size))


def finalize(hidden_states: torch.Tensor, state: State, *, groups: ParallelGroups) -> torch.Tensor:
    """Gather the chunks over TP, where prepare cut them, and cut the padding. At most one all-gather over TP."""
    if isinstance(state, UnchangedState):
        return unchanged(hidden_states, state)
    num_tokens, padded, num_chunks = shard_state("finalize", state)
    whole = Group.single() if num_chunks == 1 else groups.tp
    output: torch.Tensor = finalize_mc2(hidden_states, num_tokens, padded, whole.name, whole.size)
    return output


def start_finalize(hidden_states: torch.Tensor, state: State, *, groups: ParallelGroups) -> Finish[torch.Tensor]:
    """`finalize` with the chunks still in flight, where prepare cut any."""
    num_tokens, padded, num_chunks = shard_state("finalize", state)
    shapes.check_finalize(hidden_states, padded, num_chunks)
    return start_gather_chunks(hidden_states, num_tokens, groups.tp.name, groups.tp.size)
