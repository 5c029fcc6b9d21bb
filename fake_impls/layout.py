"""The integer arithmetic of every strategy: pads, chunks, offsets and rank orders.

Every function works on ``int`` and ``torch.SymInt`` alike (annotated ``int``, as torch annotates shapes) and branches on no
token count, so that tracing adds no guard and one graph serves every count from 0 up. Nothing here knows a tensor.
"""

from collections.abc import Sequence

import torch


def ceil_div(numerator: int, denominator: int) -> int:
    """``ceil(numerator / denominator)`` of non-negative integers."""
    return (numerator + denominator - 1) // denominator


def rows_per_rank(num_tokens: int, size: int) -> int:
    """Rows that each of `size` ranks holds when `num_tokens` tokens are padded to a multiple of `size` and chunked."""
    return ceil_div(num_tokens, size)


def padded_rows(num_tokens: int, size: int) -> int:
    """The smallest multiple of `size` that holds `num_tokens`: 0 tokens stay 0 rows, and every chunk is equal."""
    return rows_per_rank(num_tokens, size) * size


def offsets(counts: Sequence[int]) -> list[int]:
    """Where each block starts when blocks of `counts` rows follow one another."""
    starts: list[int] = []
    total: int = 0
    for count in counts:
        starts.append(total)
        total = total + count
    return starts


def largest(counts: Sequence[int]) -> int:
    """The largest of one or more counts."""
    result = counts[0]
    for count in counts[1:]:
        result = torch.sym_max(result, count)
    return result


def total(counts: Sequence[int]) -> int:
    """The sum of counts. (Dynamo of torch 2.13 takes no ``torch.sym_sum`` of plain numbers.)"""
    if any(isinstance(count, torch.SymInt) for count in counts):
        summed: int = torch.sym_sum(list(counts))
        return summed
    return sum(counts)


def common_rows(
    num_rows: int, max_tokens_across_dp: int | None, num_tokens_across_ep: Sequence[int] | None, num_chunks: int
) -> int:
    """Rows that all EP ranks pad to for an even exchange: from the counts if known, else all are held to be equal.

    Each rank holds one of `num_chunks` chunks of its tokens, `num_rows` of them here.
    """
    if num_tokens_across_ep is not None:
        return largest(num_tokens_across_ep)
    if max_tokens_across_dp is not None:
        return rows_per_rank(max_tokens_across_dp, num_chunks)
    return num_rows


def expert_parallel_rank(dp_rank: int, pcp_rank: int, tp_rank: int, *, pcp_size: int, tp_size: int) -> int:
    """Rank in the EP group, laid out ``[DP, PCP, TP]`` with TP fastest."""
    return (dp_rank * pcp_size + pcp_rank) * tp_size + tp_rank


def gathered_row(
    pcp_rank: int, dp_rank: int, token: int, *, max_tokens_across_dp: int, max_tokens_across_pcp: int
) -> int:
    """Row of a token in the AllGather DP form, which gathers over DP first and over PCP around that."""
    return pcp_rank * max_tokens_across_pcp + dp_rank * max_tokens_across_dp + token
