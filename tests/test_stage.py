"""The whole stage on four real ranks against the dense oracle, with pad rows poisoned."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import moe_ops as mo
from moe_ops import Strategy
from moe_ops.dispatchers.local import combine_local, dispatch_local
from moe_ops.experts import run_experts
from moe_ops.route import route

from .oracle import dense_moe
from .ranks import RankPool, coordinates, groups_of

E = 8
Layout = tuple[int, int, int]
FORMS = {
    "all2all": (Strategy.ALL2ALL, False),
    "all2all-sharded": (Strategy.ALL2ALL, True),
    "mc2": (Strategy.MC2, False),
    "mc2-sharded": (Strategy.MC2, True),
    "allgather-dp": (Strategy.ALLGATHER, False),
    "allgather-ep": (Strategy.ALLGATHER, True),
}


class Problem(NamedTuple):
    """One layer and one batch on four ranks; each of them makes it from the seed."""

    form: str
    layout: Layout
    counts: list[int]
    hidden_size: int
    intermediate: int
    top_k: int
    renormalize: bool
    routing: str
    dtype: torch.dtype
    masked: int
    has_ep: bool
    seed: int

    @property
    def sharded(self) -> bool:
        return FORMS[self.form][1]

    def tokens(self, owner: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and logits of one owner: a rank where tokens are sharded, else a TP group."""
        generator = torch.Generator().manual_seed(self.seed * 10 + owner)
        hidden = torch.randn(self.counts[owner], self.hidden_size, generator=generator)
        # Multiples of 1/4: scores are equal, or far enough apart for any rounding.
        logits = torch.randint(-12, 13, (self.counts[owner], E), generator=generator) / 4
        if self.routing == "one":
            logits[:, 5] += 100
        if self.routing == "few":  # none to ranks 0 and 3
            logits[:, 2:6] += 50
        if self.routing == "ties":
            logits = torch.zeros_like(logits)
        return hidden.to(self.dtype), logits

    def weights(self) -> mo.ExpertWeights:
        generator = torch.Generator().manual_seed(self.seed)
        h, i = self.hidden_size, self.intermediate
        w13 = torch.randn(E, 2 * i, h, generator=generator) * h**-0.5
        return mo.ExpertWeights(
            w13.to(self.dtype), (torch.randn(E, h, i, generator=generator) * i**-0.5).to(self.dtype)
        )

    def owner(self, rank: int) -> int:
        return rank if self.sharded else rank // self.layout[2]

    def num_real(self, rank: int) -> int:
        """Tokens of this rank that the mask keeps: MC2 without sharding loses the last `masked` of each TP group."""
        count = self.counts[self.owner(rank)]
        return max(count - self.masked, 0) if self.form == "mc2" else count


