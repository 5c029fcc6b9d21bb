"""What a call says of token counts, on real ranks: every form takes every way to say it and refuses contradictions."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import moe_ops as mo
from moe_ops import Dispatch, Strategy
from moe_ops.lengths import active_tokens, resolve_lengths, shards_of_tp

from .problems import FORMS, WAYS, Problem, expected_of, layout_for, make_inputs, own_experts, run_stage
from .ranks import RankPool, groups_of

NEEDY = [form for form in FORMS if form not in ("all2all", "all2all-sharded")]
TOPOLOGIES = [(2, 1, 2), (1, 2, 2), (2, 2, 1), (4, 1, 1), (1, 1, 4), (1, 4, 1)]


@given(
    form=st.sampled_from([*FORMS]),
    said=st.sampled_from([*WAYS, ("equal",), ("equal", "longest"), ("equal", "per_rank", "mask")]),
    topology=st.sampled_from(TOPOLOGIES),
    counts=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    masked=st.integers(0, 4),
)
@settings(max_examples=150)
def test_every_form_takes_every_way_to_say_lengths(
    ranks4: RankPool, form: str, said: tuple[str, ...], topology: tuple[int, int, int], counts: list[int], masked: int
) -> None:
    problem = Problem(form, topology, tuple(counts), said=said, masked=masked)
    if "equal" in said:
        problem = problem._replace(counts=(counts[0],) * 4)
    elif problem.sharded and "per_rank" not in said:  # a mask alone takes all shards of a TP group to have as many rows
        problem = problem._replace(counts=tuple(counts[rank // topology[2] * topology[2]] for rank in range(4)))
    for rank, found in enumerate(ranks4.run(run_stage, problem)):
        torch.testing.assert_close(found.double(), expected_of(problem, rank), rtol=1e-5, atol=1e-5)


def contradiction(kind: str, problem: Problem, counts: list[int], mask: torch.Tensor) -> mo.Lengths:
    longest = max(counts)
    return {
        "longest-is-not-the-largest": mo.Lengths(longest=longest + 1, per_rank=counts),
        "too-few-counts": mo.Lengths(per_rank=counts[:-1]),
        "a-negative-count": mo.Lengths(per_rank=[*counts[:-1], -1] if counts[-1] else [-1, *counts[1:]]),
        "ragged-and-equal": mo.Lengths(equal=True, per_rank=[*counts[:-1], longest + 1]),
        "a-mask-that-is-too-short": mo.Lengths(longest=longest, mask=mask[: -problem.layout[2]]),
        "a-mask-of-ragged-chunks": mo.Lengths(mask=torch.cat([mask, mask[:1]])),
        "a-mask-with-two-axes": mo.Lengths(mask=mask.unsqueeze(1)),
    }[kind]


def run_contradiction(rank: int, problem: Problem, kind: str, step: str) -> str:
    inputs, layout = make_inputs(rank, problem), layout_for(problem)
    counts = [count.shape[0] for count in inputs.counts]
    lengths = contradiction(kind, problem, counts, torch.ones(inputs.mask.shape[0], dtype=torch.bool))
    try:
        if step == "prepare":
            mo.prepare(inputs.hidden, inputs.logits, layout, lengths)
        else:
            experts = own_experts(problem, rank)
            mo.moe_stage(inputs.hidden, inputs.logits, experts, problem.routing, layout, lengths=lengths)
    except ValueError as error:
        return str(error)
    return ""


@given(
    form=st.sampled_from([*FORMS]),
    kind=st.sampled_from(
        [
            "longest-is-not-the-largest",
            "too-few-counts",
            "a-negative-count",
            "ragged-and-equal",
            "a-mask-that-is-too-short",
            "a-mask-of-ragged-chunks",
            "a-mask-with-two-axes",
        ]
    ),
    step=st.sampled_from(["prepare", "moe_stage"]),
    topology=st.sampled_from(TOPOLOGIES),
    counts=st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
@settings(max_examples=200)
def test_what_contradicts_itself_is_an_error_on_every_rank(
    ranks4: RankPool, form: str, kind: str, step: str, topology: tuple[int, int, int], counts: list[int]
) -> None:
    """Nothing was sent then: the ranks go on with the next example."""
    if kind == "a-mask-of-ragged-chunks" and topology[2] == 1:
        return  # with TP 1 every mask has equal chunks
    for error in ranks4.run(run_contradiction, Problem(form, topology, tuple(counts)), kind, step):
        assert "lengths." in error


def test_shards_of_a_tp_group_that_is_the_ep_group() -> None:
    tp = mo.Group("tp", 2, 1)
    groups = mo.ParallelGroups(tp=tp, dp=mo.Group("dp", 2, 0), ep=tp)
    layout = mo.Layout(Strategy.MC2, groups, tokens_are_sharded=True)
    lengths = mo.Lengths(per_rank=[3, 2], mask=torch.arange(6) < 4)
    active = active_tokens(2, resolve_lengths("moe_stage", 2, lengths, layout), layout)
    assert active is not None
    assert active.tolist() == [True, False]


def run_without_lengths(rank: int, problem: Problem) -> str:
    inputs, layout = make_inputs(rank, problem), layout_for(problem)
    try:
        mo.moe_stage(inputs.hidden, inputs.logits, own_experts(problem, rank), problem.routing, layout)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("form", FORMS)
def test_where_lengths_are_needed_and_none_is_said_every_rank_says_so(ranks4: RankPool, form: str) -> None:
    for error in ranks4.run(run_without_lengths, Problem(form, (4, 1, 1))):
        assert ("lengths must say how many tokens other ranks have" in error) is (form in NEEDY)


def run_shared_on_shards(rank: int, lengths: mo.Lengths) -> str:
    layout = mo.Layout(Strategy.ALL2ALL, groups_of(2, 1, 2), tokens_are_sharded=True)
    shared = mo.SharedExperts(torch.ones(4, 8), torch.ones(8, 2), is_tp_sharded=True)
    problem = Problem("all2all-sharded")
    inputs, experts = make_inputs(rank, problem), own_experts(problem, rank)
    try:
        mo.moe_stage(
            inputs.hidden,
            inputs.logits,
            experts,
            problem.routing,
            layout,
            lengths=lengths,
            shared_experts=shared,
        )
    except ValueError as error:
        return str(error)
    return ""


def test_shared_experts_of_shards_need_lengths(ranks4: RankPool) -> None:
    for error in ranks4.run(run_shared_on_shards, mo.Lengths()):
        assert "lengths must say how many tokens other ranks have" in error
    assert ranks4.run(run_shared_on_shards, mo.Lengths(longest=5)) == [""] * 4


def test_a_lone_rank_needs_no_lengths() -> None:
    for strategy in Strategy:
        lengths = resolve_lengths("op", 5, mo.Lengths(), mo.Layout(strategy, mo.ParallelGroups()))
        assert lengths.longest == 5


def groups(dp: int, pcp: int, tp: int, rank: int, has_ep: bool = True) -> mo.ParallelGroups:
    d, p, t = rank // (pcp * tp), rank // tp % pcp, rank % tp
    ep = mo.Group("ep", dp * pcp * tp, rank) if has_ep else mo.Group.single()
    return mo.ParallelGroups(mo.Group("tp", tp, t), mo.Group("dp", dp, d), ep, mo.Group("pcp", pcp, p))


@given(
    dp=st.integers(1, 3),
    pcp=st.integers(1, 2),
    tp=st.integers(1, 4),
    has_ep=st.booleans(),
    missing=st.integers(0, 9),
    data=st.data(),
)
def test_each_shard_has_its_own_part_of_the_mask(
    dp: int, pcp: int, tp: int, has_ep: bool, missing: int, data: st.DataObject
) -> None:
    size = dp * pcp * tp
    counts = data.draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
    for rank in range(size):
        layout = mo.Layout(Strategy.MC2, groups(dp, pcp, tp, rank, has_ep), tokens_are_sharded=True)
        peers = counts[rank // tp * tp : rank // tp * tp + tp]
        mask = torch.arange(max(counts) * tp) < sum(peers) - missing
        lengths = resolve_lengths("op", counts[rank], mo.Lengths(per_rank=counts, mask=mask), layout)
        assert shards_of_tp(lengths, layout.groups) == tuple(peers)
        before = sum(peers[: rank % tp])
        expected = [before + i < sum(peers) - missing for i in range(counts[rank])]
        assert active_tokens(counts[rank], lengths, layout).tolist() == expected


def run_replicas(rank: int, strategy: Strategy, axis: str, sharded: bool, dispatch: Dispatch | None) -> torch.Tensor:
    """EP is one of the axes: ranks along the other hold the same experts."""
    whole = Problem("all2all", counts=(3, 5, 2, 4), seed=8)
    of_mesh = groups_of(2, 1, 2)
    ep = getattr(of_mesh, axis)
    experts = whole.experts()
    mine = slice(4 * ep.rank, 4 * ep.rank + 4)
    owner = rank if sharded else rank // 2
    hidden, logits = whole.tokens(owner)
    counts = [whole.counts[other if sharded else other // 2] for other in range(4)]
    of_ep = {"dp": [counts[rank % 2], counts[rank % 2 + 2]], "tp": counts[rank // 2 * 2 : rank // 2 * 2 + 2]}[axis]
    layout = mo.Layout(strategy, of_mesh._replace(ep=ep), dispatch, tokens_are_sharded=sharded)
    return mo.moe_stage(
        hidden,
        logits,
        mo.ExpertWeights(experts.w13[mine].clone(), experts.w2[mine].clone()),
        whole.routing,
        layout,
        lengths=mo.Lengths(per_rank=of_ep),
        reduce_results=True,
    )


@pytest.mark.parametrize("axis", ["dp", "tp"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(
    ("strategy", "dispatch"),
    [
        (Strategy.ALLGATHER, None),
        (Strategy.ALL2ALL, None),
        (Strategy.ALL2ALL, Dispatch.FIXED_CAPACITY),
        (Strategy.MC2, None),
    ],
)
def test_an_axis_may_hold_copies_of_all_experts(
    ranks4: RankPool, strategy: Strategy, dispatch: Dispatch | None, sharded: bool, axis: str
) -> None:
    whole = Problem("all2all-sharded" if sharded else "all2all", counts=(3, 5, 2, 4), seed=8)
    for rank, found in enumerate(ranks4.run(run_replicas, strategy, axis, sharded, dispatch)):
        torch.testing.assert_close(found.double(), expected_of(whole, rank), rtol=1e-5, atol=1e-5)


def test_what_is_left_open_over_tp_is_said(ranks4: RankPool) -> None:
    tp, dp = mo.Group("tp", 2, 0), mo.Group("dp", 2, 0)
    of_ep: dict[str, Any] = {"tp": tp, "dp": dp, "all": mo.Group("ep", 4, 0), "none": mo.Group.single()}
    for name, ep in of_ep.items():
        layout = mo.Layout(Strategy.ALLGATHER, mo.ParallelGroups(tp, dp, ep))
        is_open = mo.output_reduction(layout) is mo.Reduction.PARTIAL_OVER_TP
        assert is_open is (name != "dp")
