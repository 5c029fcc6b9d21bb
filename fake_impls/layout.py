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
    if not any(isinstance(count, torch.SymInt) for count in counts):
        return max(counts)
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


def expert_parallel_rank(dp_rank: int, pcp_rank: int, tp_rank: int, *, pcp_size: int, tp_size: int) -> int:
    """Rank in the EP group, laid out ``[DP, PCP, TP]`` with TP fastest."""
    return (dp_rank * pcp_size + pcp_rank) * tp_size + tp_rank
