"""Token counts of a call: checked once, where they enter, against each other and against the tokens that are here.

T tokens of this rank, P rows of the mask, W ranks.
"""

from collections.abc import Sequence

import torch

from fake_impls.checks import check_at_most, check_dim, check_dtype, check_equal, check_multiple
from fake_impls.layout import expert_parallel_rank, largest, total
from moe_ops._library import is_known
from moe_ops.groups import ParallelGroups
from moe_ops.types import Layout, Lengths


def stage_ranks(groups: ParallelGroups) -> tuple[int, int]:
    """W and this process's rank: of EP, or without an EP group of all other axes, in the order that EP would have."""
    tp, dp, ep, pcp = groups
    if ep.size > 1:
        return ep.size, ep.rank
    rank = expert_parallel_rank(dp.rank, pcp.rank, tp.rank, pcp_size=pcp.size, tp_size=tp.size)
    return dp.size * pcp.size * tp.size, rank


def tp_is_inside(groups: ParallelGroups) -> bool:
    """Whether the EP ranks are whole TP groups, whose ranks follow one another."""
    return (
        groups.ep.name == groups.tp.name or stage_ranks(groups)[0] == groups.dp.size * groups.pcp.size * groups.tp.size
    )


def resolve_lengths(op: str, num_tokens: int, lengths: Lengths, layout: Layout) -> Lengths:
    """The same lengths, with `longest` filled in where it follows from the others.

    Raises:
        TypeError: a field has another type.
        ValueError: fields contradict each other, or `num_tokens`, the tokens of this rank.
    """
    if not isinstance(lengths, Lengths):
        raise TypeError(f"{op}: lengths must be a Lengths, got {lengths!r}")
    longest, equal, per_rank, mask = lengths
    if longest is not None and not _is_integer(longest):
        raise TypeError(f"{op}: lengths.longest must be an integer, got {longest!r}")
    if not isinstance(equal, bool):
        raise TypeError(f"{op}: lengths.equal must be True or False, got {equal!r}")
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise TypeError(f"{op}: lengths.mask must be a tensor, got {type(mask).__name__}")
    if per_rank is not None:
        per_rank = _check_per_rank(op, num_tokens, per_rank, layout)
        most = largest(per_rank)
        if longest is not None:
            check_equal(op, "lengths.longest", longest, most, "the largest of lengths.per_rank")
        longest = most
    if equal:
        for rank, count in enumerate(per_rank or ()):
            check_equal(op, f"lengths.per_rank[{rank}]", count, num_tokens, "rows of hidden_states (lengths.equal)")
        if longest is not None:
            check_equal(op, "lengths.longest", longest, num_tokens, "rows of hidden_states (lengths.equal)")
        longest = num_tokens
    if longest is not None:
        check_at_most(op, "rows of hidden_states", num_tokens, longest, "lengths.longest")
    if mask is not None:
        rows = _check_mask(op, mask, layout)
        meaning = "rows of lengths.mask / TP" if layout.tokens_are_sharded else "rows of lengths.mask"
        check_at_most(op, "rows of hidden_states", num_tokens, rows, meaning)
        if longest is None:
            longest = rows
        else:
            check_at_most(op, "lengths.longest", longest, rows, meaning)
    if longest is None and stage_ranks(layout.groups)[0] == 1:
        longest = num_tokens
    return Lengths(longest, equal, per_rank, mask)


def _is_integer(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _check_per_rank(op: str, num_tokens: int, per_rank: Sequence[int], layout: Layout) -> tuple[int, ...]:
    if not isinstance(per_rank, Sequence) or not all(map(_is_integer, per_rank)):
        found = "a tensor" if isinstance(per_rank, torch.Tensor) else repr(per_rank)
        raise TypeError(f"{op}: lengths.per_rank must be a sequence of integers, got {found}")
    counts, tp, (size, rank) = tuple(per_rank), layout.groups.tp.size, stage_ranks(layout.groups)
    if len(counts) != size:
        raise ValueError(f"{op}: lengths.per_rank must hold {size} counts, one for each EP rank, got {len(counts)}")
    if any(isinstance(count, int) and count < 0 for count in counts):
        raise ValueError(f"{op}: lengths.per_rank must not be negative, got {counts}")
    if isinstance(rank, int):  # a simulation of several ranks in one process has no single rank
        check_equal(op, "rows of hidden_states", num_tokens, counts[rank], f"lengths.per_rank[{rank}]")
    if not layout.tokens_are_sharded and tp_is_inside(layout.groups):
        differs = [is_known(count != counts[other // tp * tp]) for other, count in enumerate(counts)]
        if any(differs):
            raise ValueError(f"{op}: lengths.per_rank must repeat a number for the ranks of a TP group, got {counts}")
    return counts


def _check_mask(op: str, mask: torch.Tensor, layout: Layout) -> int:
    """The rows that the mask has room for on each rank."""
    check_dim(op, "lengths.mask", mask, 1)
    check_dtype(op, "lengths.mask", mask, (torch.bool,))
    tp = layout.groups.tp.size
    check_multiple(op, "rows of lengths.mask", mask.shape[0], tp, "the size of the TP group")
    return mask.shape[0] // tp if layout.tokens_are_sharded else mask.shape[0]


def known_longest(op: str, lengths: Lengths, form: str) -> int:
    """`longest`, for a form that pads to it.

    Raises:
        ValueError: nothing says it.
    """
    if lengths.longest is None:
        raise ValueError(
            f"{op}: lengths must say how many tokens other ranks have (longest, equal, per_rank or mask) for {form}, got none"
        )
    return lengths.longest


def shards_of_tp(lengths: Lengths, groups: ParallelGroups) -> tuple[int, ...] | None:
    """Rows of each TP rank's shard; None if `per_rank` does not say them."""
    _, rank = stage_ranks(groups)
    if lengths.per_rank is None or not tp_is_inside(groups) or not isinstance(rank, int):
        return None
    first = rank - groups.tp.rank  # TP ranks follow one another
    return tuple(lengths.per_rank[first : first + groups.tp.size])


def active_tokens(num_tokens: int, lengths: Lengths, layout: Layout) -> torch.Tensor | None:
    """bool ``[T]``: which tokens of this rank the mask keeps; None without a mask."""
    mask, tp = lengths.mask, layout.groups.tp
    if mask is None:
        return None
    if not layout.tokens_are_sharded or tp.size == 1:
        return mask if is_known(mask.shape[0] == num_tokens) else mask.narrow(0, 0, num_tokens)
    shards = shards_of_tp(lengths, layout.groups)
    start = num_tokens * tp.rank if shards is None else total(shards[: tp.rank])
    # Not narrow, whose bounds a compiler would have to prove.
    return mask.index_select(0, torch.arange(num_tokens, device=mask.device) + start)
