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
from moe_ops.slots import place_copies

from .oracle import dense_moe
from .problems import (
    FORMS,
    E,
    Problem,
    expected_of,
    layout_for,
    make_inputs,
    make_stage,
    own_experts,
    problems,
    run_stage,
)
from .ranks import RankPool, coordinates, groups_of
from .simulated import local, simulated_world


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(max_examples=80)
def test_every_form_agrees_with_the_oracle(ranks4: RankPool, form: str, data: st.DataObject) -> None:
    problem = data.draw(problems(form))
    # Rounding of float32 sums, or of about ten bfloat16 values on the way that are 0.5 and more, on four ranks.
    tolerance = 2e-5 if problem.dtype is torch.float32 else 12 * 2.0**-8
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
    hidden, logits = problem.tokens(0)
    ids, weights = problem.choice(0)
    ids = None if problem.chosen == "by-logits" else ids
    weights = weights if problem.chosen == "ids-and-weights" else None
    found = mo.reference.moe_stage(
        hidden,
        None if weights is not None else logits,
        problem.experts(),
        problem.routing,
        topk_ids=ids,
        topk_weights=weights,
        shared_experts=problem.shared_experts(),
    )
    expected = dense_moe(
        hidden,
        logits,
        problem.experts(),
        problem.routing,
        topk_ids=ids,
        topk_weights=weights,
        shared=problem.shared_experts(),
    )
    assert found.shape == expected.shape
    if expected.numel():  # its scores are float32, and an element may be the difference of large ones
        assert (found.double() - expected).abs().max() <= 2e-6 * expected.abs().max().clamp(min=0.5)


def test_the_reference_refuses_what_it_does_not_know() -> None:
    hidden, logits = torch.ones(1, 2), torch.ones(1, 4)
    experts, routing = mo.ExpertWeights(torch.ones(4, 2, 2), torch.ones(4, 2, 1)), mo.Routing(1, 4)
    for message, changed in {
        "router_logits or topk_weights must be given": {"router_logits": None},
        "topk_ids must be given with topk_weights": {"topk_weights": torch.ones(1, 1)},
        "all_experts must not be quantised": {"all_experts": experts._replace(w2_scale=torch.ones(4, 2))},
        "activation must be one of": {"all_experts": experts._replace(activation="relu")},
        "scoring must be": {"routing": routing._replace(scoring="tanh")},
    }.items():
        arguments = {"hidden_states": hidden, "router_logits": logits, "all_experts": experts, "routing": routing}
        with pytest.raises(ValueError, match=message):
            mo.reference.moe_stage(**(arguments | changed))


def run_and_replay(rank: int, problem: Problem) -> tuple[mo.StageOutput, list[torch.Tensor]]:
    """What `run_stage` returns, and what the stage makes of the same choice when it is passed."""
    inputs = make_inputs(rank, problem)
    output = make_stage(rank, problem, run=mo.run_stage)(inputs)
    again = inputs._replace(topk_ids=output.topk_ids, topk_weights=output.topk_weights)
    chosen = ("by-logits", "ids", "ids-and-weights")
    return output, [make_stage(rank, problem._replace(chosen=how))(again) for how in chosen]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(max_examples=10)
def test_run_stage_tells_what_was_chosen(ranks4: RankPool, form: str, data: st.DataObject) -> None:
    problem = data.draw(problems(form))._replace(reduce_results=True, chosen="by-logits")
    for rank, (output, replayed) in enumerate(ranks4.run(run_and_replay, problem)):
        assert all(torch.equal(output.hidden_states, result) for result in replayed)
        assert (output.topk_ids.dtype, output.topk_weights.dtype) == (torch.int32, torch.float32)
        assert output.num_dropped == 0
        num_real, (hidden, logits) = problem.num_real(rank), problem.tokens(problem.owner(rank))
        assert output.topk_ids.shape == output.topk_weights.shape == (hidden.shape[0], problem.routing.top_k)
        assert (output.topk_ids[num_real:] == -1).all()
        assert (output.topk_weights[num_real:] == 0).all()
        for token in range(num_real):
            experts, weights = zip(*mo.reference.route(logits[token], problem.routing), strict=True)
            assert output.topk_ids[token].tolist() == list(experts)
            torch.testing.assert_close(output.topk_weights[token].double(), torch.stack(weights), rtol=1e-5, atol=1e-7)


