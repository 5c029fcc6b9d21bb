"""Shapes of the AllGather strategy. T tokens, M padded tokens, H hidden, E experts, W ranks."""

from collections.abc import Sequence

import torch

from fake_impls.checks import check_at_most, check_dim, check_equal
from fake_impls.collectives import gather_rows
from fake_impls.layout import largest, total


def prepare_allgather_dp(
    tensors: Sequence[torch.Tensor],
    fill: Sequence[int],
    max_tokens_across_dp: int,
    max_tokens_across_pcp: int,
    dp_group: str,
    dp_size: int,
    pcp_group: str,
    pcp_size: int,
) -> tuple[list[torch.Tensor], int, int, int, int]:
    """``[T, ...] each -> [PCP * N, ...] each, T, M, DP * M, N``: M rows of each DP rank, N rows of each PCP rank."""
    num_tokens = tensors[0].shape[0]
    padded, before_pcp, padded_before_pcp = dp_rows(
        num_tokens, max_tokens_across_dp, max_tokens_across_pcp, dp_size, pcp_size
    )
    return gather_rows(tensors, padded_before_pcp, pcp_size), num_tokens, padded, before_pcp, padded_before_pcp


def dp_rows(
    num_tokens: int, max_tokens_across_dp: int, max_tokens_across_pcp: int, dp_size: int, pcp_size: int
) -> tuple[int, int, int]:
    """Rows of each DP rank, rows that the DP gather makes, and the rows that those are padded to before the PCP gather."""
    padded = max_tokens_across_dp if dp_size > 1 else num_tokens
    check_at_most("prepare", "rows of hidden_states", num_tokens, padded, "max_tokens_across_dp")
    before_pcp = dp_size * padded
    padded_before_pcp = max_tokens_across_pcp if pcp_size > 1 else before_pcp
    check_at_most("prepare", "rows before the PCP gather", before_pcp, padded_before_pcp, "max_tokens_across_pcp")
    return padded, before_pcp, padded_before_pcp


def finalize_allgather_dp(
    hidden_states: torch.Tensor,
    num_tokens: int,
    num_tokens_before_pcp: int,
    padded_num_tokens_before_pcp: int,
    dp_group: str,
    dp_size: int,
    pcp_group: str,
    pcp_size: int,
) -> torch.Tensor:
    """``[PCP * N, H] -> [num_tokens, H]``."""
    check_gathered(hidden_states, padded_num_tokens_before_pcp, pcp_size)
    return hidden_states.new_empty(num_tokens, hidden_states.shape[1])


def check_gathered(hidden_states: torch.Tensor, padded_num_tokens_before_pcp: int, pcp_size: int) -> None:
    """All rows that the DP form's prepare returned."""
    check_dim("finalize", "hidden_states", hidden_states, 2)
    gathered = padded_num_tokens_before_pcp * pcp_size
    check_equal("finalize", "rows of hidden_states", hidden_states.shape[0], gathered, "the rows that prepare returned")


def prepare_allgather_ep(
    tensors: Sequence[torch.Tensor], counts: Sequence[int] | None, group: str, size: int, rank: int
) -> tuple[list[torch.Tensor], int, int]:
    """``[T, ...] each -> [sum(counts), ...] each, T, max(counts)``; without counts ``[W * T, ...] each, T, T``."""
    num_tokens = tensors[0].shape[0]
    if counts is None:
        return gather_rows(tensors, num_tokens, size), num_tokens, num_tokens
    check_counts("prepare", num_tokens, counts, size, rank)
    rows = total(counts)
    return [tensor.new_empty(rows, *tensor.shape[1:]) for tensor in tensors], num_tokens, largest(counts)


def check_counts(op: str, num_tokens: int, counts: Sequence[int], size: int, rank: int) -> None:
    """One count for each EP rank, and this rank's is what it brought."""
    if len(counts) != size:
        raise ValueError(f"{op}: num_tokens_across_ep must hold {size} counts, one for each EP rank, got {len(counts)}")
    if any(isinstance(count, int) and count < 0 for count in counts):
        raise ValueError(f"{op}: num_tokens_across_ep must not be negative, got {tuple(counts)}")
    if isinstance(rank, int):  # a simulation of several ranks in one process has no single rank
        meaning = f"num_tokens_across_ep[{rank}]"
        check_equal(op, "rows of hidden_states", num_tokens, counts[rank], meaning)


def finalize_allgather_ep(
    hidden_states: torch.Tensor, num_tokens: int, counts: Sequence[int] | None, group: str, size: int
) -> torch.Tensor:
    """``[sum(counts), H] -> [num_tokens, H]``."""
    check_gathered_over_ep(hidden_states, num_tokens, counts, size)
    return hidden_states.new_empty(num_tokens, hidden_states.shape[1])


def check_gathered_over_ep(
    hidden_states: torch.Tensor, num_tokens: int, counts: Sequence[int] | None, size: int
) -> None:
    """All rows that the EP form's prepare returned."""
    check_dim("finalize", "hidden_states", hidden_states, 2)
    gathered = num_tokens * size if counts is None else total(counts)
    check_equal("finalize", "rows of hidden_states", hidden_states.shape[0], gathered, "the rows that prepare returned")
