"""The whole stage on four real ranks against the dense oracle, with rows that pad poisoned."""

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import moe_ops as mo
from moe_ops import Dispatch, Strategy
from moe_ops.dispatchers.local import combine_local, dispatch_local
from moe_ops.experts import run_experts
from moe_ops.route import route
from moe_ops.strategies import active_rows

from .oracle import dense_moe
from .problems import FORMS, E, Problem, expected_of, own_experts, problems, run_stage
from .ranks import RankPool, coordinates, groups_of
from .simulated import local, simulated_world


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(max_examples=80)
def test_every_form_agrees_with_the_oracle(ranks4: RankPool, form: str, data: st.DataObject) -> None:
    problem = data.draw(problems(form))
    # Rounding of float32 sums, or of about ten bfloat16 values on the way that are 0.5 and more, on four ranks.
    tolerance = 2e-5 if problem.dtype is torch.float32 else 8 * 2.0**-8
    for rank, result in enumerate(ranks4.run(run_stage, problem)):
        expected = expected_of(problem, rank)
        assert result.dtype == problem.dtype
        assert result.shape == expected.shape
        if expected.numel():
            error = (result.double() - expected).abs().max() / expected.abs().max().clamp(min=0.5)
            assert error <= tolerance


@given(data=st.data())
@settings(max_examples=40)
def test_both_exchanges_are_equal_to_the_bit(ranks4: RankPool, data: st.DataObject) -> None:
    problem = data.draw(problems("all2all"))._replace(shared="none")
    ragged, fixed = (ranks4.run(run_stage, problem._replace(form=form)) for form in ("all2all", "all2all-fixed"))
    again = ranks4.run(run_stage, problem)
    for rank in range(4):
        assert torch.equal(ragged[rank], fixed[rank])
        assert torch.equal(ragged[rank], again[rank])


@pytest.mark.parametrize("form", ["all2all", "all2all-fixed", "mc2", "allgather-dp", "allgather-ep"])
@pytest.mark.parametrize("quant", [quant for quant in mo.Quant if quant is not mo.Quant.NONE], ids=lambda q: q.value)
def test_quantised_activations_are_within_the_error_of_the_format(ranks4: RankPool, form: str, quant: mo.Quant) -> None:
    """Gate, up and what goes into the second product are each off by no more than rounding moves their inputs.

    Rounding errors of a product's terms are independent, so the norm of their sum is to that of the product as one error is
    to its term: half a step of e4m3 (3 bits after the point) or e2m1 (1 bit, and 1/4 where 8 is clamped to 6); for int8 half of
    amax / 127, and the largest of 64 normal values is seldom above 4 times their root mean square. Three of them add up.
    """
    problem = Problem(form, counts=(9, 7, 5, 8), hidden_size=64, intermediate=64, seed=4)
    exact = ranks4.run(run_stage, problem)
    quantised = ranks4.run(run_stage, problem._replace(quant=quant))
    half_step = {mo.Quant.W8A8: 4 / 254, mo.Quant.W4A8: 4 / 254, mo.Quant.MXFP8: 2.0**-4, mo.Quant.MXFP4: 2.0**-2}[
        quant
    ]
    for found, wanted in zip(quantised, exact, strict=True):
        error = (found - wanted).norm() / wanted.norm()
        assert 0 < error <= 3 * half_step


@pytest.mark.parametrize("quant", [quant for quant in mo.Quant if quant is not mo.Quant.NONE], ids=lambda q: q.value)
def test_tokens_that_travel_quantised_are_not_quantised_twice(ranks4: RankPool, quant: mo.Quant) -> None:
    """Quantised before they travel or where they arrive, the values are the same, so the results are, too."""
    problem = Problem("allgather-dp", layout=(4, 1, 1), counts=(6, 3, 0, 5), hidden_size=40, quant=quant, seed=5)
    local, *others = (
        ranks4.run(run_stage, problem._replace(form=form)) for form in ("allgather-dp", "allgather-ep", "all2all")
    )
    for found in others:
        for rank in range(4):
            torch.testing.assert_close(found[rank], local[rank], rtol=1e-5, atol=1e-6)


@given(data=st.data())
@settings(max_examples=20)
def test_the_reference_agrees_with_the_oracle(data: st.DataObject) -> None:
    problem = data.draw(problems("all2all"))._replace(dtype=torch.float32)
    hidden, logits, input_ids = problem.tokens(0)
    ids = input_ids if problem.routing.token_to_experts is not None else None
    found = mo.reference.moe_stage(
        hidden,
        logits,
        problem.experts(),
        routing=problem.routing,
        input_ids=ids,
        shared_experts=problem.shared_experts(),
    )
    expected = dense_moe(
        hidden, logits, problem.experts(), problem.routing, input_ids=ids, shared=problem.shared_experts()
    )
    assert found.shape == expected.shape
    if expected.numel():  # its scores are float32, and an element may be the difference of large ones
        assert (found.double() - expected).abs().max() <= 2e-6 * expected.abs().max().clamp(min=0.5)