def test_a_choice_of_other_tokens_is_refused() -> None:
    layout = mo.Layout(Strategy.MC2, mo.ParallelGroups())
    experts = mo.ExpertWeights(torch.ones(4, 2, 2), torch.ones(4, 2, 1))
    choice = {"topk_ids": torch.zeros(2, 1, dtype=torch.int64), "topk_weights": torch.ones(2, 1)}
    for logits in (torch.ones(3, 4), None):
        with pytest.raises(ValueError, match="rows of topk_ids must be those of hidden_states = 3, got 2"):
            mo.moe_stage(torch.ones(3, 2), logits, experts, mo.Routing(1, 4), layout, **choice)
    with pytest.raises(ValueError, match="topk_ids must be given with topk_weights, got None"):
        mo.moe_stage(torch.ones(2, 2), None, experts, mo.Routing(1, 4), layout, topk_weights=torch.ones(2, 1))


def test_shared_experts_beyond_float16() -> None:
    """SiLU(16) * 16 * 4 * 100 = 102,400, which the gate makes 1,843 of."""
    x, one = torch.ones(1, 4).half(), mo.ParallelGroups()
    shared = mo.SharedExperts(
        torch.full((8, 4), 4.0).half(), torch.full((4, 4), 100.0).half(), False, torch.full((1, 4), -1.0).half()
    )
    experts, routing = mo.ExpertWeights(torch.zeros(4, 2, 4).half(), torch.zeros(4, 4, 1).half()), mo.Routing(1, 4)
    layout = mo.Layout(Strategy.ALL2ALL, one)
    found = mo.moe_stage(x, torch.ones(1, 4).half(), experts, routing, layout, shared_experts=shared)
    expected = mo.reference.moe_stage(x, torch.ones(1, 4), experts, routing, shared_experts=shared)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


def run_beyond_float16(rank: int, form: str) -> torch.Tensor:
    """Results of experts 0 and 7 that are beyond float16, on two ranks; their sum is not."""
    layout, w2 = layout_for(Problem(form)), torch.zeros(2, 4, 4)
    w2[0], w2[1] = 100.0 * (rank == 0), -99.0 * (rank == 3)
    experts = mo.ExpertWeights(torch.full((2, 8, 4), 4.0).half(), w2.half())
    ids, weights = torch.tensor([[0, 7]] * 3), torch.ones(3, 2)
    return mo.moe_stage(
        torch.ones(3, 4).half(),
        None,
        experts,
        mo.Routing(2, E),
        layout,
        lengths=mo.Lengths(equal=True),
        topk_ids=ids,
        topk_weights=weights,
        reduce_results=True,
    )


@pytest.mark.parametrize("form", FORMS)
def test_float16_is_weighed_and_summed_in_float32(ranks4: RankPool, form: str) -> None:
    """SiLU(16) * 16 = 256 four times: 102,400 and -101,376."""
    for result in ranks4.run(run_beyond_float16, form):
        assert result.dtype is torch.float16
        torch.testing.assert_close(result, torch.full((3, 4), 1024.0).half(), rtol=2e-3, atol=0)