@st.composite
def problems(draw: Any, form: str) -> Problem:
    return Problem(
        form=form,
        layout=draw(st.sampled_from([(2, 1, 2), (1, 2, 2), (2, 2, 1), (4, 1, 1), (1, 1, 4), (1, 4, 1)])),
        counts=draw(st.lists(st.one_of(st.integers(0, 6), st.sampled_from([17, 31])), min_size=4, max_size=4)),
        hidden_size=draw(st.sampled_from([8, 5, 16])),
        intermediate=draw(st.sampled_from([4, 12])),
        top_k=draw(st.sampled_from([1, 2, 3, 8])),
        renormalize=draw(st.booleans()),
        routing=draw(st.sampled_from(["random", "one", "few", "ties"])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        masked=draw(st.sampled_from([0, 1, 3])),
        has_ep=draw(st.booleans()) if form == "allgather-dp" else True,
        seed=draw(st.integers(0, 1000)),
    )


def run_stage(rank: int, problem: Problem) -> torch.Tensor:
    groups, (dp, _, tp) = groups_of(*problem.layout), problem.layout
    hidden, logits = problem.tokens(problem.owner(rank))
    num_real = problem.num_real(rank)
    hidden[num_real:], logits[num_real:] = torch.nan, torch.nan
    everything = problem.weights()
    if problem.has_ep:
        mine = slice(rank * E // 4, (rank + 1) * E // 4)
        experts = mo.ExpertWeights(everything.w13[mine].clone(), everything.w2[mine].clone())
    else:  # the intermediate axis is sharded instead
        groups = groups._replace(ep=mo.Group.single())
        gate, up = everything.w13.chunk(2, dim=1)
        parts = [x.chunk(4, dim=1)[rank] for x in (gate, up)]
        experts = mo.ExpertWeights(torch.cat(parts, dim=1), everything.w2.chunk(4, dim=2)[rank].contiguous())
    counts = [problem.counts[problem.owner(other)] for other in range(4)]
    longest = max(counts)
    mask = None
    if problem.form == "mc2":
        mask = torch.arange(-(-longest // tp) * tp) < num_real
    return mo.moe_stage(
        hidden,
        logits,
        experts,
        routing=mo.Routing(problem.top_k, E, renormalize=problem.renormalize),
        strategy=FORMS[problem.form][0],
        groups=groups,
        reduce_results=True,
        mc2_mask=mask,
        padded_num_tokens=longest * tp if problem.form == "mc2-sharded" else None,
        max_tokens_across_dp=longest,
        max_tokens_across_pcp=longest * dp,
        num_tokens_across_ep=counts if problem.sharded else None,
        tokens_are_sharded=problem.sharded,
    )


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(max_examples=60)
def test_every_form_agrees_with_the_oracle(ranks4: RankPool, form: str, data: st.DataObject) -> None:
    problem = data.draw(problems(form))
    weights = problem.weights()
    # Rounding of float32 sums, or of the seven bfloat16 values that each share passes through; of sums over 4 ranks.
    tolerance = 1e-5 if problem.dtype is torch.float32 else 4 * 2.0**-8
    for rank, result in enumerate(ranks4.run(run_stage, problem)):
        hidden, logits = problem.tokens(problem.owner(rank))
        num_real = problem.num_real(rank)
        expected = dense_moe(
            hidden[:num_real], logits[:num_real], *weights, top_k=problem.top_k, renormalize=problem.renormalize
        )
        assert result.dtype == problem.dtype
        assert result.shape == hidden.shape
        assert not result[num_real:].any()
        if num_real:
            error = (result[:num_real].double() - expected).abs().max() / expected.abs().max()
            assert error <= tolerance


def test_the_reference_agrees_with_the_oracle() -> None:
    problem = Problem("all2all", (4, 1, 1), [9] * 4, 8, 4, 3, True, "random", torch.float32, 0, True, 1)
    (hidden, logits), weights = problem.tokens(0), problem.weights()
    for renormalize in (False, True):
        routing = mo.Routing(3, E, renormalize=renormalize)
        found = mo.reference.moe_stage(hidden, logits, weights, routing=routing)
        torch.testing.assert_close(
            found.double(), dense_moe(hidden, logits, *weights, top_k=3, renormalize=renormalize)
        )


def steps_of(rank: int, problem: Problem) -> Iterator[torch.Tensor]:
    """One batch through the AllGather DP form, step by step; the last thing it yields is the result."""
    groups = groups_of(*problem.layout)
    hidden, logits = problem.tokens(problem.owner(rank))
    longest = max(problem.counts[:2])
    out = mo.prepare(hidden, logits, strategy=Strategy.ALLGATHER, groups=groups, max_tokens_across_dp=longest)
    yield out.hidden_states
    topk_weights, topk_ids = route(out.router_logits, mo.Routing(problem.top_k, E, renormalize=problem.renormalize))
    dispatched = dispatch_local(out.hidden_states, topk_ids, first_expert=rank * 2, num_local_experts=2)
    yield dispatched.rows
    experts = mo.ExpertWeights(*(weight[rank * 2 : rank * 2 + 2].clone() for weight in problem.weights()))
    rows = run_experts(dispatched.rows, dispatched.counts, experts)
    yield rows
    y = combine_local(rows, topk_weights, dispatched)
    yield mo.finalize(y, out.state, strategy=Strategy.ALLGATHER, groups=groups, reduce_results=True)


def interleave(rank: int, first: Problem, second: Problem) -> bool:
    alone = [list(steps_of(rank, problem))[-1] for problem in (first, second)]
    *_, together = zip(steps_of(rank, first), steps_of(rank, second), strict=True)
    return all(torch.equal(found, wanted) for found, wanted in zip(together, alone, strict=True))


def test_interleaved_micro_batches_are_equal_to_the_bit(ranks4: RankPool) -> None:
    first = Problem("allgather-dp", (2, 1, 2), [5, 2, 0, 0], 8, 4, 2, True, "random", torch.float32, 0, True, 3)
    assert all(ranks4.run(interleave, first, first._replace(counts=[1, 7, 0, 0])))


def test_experts_must_be_those_of_the_rank() -> None:
    weights = mo.ExpertWeights(torch.zeros(3, 8, 4), torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match=r"experts must hold num_experts / EP = 8 / 1 experts, got 3"):
        mo.moe_stage(
            torch.zeros(2, 4),
            torch.zeros(2, 8),
            weights,
            routing=mo.Routing(2, 8),
            strategy=Strategy.ALLGATHER,
            groups=mo.ParallelGroups(),
        )


def test_coordinates_of_the_layout_are_those_of_the_library() -> None:
    assert [coordinates(rank, 2, 2) for rank in range(8)] == [
        (d, p, t) for d in range(2) for p in range(2) for t in range(2)
    ]


def test_an_ep_group_that_the_sum_does_not_span_is_refused() -> None:
    """It would leave out the experts of the other ranks."""
    with pytest.raises(ValueError, match=r"EP group of DP \* PCP \* TP = 2 ranks, or none, got 4"):
        mo.moe_stage(
            torch.zeros(2, 4),
            torch.zeros(2, 8),
            mo.ExpertWeights(torch.zeros(2, 8, 4), torch.zeros(2, 4, 4)),
            routing=mo.Routing(2, 8),
            strategy=Strategy.ALLGATHER,
            groups=mo.ParallelGroups(tp=mo.Group("a", 2, 0), ep=mo.Group("b", 4, 0)),
        )
