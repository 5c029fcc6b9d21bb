"""Four real gloo ranks: round trips, eager beside compiled, results that nobody uses, interleaved micro-batches.

ranks of DP 2, TP 2:      tp 0  tp 1
                     d 0     0     1
                     d 1     2     3
"""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch._dynamo.testing import CompileCounterWithBackend

import moe_ops as mo
from moe_ops import Strategy

from .ranks import RankPool, groups_of

H, E = 5, 3
TOPOLOGIES = st.sampled_from([(2, 1, 2), (1, 2, 2), (2, 2, 1), (4, 1, 1), (1, 1, 4), (1, 4, 1)])
FORMS = {
    "all2all": (Strategy.ALL2ALL, False),
    "mc2": (Strategy.MC2, False),
    "allgather-dp": (Strategy.ALLGATHER, False),
    "allgather-ep": (Strategy.ALLGATHER, True),
}
Topology = tuple[int, int, int]


def tokens_of(owner: int, num_tokens: int) -> torch.Tensor:
    return torch.arange(num_tokens * H, dtype=torch.float32).view(num_tokens, H) + 1 + 100 * owner


class Batch:
    """What one rank brings: the tokens of its TP group, or its own where they are sharded."""

    def __init__(self, rank: int, form: str, topology: Topology, counts: list[int]) -> None:
        strategy, sharded = FORMS[form]
        self.layout = mo.Layout(strategy, groups_of(*topology), tokens_are_sharded=sharded)
        owners = [other if sharded else other // topology[2] for other in range(4)]
        self.counts = [counts[owner] for owner in owners]
        self.tokens = tokens_of(owners[rank], self.counts[rank])

    def prepare(self, hidden: torch.Tensor, counts: list[int]) -> mo.PrepareOutput:
        return mo.prepare(hidden, hidden[:, :E], self.layout, mo.Lengths(per_rank=counts))

    def finalize(self, hidden: torch.Tensor, state: Any) -> torch.Tensor:
        return mo.finalize(hidden, state, self.layout, reduce_results=True)

    def compute(self, out: mo.PrepareOutput) -> torch.Tensor:
        """Stands in for the experts: ``2 x``, of which each rank has its share of the gathered rows where all see them."""
        doubled = out.hidden_states * 2 + out.router_logits.sum(1, keepdim=True) * 0
        if self.layout.strategy is not Strategy.ALLGATHER:
            return doubled
        rows, ep = torch.arange(doubled.shape[0]).unsqueeze(1), self.layout.groups.ep
        return torch.where(rows % ep.size == ep.rank, doubled, 0)

    def run(self, hidden: torch.Tensor, counts: list[int]) -> torch.Tensor:
        out = self.prepare(hidden, counts)
        return self.finalize(self.compute(out), out.state)


def round_trip(rank: int, form: str, topology: Topology, counts: list[int]) -> bool:
    batch = Batch(rank, form, topology, counts)
    tokens = batch.tokens.clone()
    result = batch.run(batch.tokens, batch.counts)
    return torch.equal(batch.tokens, tokens) and torch.equal(result, tokens * 2)


@pytest.mark.parametrize("form", FORMS)
@given(
    topology=TOPOLOGIES,
    counts=st.lists(st.one_of(st.integers(0, 9), st.sampled_from([31, 64])), min_size=4, max_size=4),
)
@settings(max_examples=100)
def test_round_trip_is_exact(ranks4: RankPool, form: str, topology: Topology, counts: list[int]) -> None:
    assert all(ranks4.run(round_trip, form, topology, counts))


def mixed_round_trips(rank: int, form: str, backend: str, all_counts: list[list[int]]) -> tuple[bool, int]:
    """Ranks 1 and 2 compile, ranks 0 and 3 do not."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    batch = Batch(rank, form, (2, 1, 2), [1] * 4)

    def run(hidden: torch.Tensor, lengths: list[torch.Tensor]) -> torch.Tensor:
        return batch.run(hidden, [length.shape[0] for length in lengths])

    function: Callable[..., torch.Tensor] = run
    if rank in (1, 2):
        function = torch.compile(run, backend=counter, fullgraph=True)
    is_right = True
    for counts in all_counts:
        case = Batch(rank, form, (2, 1, 2), counts)
        mo.mark_token_axes(case.tokens)
        lengths = [mo.token_count(count) for count in case.counts]
        is_right &= torch.equal(function(case.tokens, lengths), case.tokens * 2)
    return is_right, counter.frame_count


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("form", FORMS)
def test_eager_and_compiled_ranks_agree(ranks4: RankPool, form: str, backend: str) -> None:
    all_counts = [[3, 64, 0, 7], [0, 0, 0, 0], [1, 0, 257, 1], [2, 3, 1, 0], [64, 1, 2, 2]]
    found = ranks4.run(mixed_round_trips, form, backend, all_counts)
    assert [is_right for is_right, _ in found] == [True] * 4
    assert [graphs for _, graphs in found] == [0, 1, 1, 0]


def leave_results_unused(rank: int, form: str, backend: str) -> bool:
    """Every rank prepares and finalizes twice; two of them, compiled, use neither result of the first."""
    torch._dynamo.reset()
    batch = Batch(rank, form, (2, 1, 2), [3, 5, 2, 4])

    def use_both(hidden: torch.Tensor) -> torch.Tensor:
        first = batch.run(hidden, batch.counts)
        return batch.run(hidden * 3, batch.counts) + first - first

    def use_second(hidden: torch.Tensor) -> torch.Tensor:
        batch.run(hidden, batch.counts)
        return batch.run(hidden * 3, batch.counts)

    function = torch.compile(use_second, backend=backend, fullgraph=True) if rank in (0, 3) else use_both
    return torch.equal(function(batch.tokens), batch.tokens * 6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("form", FORMS)
def test_an_unused_result_is_safe(ranks4: RankPool, form: str, backend: str) -> None:
    assert all(ranks4.run(leave_results_unused, form, backend))


def interleave(rank: int, form: str, topology: Topology, first: list[int], second: list[int]) -> bool:
    a, b = Batch(rank, form, topology, first), Batch(rank, form, topology, second)
    out_a, out_b = a.prepare(a.tokens, a.counts), b.prepare(b.tokens, b.counts)
    result_a = a.finalize(a.compute(out_a), out_a.state)
    result_b = b.finalize(b.compute(out_b), out_b.state)
    return torch.equal(result_a, a.tokens * 2) and torch.equal(result_b, b.tokens * 2)


@pytest.mark.parametrize("form", FORMS)
@given(
    topology=TOPOLOGIES,
    first=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    second=st.lists(st.integers(0, 9), min_size=4, max_size=4),
)
@settings(max_examples=30)
def test_micro_batches_interleave(
    ranks4: RankPool, form: str, topology: Topology, first: list[int], second: list[int]
) -> None:
    assert all(ranks4.run(interleave, form, topology, first, second))


def gather_quantised(rank: int, quant: mo.Quant, dtype: torch.dtype, counts: list[int]) -> bool:
    """What arrives over gloo is what quantising all tokens in one process gives."""
    layout = mo.Layout(Strategy.ALLGATHER, groups_of(2, 1, 2), tokens_are_sharded=True)
    every = [tokens_of(other, counts[other]).to(dtype) for other in range(4)]
    out = mo.prepare(every[rank], every[rank][:, :E].float(), layout, mo.Lengths(per_rank=counts), quant)
    if out.pertoken_scale is None:
        return False
    expected = mo.quantize_activations(torch.cat(every), quant=quant)
    pairs = zip((out.hidden_states, out.pertoken_scale), expected, strict=True)
    return all(torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)) for found, wanted in pairs)


@pytest.mark.parametrize("quant", [quant for quant in mo.Quant if quant is not mo.Quant.NONE], ids=lambda q: q.value)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_tokens_are_gathered(ranks4: RankPool, quant: mo.Quant, dtype: torch.dtype) -> None:
    for counts in ([3, 0, 1, 5], [0, 0, 0, 0], [7, 7, 7, 7]):
        assert all(ranks4.run(gather_quantised, quant, dtype, counts))