def run_with_redundant_experts(rank: int, problem: Problem, slots: list[int], table: torch.Tensor) -> torch.Tensor:
    """Slot `s` holds a copy of expert ``slots[s]``, a fourth of the slots on each rank."""
    whole = problem.experts()
    mine = torch.tensor(slots).chunk(4)[rank]
    routing = problem.routing._replace(logical_to_physical=table, num_redundant_experts=len(slots) - E)
    hidden, logits, _ = problem.tokens(rank // 2)
    return mo.moe_stage(
        hidden,
        logits,
        mo.ExpertWeights(whole.w13[mine], whole.w2[mine]),
        routing=routing,
        strategy=FORMS[problem.form][0],
        groups=groups_of(2, 1, 2),
        max_tokens_across_dp=max(problem.counts[:2]),
        mc2_mask=torch.arange(-(-max(problem.counts[:2]) // 2) * 2) < problem.counts[rank // 2],
        reduce_results=True,
    )


@pytest.mark.parametrize("form", ["all2all", "mc2", "allgather-dp"])
@pytest.mark.parametrize("many", [False, True], ids=["one-slot", "replicas"])
def test_redundant_experts_change_nothing(ranks4: RankPool, form: str, many: bool) -> None:
    slots = [3, 1, 7, 0, 2, 5, 4, 6, 7, 7, 0, 1]
    found = [[slot for slot, held in enumerate(slots) if held == expert] for expert in range(E)]
    table = torch.tensor([[*of_expert, -1, -1][:3] for of_expert in found])
    problem = Problem(form, counts=(7, 4, 0, 0), seed=6)
    results = ranks4.run(run_with_redundant_experts, problem, slots, table if many else table[:, 0])
    for rank, result in enumerate(results):
        torch.testing.assert_close(result.double(), expected_of(problem, rank), rtol=1e-5, atol=1e-5)


def steps_of(rank: int, problem: Problem) -> Iterator[torch.Tensor]:
    """One batch through the AllGather DP form, step by step; the last thing it yields is the result."""
    groups = groups_of(*problem.layout)
    hidden, logits, _ = problem.tokens(problem.owner(rank))
    longest = max(problem.counts[:2])
    out = mo.prepare(hidden, logits, strategy=Strategy.ALLGATHER, groups=groups, max_tokens_across_dp=longest)
    yield out.hidden_states
    topk_weights, topk_ids = route(out.router_logits, problem.routing)
    dispatched = dispatch_local(out.hidden_states, topk_ids, topk_weights, first_expert=rank * 2, num_local_experts=2)
    yield dispatched.rows
    rows = run_experts(dispatched.rows, dispatched.counts, own_experts(problem, rank))
    yield rows
    y = combine_local(rows, dispatched.state)
    yield mo.finalize(y, out.state, strategy=Strategy.ALLGATHER, groups=groups, reduce_results=True)


def interleave(rank: int, first: Problem, second: Problem) -> bool:
    alone = [list(steps_of(rank, problem))[-1] for problem in (first, second)]
    *_, together = zip(steps_of(rank, first), steps_of(rank, second), strict=True)
    return all(torch.equal(found, wanted) for found, wanted in zip(together, alone, strict=True))


def test_interleaved_micro_batches_are_equal_to_the_bit(ranks4: RankPool) -> None:
    first = Problem("allgather-dp", counts=(5, 2, 0, 0), seed=3)
    assert all(ranks4.run(interleave, first, first._replace(counts=(1, 7, 0, 0), seed=4)))


def stage_of_zeros(**changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "routing": mo.Routing(2, 8),
        "strategy": Strategy.ALLGATHER,
        "groups": mo.ParallelGroups(),
        "experts": mo.ExpertWeights(torch.zeros(8, 8, 4), torch.zeros(8, 4, 4)),
    } | changed
    return mo.moe_stage(torch.zeros(2, 4), torch.zeros(2, 8), arguments.pop("experts"), **arguments)


def test_arguments_that_do_not_go_together() -> None:
    quarter = mo.ExpertWeights(torch.zeros(2, 8, 4), torch.zeros(2, 4, 4))
    four = mo.Group("a", 4, 0)
    with pytest.raises(ValueError, match=r"experts must hold num_experts / EP = 8 / 1 experts, got 2"):
        stage_of_zeros(experts=quarter)
    with pytest.raises(ValueError, match=r"EP group of DP \* PCP \* TP = 2 ranks, or none, got 4"):
        stage_of_zeros(experts=quarter, groups=mo.ParallelGroups(tp=mo.Group("b", 2, 0), ep=four))
    with pytest.raises(ValueError, match=r"dispatch must be LOCAL for ALLGATHER and for no other, got Dispatch.ALL_TO"):
        stage_of_zeros(experts=quarter, groups=mo.ParallelGroups(dp=four, ep=four), dispatch=Dispatch.ALL_TO_ALL)
    with pytest.raises(ValueError, match=r"dispatch must be LOCAL for ALLGATHER and for no other, got Dispatch.LOCAL"):
        stage_of_zeros(
            experts=quarter, groups=mo.ParallelGroups(ep=four), dispatch=Dispatch.LOCAL, strategy=Strategy.MC2
        )
    with pytest.raises(ValueError, match="logical_to_physical must be given with 8 redundant experts, got None"):
        stage_of_zeros(
            groups=mo.ParallelGroups(dp=mo.Group("b", 2, 0), ep=mo.Group("b", 2, 0)),
            routing=mo.Routing(2, 8, num_redundant_experts=8),
        )
    with pytest.raises(TypeError, match="dispatch must be a Dispatch, got 'local'"):
        stage_of_zeros(dispatch="local")


def load_of_a_mask_that_marks_padding(rank: int) -> list[int]:
    """MC2 with a mask that is True beyond the tokens, as an engine that pads for a graph makes it."""
    groups = groups_of(1, 1, 4)
    out = mo.prepare(
        torch.zeros(3, 4),
        torch.zeros(3, E),
        strategy=Strategy.MC2,
        groups=groups,
        mc2_mask=torch.ones(8, dtype=torch.bool),
    )
    return active_rows(out, groups=groups).tolist()


def test_rows_that_pad_are_inactive_whatever_the_mask_says(ranks4: RankPool) -> None:
    found = ranks4.run(load_of_a_mask_that_marks_padding)
    assert found == [[True, True], [True, False], [False, False], [False, False]]


def run_sharded_without_a_length(rank: int, problem: Problem, strategy: Strategy) -> torch.Tensor:
    hidden, logits, _ = problem.tokens(rank)
    return mo.moe_stage(
        hidden,
        logits,
        own_experts(problem, rank),
        routing=problem.routing,
        strategy=strategy,
        groups=groups_of(*problem.layout),
        dispatch=Dispatch.FIXED_CAPACITY,
        num_tokens_across_ep=problem.counts,
        tokens_are_sharded=True,
    )


@pytest.mark.parametrize("strategy", [Strategy.ALL2ALL, Strategy.MC2], ids=lambda s: s.value)
def test_the_common_length_follows_from_the_counts(ranks4: RankPool, strategy: Strategy) -> None:
    problem = Problem("all2all-sharded", counts=(5, 3, 0, 2), seed=8)
    for rank, result in enumerate(ranks4.run(run_sharded_without_a_length, problem, strategy)):
        torch.testing.assert_close(result.double(), expected_of(problem, rank), rtol=1e-5, atol=1e-5)


def test_coordinates_of_the_layout_are_those_of_the_library() -> None:
    assert [coordinates(rank, 2, 2) for rank in range(8)] == [
        (d, p, t) for d in range(2) for p in range(2) for t in range(2)
    ]


@pytest.mark.parametrize("form", ["all2all-fixed", "mc2", "allgather-dp", "allgather-ep"])
@pytest.mark.parametrize("layout", [(2, 2, 2), (1, 2, 4)], ids=str)
def test_simulated_ranks_agree_with_the_oracle(form: str, layout: tuple[int, int, int]) -> None:
    """One expert a rank, on topologies for which four processes are too few."""
    problem = Problem(form, layout, (3, 0, 5, 1, 2, 4, 0, 1), seed=9)
    dp, pcp, tp = layout
    strategy, sharded, dispatch = FORMS[problem.form]
    with simulated_world(dp, pcp, tp) as world:
        batches = [problem.tokens(problem.owner(rank)) for rank in range(world.size)]
        whole = problem.experts()
        counts = [problem.counts[problem.owner(rank)] for rank in range(world.size)]
        longest, padded = max(counts), -(-max(counts) // tp) * tp
        result = mo.moe_stage(
            world.tensor([hidden for hidden, _, _ in batches]),
            world.tensor([logits for _, logits, _ in batches]),
            mo.ExpertWeights(*(world.tensor([w[r : r + 1] for r in range(world.size)]) for w in (whole.w13, whole.w2))),
            routing=problem.routing,
            strategy=strategy,
            groups=world.groups,
            dispatch=dispatch,
            reduce_results=True,
            mc2_mask=world.tensor([torch.arange(padded) < count for count in counts]),
            max_tokens_across_dp=longest,
            max_tokens_across_pcp=longest * dp,
            num_tokens_across_ep=counts if sharded else None,
            tokens_are_sharded=sharded,
        )
        for rank in range(world.size):
            expected = expected_of(problem, rank)
            torch.testing.assert_close(local(result, rank).double(), expected, rtol=1e-4, atol=1e-5)
