"""Shapes of ALLGATHER. T tokens of this rank, M rows that every rank pads to, W ranks, R rows of all ranks."""

from collections.abc import Sequence

import torch

from fake_impls.checks import check_at_most, check_equal
from fake_impls.layout import largest, total
from fake_impls.strategies.exchange import check_chunk


def prepare_allgather_dp(
    tensors: Sequence[torch.Tensor],
    fill: Sequence[int],
    longest: int,
    dp_group: str,
    dp_size: int,
    pcp_group: str,
    pcp_size: int,
) -> list[torch.Tensor]:
    """``[T, ...] each -> [PCP * DP * M, ...] each`` with ``M = longest``."""
    return [tensor.new_empty(pcp_size * dp_size * longest, *tensor.shape[1:]) for tensor in tensors]


def check_prepare_allgather_dp(tensors: Sequence[torch.Tensor], fill: Sequence[int], longest: int, *_: object) -> None:
    check_at_most("prepare", "rows of hidden_states", tensors[0].shape[0], longest, "longest")


def finalize_allgather_dp(
    hidden_states: torch.Tensor,
    num_tokens: int,
    longest: int,
    dp_group: str,
    dp_size: int,
    pcp_group: str,
    pcp_size: int,
) -> torch.Tensor:
    """``[PCP * DP * M, H] -> [num_tokens, H]``."""
    return hidden_states.new_empty(num_tokens, hidden_states.shape[1])


def check_finalize_allgather_dp(
    hidden_states: torch.Tensor,
    num_tokens: int,
    longest: int,
    dp_group: str,
    dp_size: int,
    pcp_group: str,
    pcp_size: int,
) -> None:
    check_chunk(hidden_states, pcp_size * dp_size * longest)


def prepare_allgather_ep(
    tensors: Sequence[torch.Tensor],
    fill: Sequence[int],
    longest: int,
    num_tokens_across_ep: Sequence[int] | None,
    group: str,
    size: int,
) -> list[torch.Tensor]:
    """``[T, ...] each -> [R, ...] each``: ``R = sum(num_tokens_across_ep)``, or without counts ``W * M``, rows that pad
    included."""
    rows = gathered_over_ep(longest, num_tokens_across_ep, size)
    return [tensor.new_empty(rows, *tensor.shape[1:]) for tensor in tensors]


def check_prepare_allgather_ep(
    tensors: Sequence[torch.Tensor],
    fill: Sequence[int],
    longest: int,
    num_tokens_across_ep: Sequence[int] | None,
    group: str,
    size: int,
) -> None:
    check_at_most("prepare", "rows of hidden_states", tensors[0].shape[0], longest, "longest")
    if num_tokens_across_ep is not None:
        check_counts("prepare", num_tokens_across_ep, size)
        most = largest(num_tokens_across_ep)
        check_equal("prepare", "longest", longest, most, "the largest of num_tokens_across_ep")


def finalize_allgather_ep(
    hidden_states: torch.Tensor,
    num_tokens: int,
    longest: int,
    num_tokens_across_ep: Sequence[int] | None,
    group: str,
    size: int,
) -> torch.Tensor:
    """``[R, H] -> [num_tokens, H]``."""
    return hidden_states.new_empty(num_tokens, hidden_states.shape[1])


def check_finalize_allgather_ep(
    hidden_states: torch.Tensor,
    num_tokens: int,
    longest: int,
    num_tokens_across_ep: Sequence[int] | None,
    group: str,
    size: int,
) -> None:
    if num_tokens_across_ep is not None:
        check_counts("finalize", num_tokens_across_ep, size)
    check_chunk(hidden_states, gathered_over_ep(longest, num_tokens_across_ep, size))


def gathered_over_ep(longest: int, num_tokens_across_ep: Sequence[int] | None, size: int) -> int:
    """R."""
    return size * longest if num_tokens_across_ep is None else total(num_tokens_across_ep)


def check_counts(op: str, counts: Sequence[int], size: int) -> None:
    """One count, not negative, for each EP rank."""
    if len(counts) != size:
        raise ValueError(f"{op}: num_tokens_across_ep must hold {size} counts, one for each EP rank, got {len(counts)}")
    if any(isinstance(count, int) and count < 0 for count in counts):
        raise ValueError(f"{op}: num_tokens_across_ep must not be negative, got {tuple(counts)}")
