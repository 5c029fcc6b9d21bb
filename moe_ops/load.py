"""What a routing does to the ranks: copies of rows that travel, and how evenly experts and ranks are loaded.

For plans and reports, outside of any layer: results are Python numbers, which reading from the device costs a wait.

T tokens, N rows of an EP rank, W ranks of EP, E experts, K top-k.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe_ops.cost_types import RowCopies
from moe_ops.dispatchers.copies import plan_copies
from moe_ops.route import count_expert_load

_DRAWN_AT_ONCE = 4096  # rows, of E floats each


class ExpertLoad(NamedTuple):
    """Choices that fall on each expert and on each rank's experts.

    Attributes:
        experts: choices of each expert.
        ranks: choices of the experts of each EP rank.
        expert_imbalance: the largest of `experts` as a multiple of their mean: 1 is even, E is all on one. 1 without choices.
        rank_imbalance: likewise, of `ranks`: how much longer the busiest rank computes than if all were even.
    """

    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    expert_imbalance: float
    rank_imbalance: float


def measure_load(topk_ids: torch.Tensor, *, num_experts: int, ep_size: int) -> ExpertLoad:
    """The load that a routing makes: a report, for which the counts are read on the host.

    Args:
        topk_ids: int ``[T, K]``, of all ranks; -1 counts nowhere.
        num_experts: E, a multiple of `ep_size`; with redundant experts, the number of slots.
        ep_size: W; rank `r` has the `r`-th run of E / W experts.

    Example::

        out = mo.run_stage(x, router_logits, experts, routing, layout)
        load = measure_load(out.topk_ids, num_experts=128, ep_size=8)
    """
    _check("measure_load", num_experts, ep_size)
    load = count_expert_load(topk_ids, num_experts=num_experts)
    experts, ranks = load.tolist(), load.view(ep_size, -1).sum(1).tolist()
    return ExpertLoad(tuple(experts), tuple(ranks), _max_over_mean(experts), _max_over_mean(ranks))


def count_copies(topk_ids: Sequence[torch.Tensor] | torch.Tensor, *, num_experts: int) -> RowCopies:
    """Copies of rows that each rank sends to and receives from other ranks: one for each rank that has an expert of the row.

    Args:
        topk_ids: int ``[N, K]`` of each of the W ranks of EP, or ``[W, N, K]``; -1 goes nowhere.
        num_experts: E, a multiple of W; with redundant experts, the number of slots.

    Example: what `select_strategy` takes::

        copies = count_copies(ids_of_ranks, num_experts=128)
    """
    ep_size = len(topk_ids)
    _check("count_copies", num_experts, ep_size)
    counts_WW = torch.stack([plan_copies(ids_NK, num_experts // ep_size, ep_size, None)[1] for ids_NK in topk_ids])
    counts_WW.fill_diagonal_(0)  # what stays does not travel
    return RowCopies(tuple(counts_WW.sum(1).tolist()), tuple(counts_WW.sum(0).tolist()))


def draw_topk_ids(
    num_tokens: int, *, num_experts: int, top_k: int, exponent: float = 0.0, seed: int = 0
) -> torch.Tensor:
    """A synthetic routing: int32 ``[num_tokens, top_k]``, K different experts a row, drawn one after the other.

    The expert that is the `i`-th most popular is drawn with a weight of ``i ** -exponent`` (Zipf's law; 0: all alike). Which
    experts are popular is drawn, too.

    Example::

        ids = draw_topk_ids(4096, num_experts=128, top_k=8, exponent=0.5)
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"draw_topk_ids: top_k must be in [1, num_experts = {num_experts}], got {top_k}")
    if exponent < 0:
        raise ValueError(f"draw_topk_ids: exponent must be at least 0, got {exponent}")
    generator = torch.Generator().manual_seed(seed)
    popularity_E = torch.randperm(num_experts, generator=generator) + 1
    weights_E = popularity_E.to(torch.float64) ** -exponent
    ids = [torch.empty(0, top_k, dtype=torch.int32)]
    for start in range(0, num_tokens, _DRAWN_AT_ONCE):
        rows = min(_DRAWN_AT_ONCE, num_tokens - start)
        # The first arrivals of Poisson processes of these rates: weighted drawing without replacement. In float64, where the
        # logarithms of different processors hardly ever order two of them differently.
        arrivals_TE = -torch.rand(rows, num_experts, dtype=torch.float64, generator=generator).log() / weights_E
        ids.append(arrivals_TE.topk(top_k, largest=False).indices.to(torch.int32))
    return torch.cat(ids)


def _max_over_mean(loads: list[int]) -> float:
    return max(loads) * len(loads) / sum(loads) if sum(loads) else 1.0


def _check(op: str, num_experts: int, ep_size: int) -> None:
    if ep_size < 1 or num_experts < 1 or num_experts % ep_size:
        raise ValueError(f"{op}: num_experts must be a multiple of EP = {ep_size}, got {num_experts}")