def run_with_redundant_experts(rank: int, problem: Problem, slots: list[int], table: torch.Tensor) -> torch.Tensor:
    """Slot `s` holds a copy of expert ``slots[s]``, a fourth of the slots on each rank."""
    whole = problem.experts()
    mine = torch.tensor(slots).chunk(4)[rank]
    routing = problem.routing._replace(logical_to_physical=table, num_redundant_experts=len(slots) - E)
    hidden, logits = problem.tokens(rank // 2)
    return mo.moe_stage(
        hidden,
        logits,
        mo.ExpertWeights(whole.w13[mine], whole.w2[mine]),
        routing,
        layout_for(problem),
        lengths=mo.Lengths(longest=max(problem.counts[:2])),
        reduce_results=True,
    )


@pytest.mark.parametrize("form", ["all2all", "mc2", "allgather-dp"])
@pytest.mark.parametrize("many", [False, True], ids=["one-slot", "replicas"])
def test_redundant_experts_change_nothing(ranks4: RankPool, form: str, many: bool) -> None:
    slots = [3, 1, 7, 0, 2, 5, 4, 6, 7, 7, 0, 1]
    table = place_copies(slots, num_experts=E)
    problem = Problem(form, counts=(7, 4, 0, 0), seed=6)
    results = ranks4.run(run_with_redundant_experts, problem, slots, table if many else table[:, 0])
    for rank, result in enumerate(results):
        torch.testing.assert_close(result.double(), expected_of(problem, rank), rtol=1e-5, atol=1e-5)


def steps_of(rank: int, problem: Problem) -> Iterator[torch.Tensor]:
    """One batch through the AllGather DP form, step by step; the last thing it yields is the result."""
    layout = layout_for(problem)
    hidden, logits = problem.tokens(problem.owner(rank))
    out = mo.prepare(hidden, logits, layout, mo.Lengths(longest=max(problem.counts[:2])))
    yield out.hidden_states
    topk_weights, topk_ids = route(out.router_logits, problem.routing)
    dispatched = dispatch_local(out.hidden_states, topk_ids, topk_weights, first_expert=rank * 2, num_local_experts=2)
    yield dispatched.rows
    rows = run_experts(dispatched.rows, dispatched.counts, own_experts(problem, rank))
    yield rows
    y = combine_local(rows, dispatched.state)
    yield mo.finalize(y, out.state, layout, reduce_results=True)


def interleave(rank: int, first: Problem, second: Problem) -> bool:
    alone = [list(steps_of(rank, problem))[-1] for problem in (first, second)]
    *_, together = zip(steps_of(rank, first), steps_of(rank, second), strict=True)
    return all(torch.equal(found, wanted) for found, wanted in zip(together, alone, strict=True))


def test_interleaved_micro_batches_are_equal_to_the_bit(ranks4: RankPool) -> None:
    first = Problem("allgather-dp", counts=(5, 2, 0, 0), seed=3)
    assert all(ranks4.run(interleave, first, first._replace(counts=(1, 7, 0, 0), seed=4)))


def stage_of_zeros(layout: mo.Layout, **changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "routing": mo.Routing(2, 8),
        "experts": mo.ExpertWeights(torch.zeros(8, 8, 4), torch.zeros(8, 4, 4)),
    } | changed
    return mo.moe_stage(torch.zeros(2, 4), torch.zeros(2, 8), layout=layout, **arguments)


QUARTER = mo.ExpertWeights(torch.zeros(2, 8, 4), torch.zeros(2, 4, 4))
FOUR, TWO = mo.Group("a", 4, 0), mo.Group("b", 2, 0)
ALONE = mo.Layout(Strategy.ALLGATHER, mo.ParallelGroups())


@pytest.mark.parametrize(
    ("layout", "changed", "message"),
    [
        (ALONE, {"experts": QUARTER}, r"experts must hold num_experts / EP = 8 / 1 experts, got 2"),
        (
            mo.Layout(Strategy.ALLGATHER, mo.ParallelGroups(tp=TWO, ep=FOUR)),
            {"experts": QUARTER, "lengths": mo.Lengths(longest=2)},
            r"ep must be a group of DP \* PCP \* TP = 2 ranks, the dp or the tp group itself, or none, got 'a' of 4 ranks",
        ),
        (
            mo.Layout(Strategy.ALLGATHER, mo.ParallelGroups(dp=FOUR, ep=FOUR), Dispatch.ALL_TO_ALL),
            {"experts": QUARTER},
            r"layout\.dispatch must be LOCAL for ALLGATHER, got Dispatch\.ALL_TO_ALL",
        ),
        (
            mo.Layout(Strategy.MC2, mo.ParallelGroups(ep=FOUR), Dispatch.LOCAL),
            {"experts": QUARTER},
            r"layout\.dispatch must be FIXED_CAPACITY or ALL_TO_ALL for MC2, got Dispatch\.LOCAL",
        ),
        (
            mo.Layout(Strategy.ALLGATHER, mo.ParallelGroups(dp=TWO, ep=TWO)),
            {"routing": mo.Routing(2, 8, num_redundant_experts=8)},
            "logical_to_physical must be given with 8 redundant experts, got None",
        ),
        (
            mo.Layout(Strategy.ALL2ALL, mo.ParallelGroups(tp=TWO)),
            {},
            r"layout\.groups\.ep must be given for ALL2ALL with TP 2",
        ),
        (
            mo.Layout(Strategy.MC2, mo.ParallelGroups(tp=TWO)),
            {},
            r"layout\.groups\.ep must be given for MC2 with TP 2",
        ),
        (
            mo.Layout(Strategy.ALLGATHER, mo.ParallelGroups(tp=TWO), tokens_are_sharded=True),
            {},
            r"layout\.groups\.ep must be given for ALLGATHER with TP 2",
        ),
        (
            mo.Layout(Strategy.MC2, mo.ParallelGroups()),
            {"overlap_gate": True},
            "overlap_gate must be False for MC2, which routes before it sends",
        ),
    ],
)
def test_arguments_that_do_not_go_together(layout: mo.Layout, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage_of_zeros(layout, **changed)


def test_arguments_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"layout\.dispatch must be a Dispatch, got 'local'"):
        stage_of_zeros(ALONE._replace(dispatch="local"))
    with pytest.raises(TypeError, match="layout must be a Layout, got <Strategy"):
        stage_of_zeros(Strategy.ALLGATHER)  # type: ignore[arg-type]


def chunk_of_a_mask_that_marks_padding(rank: int) -> list[bool]:
    """MC2 with a mask that is True beyond the tokens, as an engine that pads for a graph makes it."""
    layout = mo.Layout(Strategy.MC2, groups_of(1, 1, 4))
    out = mo.prepare(torch.zeros(3, 4), torch.zeros(3, E), layout, mo.Lengths(mask=torch.ones(8, dtype=torch.bool)))
    return out.mask.tolist()


def test_rows_that_pad_are_inactive_whatever_the_mask_says(ranks4: RankPool) -> None:
    found = ranks4.run(chunk_of_a_mask_that_marks_padding)
    assert found == [[True, True], [True, False], [False, False], [False, False]]


def test_coordinates_of_the_layout_are_those_of_the_library() -> None:
    assert [coordinates(rank, 2, 2) for rank in range(8)] == [
        (d, p, t) for d in range(2) for p in range(2) for t in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["all2all-fixed", "mc2", "allgather-dp", "allgather-ep"])
@pytest.mark.parametrize("topology", [(2, 2, 2), (1, 2, 4)], ids=str)
def test_simulated_ranks_agree_with_the_oracle(form: str, topology: tuple[int, int, int]) -> None:
    """One expert a rank, on topologies for which four processes are too few."""
    problem = Problem(form, topology, (3, 0, 5, 1, 2, 4, 0, 1), seed=9)
    dp, pcp, tp = topology
    strategy, sharded, dispatch = FORMS[problem.form]
    with simulated_world(dp, pcp, tp) as world:
        batches = [problem.tokens(problem.owner(rank)) for rank in range(world.size)]
        whole = problem.experts()
        counts = [problem.counts[problem.owner(rank)] for rank in range(world.size)]
        result = mo.moe_stage(
            world.tensor([hidden for hidden, _ in batches]),
            world.tensor([logits for _, logits in batches]),
            mo.ExpertWeights(*(world.tensor([w[r : r + 1] for r in range(world.size)]) for w in (whole.w13, whole.w2))),
            problem.routing,
            mo.Layout(strategy, world.groups, dispatch, tokens_are_sharded=sharded),
            lengths=mo.Lengths(per_rank=counts),
            reduce_results=True,
        )
        for rank in range(world.size):
            expected = expected_of(problem, rank)
            torch.testing.assert_close(local(result, rank).double(), expected, rtol=1e-4, atol=1e-5)
