"""Dispatch and combine, step by step: which rows reach which expert, capacities, drops, host reads."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch._dynamo.backends.common import aot_autograd

import moe_ops as mo
from moe_ops.dispatchers import Dispatched, combine, dispatch
from moe_ops.dispatchers.all_to_all import NotCapturableError
from moe_ops.dispatchers.copies import pack_copies, plan_copies
from moe_ops.dispatchers.local import combine_local, dispatch_local, weigh_input
from moe_ops.traffic import count_traffic

from .ranks import RankPool, groups_of

H, E, W = 3, 8, 4


def draw_batch(seed: int, num_rows: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of small integers, distinct ids (some of them -1), and weights that are powers of two: sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-9, 10, (num_rows, H), generator=generator).float()
    ids = torch.stack([torch.randperm(E, generator=generator)[:top_k] for _ in range(num_rows)] or [torch.zeros(top_k)])
    ids = ids[:num_rows].to(torch.int32)
    ids[torch.rand(ids.shape, generator=generator) < 0.2] = -1
    return hidden, ids, 2.0 ** torch.randint(-3, 2, ids.shape, generator=generator)


def expected_rows(hidden: torch.Tensor, ids: torch.Tensor, expert: int) -> list[list[float]]:
    return [row.tolist() for row, chosen in zip(hidden, ids.tolist(), strict=True) for one in chosen if one == expert]


@given(num_rows=st.integers(0, 20), top_k=st.integers(1, 4), first=st.integers(0, 7), local=st.integers(1, 4))
@settings(max_examples=200)
def test_local_groups_rows_by_expert(num_rows: int, top_k: int, first: int, local: int) -> None:
    hidden, ids, weights = draw_batch(num_rows, num_rows, top_k)
    dispatched = dispatch_local(
        hidden, ids, weights, first_expert=first, num_local_experts=local, scale=hidden[:, 0].clone()
    )
    assert dispatched.rows.shape == (num_rows * top_k, H)
    groups = dispatched.rows[: dispatched.counts.sum()].split(dispatched.counts.tolist())
    for expert, group in enumerate(groups):
        assert group.tolist() == expected_rows(hidden, ids, first + expert)
    assert dispatched.scale is not None
    assert torch.equal(dispatched.scale, dispatched.rows[:, 0])
    poisoned = dispatched.rows * 3
    poisoned[dispatched.counts.sum() :] = torch.nan
    is_local = (ids >= first) & (ids < first + local) & (ids >= 0)
    expected = hidden * 3 * (weights * is_local).sum(1, keepdim=True)
    assert torch.equal(combine_local(poisoned, dispatched.state), expected)
    weighed = weigh_input(dispatched.rows, dispatched.state) * 3
    weighed[dispatched.counts.sum() :] = torch.nan
    assert torch.equal(combine_local(weighed, dispatched.state, weights_on_input=True), expected)


@given(num_rows=st.integers(0, 12), top_k=st.integers(1, 4), capacity=st.one_of(st.none(), st.integers(0, 12)))
@settings(max_examples=200)
def test_each_rank_gets_one_copy_of_a_row(num_rows: int, top_k: int, capacity: int | None) -> None:
    _, ids, _ = draw_batch(num_rows, num_rows, top_k)
    positions, counts = plan_copies(ids, E // W, W, capacity)
    wanted = [[row for row in range(num_rows) if any(i >= 0 and i // 2 == rank for i in ids[row])] for rank in range(W)]
    assert counts.tolist() == [len(rows) for rows in wanted]
    kept = [rows if capacity is None else rows[:capacity] for rows in wanted]
    starts = [sum(map(len, kept[:rank])) if capacity is None else rank * capacity for rank in range(W)]
    places = {(row, rank): starts[rank] + i for rank in range(W) for i, row in enumerate(kept[rank])}
    assert positions.tolist() == [[places.get((row, rank), -1) for rank in range(W)] for row in range(num_rows)]
    total = sum(map(len, kept)) if capacity is None else W * capacity
    numbers = torch.arange(num_rows, dtype=torch.int32)
    packed = pack_copies([numbers], positions, total, [-1]).view(torch.int32).flatten().tolist()
    assert packed == [next((row for (row, _), at in places.items() if at == place), -1) for place in range(total)]


def send(batch: tuple[torch.Tensor, ...], capacity: int | None, ep: mo.Group) -> Dispatched:
    """With a capacity, or just the rows that are needed."""
    kind = mo.Dispatch.ALL_TO_ALL if capacity is None else mo.Dispatch.FIXED_CAPACITY
    return dispatch(*batch, kind=kind, num_local_experts=2, ep=ep, capacity=capacity)


def exchange(
    rank: int, seed: int, counts: list[int], top_k: int, capacity: int | None
) -> tuple[list[Any], torch.Tensor, int]:
    """The groups of rows that arrive, what comes back when experts multiply by their id plus one, and the drops."""
    ep = groups_of(1, 1, 4).ep
    dispatched = send(draw_batch(seed + rank, counts[rank], top_k), capacity, ep)
    local = dispatched.local
    factor = torch.tensor([2.0 * rank + 1, 2.0 * rank + 2]).repeat_interleave(local.counts)
    rows = torch.full_like(local.rows, torch.nan)
    rows[: len(factor)] = local.rows[: len(factor)] * factor.unsqueeze(1)
    groups = [group.tolist() for group in local.rows[: len(factor)].split(local.counts.tolist())]
    num_dropped = 0 if capacity is None else int(dispatched.exchange.num_dropped)
    return groups, combine(rows, dispatched, ep=ep), num_dropped


@pytest.mark.slow
@given(
    seed=st.integers(0, 999),
    counts=st.lists(st.sampled_from([0, 1, 2, 5, 11]), min_size=4, max_size=4),
    top_k=st.integers(1, 4),
    is_ragged=st.booleans(),
)
@settings(max_examples=60)
def test_rows_reach_their_experts_and_come_back(
    ranks4: RankPool, seed: int, counts: list[int], top_k: int, is_ragged: bool
) -> None:
    batches = [draw_batch(seed + rank, count, top_k) for rank, count in enumerate(counts)]
    hidden, ids = (torch.cat([batch[i] for batch in batches]) for i in range(2))
    answers = ranks4.run(exchange, seed, counts, top_k, None if is_ragged else max(counts))
    for rank, (groups, output, num_dropped) in enumerate(answers):
        assert groups == [expected_rows(hidden, ids, 2 * rank + expert) for expert in range(2)]
        x, own_ids, weights = batches[rank]
        factors = torch.where(own_ids >= 0, (own_ids + 1) * weights, 0).sum(1, keepdim=True)
        assert torch.equal(output, x * factors)
        assert num_dropped == 0


@given(seed=st.integers(0, 999), capacity=st.integers(0, 8))
@settings(max_examples=40)
def test_a_small_capacity_drops_the_last_rows_and_counts_them(ranks4: RankPool, seed: int, capacity: int) -> None:
    counts, top_k = [11, 4, 0, 9], 2
    answers = ranks4.run(exchange, seed, counts, top_k, capacity)
    for rank, (_, output, num_dropped) in enumerate(answers):
        x, ids, weights = draw_batch(seed + rank, counts[rank], top_k)
        sent = [0] * W
        factors, dropped = [], 0
        for chosen, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            fits = {}
            for destination in {i // 2 for i in chosen if i >= 0}:
                fits[destination] = sent[destination] < capacity
                sent[destination] += 1
                dropped += not fits[destination]
            factors.append(sum((i + 1) * w for i, w in zip(chosen, weight, strict=True) if i >= 0 and fits[i // 2]))
        assert torch.equal(output, x * torch.tensor(factors).view(-1, 1))
        assert num_dropped == dropped


def interleave(rank: int, is_ragged: bool) -> bool:
    """Two batches in flight at once give what one after the other gives."""
    ep = groups_of(1, 1, 4).ep
    batches = [draw_batch(10 * seed + rank, 3 + seed + rank, 2) for seed in range(2)]
    sent = [send(batch, None if is_ragged else 8, ep) for batch in batches]
    together = [combine(out.local.rows * 3, out, ep=ep) for out in sent]
    expected = [x * 3 * torch.where(ids >= 0, weights, 0).sum(1, keepdim=True) for x, ids, weights in batches]
    return all(torch.equal(found, wanted) for found, wanted in zip(together, expected, strict=True))


@pytest.mark.parametrize("is_ragged", [True, False], ids=["ragged", "fixed"])
def test_micro_batches_interleave(ranks4: RankPool, is_ragged: bool) -> None:
    assert all(ranks4.run(interleave, is_ragged))


def through_one_signature(rank: int, kind: mo.Dispatch) -> tuple[torch.Tensor, bool]:
    ep = groups_of(1, 1, 4).ep
    capacity = 5 if kind is mo.Dispatch.FIXED_CAPACITY else None
    dispatched = dispatch(*draw_batch(rank, 5, 2), kind=kind, num_local_experts=2, ep=ep, capacity=capacity)
    return combine(dispatched.local.rows * 3, dispatched, ep=ep), dispatched.exchange is None


@pytest.mark.parametrize("kind", list(mo.Dispatch), ids=lambda kind: kind.value)
def test_one_signature_serves_every_kind(ranks4: RankPool, kind: mo.Dispatch) -> None:
    for rank, (output, is_local) in enumerate(ranks4.run(through_one_signature, kind)):
        x, ids, weights = draw_batch(rank, 5, 2)
        is_here = (ids // 2 == rank) | (kind is not mo.Dispatch.LOCAL)
        assert torch.equal(output, x * 3 * torch.where((ids >= 0) & is_here, weights, 0).sum(1, keepdim=True))
        assert is_local is (kind is mo.Dispatch.LOCAL)


def test_bad_input_names_the_argument(fake_group4: str) -> None:
    batch, ep = draw_batch(0, 3, 2), mo.Group(fake_group4, 4, 0)
    message = "capacity must be given with FIXED_CAPACITY and with no other, got"
    with pytest.raises(ValueError, match=f"{message} None"):
        dispatch(*batch, kind=mo.Dispatch.FIXED_CAPACITY, num_local_experts=2, ep=ep)
    with pytest.raises(ValueError, match=f"{message} 5"):
        dispatch(*batch, kind=mo.Dispatch.ALL_TO_ALL, num_local_experts=2, ep=ep, capacity=5)
    with pytest.raises(TypeError, match="kind must be a Dispatch, got 'local'"):
        dispatch(*batch, kind="local", num_local_experts=2, ep=ep)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_local_experts must be at least 1, got 0"):
        dispatch(*batch, kind=mo.Dispatch.LOCAL, num_local_experts=0, ep=ep)


def test_a_capacity_is_not_negative() -> None:
    with pytest.raises(ValueError, match="capacity must not be negative, got -1"):
        plan_copies(torch.zeros(2, 1, dtype=torch.int32), 2, W, -1)


def count_collectives(rank: int, capacity: int | None) -> int:
    exchange(rank, 1, [5] * 4, 2, capacity)
    return count_traffic(lambda: exchange(rank, 1, [5] * 4, 2, capacity)).collectives


@pytest.mark.parametrize(("capacity", "number"), [(None, 3), (5, 2)], ids=["ragged", "fixed"])
def test_one_collective_each_way(ranks4: RankPool, capacity: int | None, number: int) -> None:
    """And one for the counts, where they are not fixed."""
    assert ranks4.run(count_collectives, capacity) == [number] * 4


def targets_of_the_graph(rank: int, strategy: mo.Strategy, dispatch: mo.Dispatch) -> list[str]:
    """What a back end is given of the whole stage."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    layout = mo.Layout(strategy, groups_of(2, 1, 2), dispatch)
    experts = mo.ExpertWeights(torch.zeros(2, 8, H), torch.zeros(2, H, 4))

    def stage(x: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mo.moe_stage(x, logits, experts, mo.Routing(2, E), layout, lengths=mo.Lengths(mask=mask))

    tensors = torch.zeros(5, H), torch.zeros(5, E), torch.ones(6, dtype=torch.bool)
    mo.mark_token_axes(*tensors)
    backend = aot_autograd(fw_compiler=keep)
    with torch.no_grad():
        torch.compile(stage, backend=backend, fullgraph=True)(*tensors)
    return [str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "dispatch", "num_reads"),
    [
        (mo.Strategy.ALL2ALL, mo.Dispatch.ALL_TO_ALL, 2 * W),
        (mo.Strategy.ALL2ALL, mo.Dispatch.FIXED_CAPACITY, 0),
        (mo.Strategy.MC2, mo.Dispatch.FIXED_CAPACITY, 0),
        (mo.Strategy.ALLGATHER, mo.Dispatch.LOCAL, 0),
    ],
)
def test_only_the_ragged_exchange_reads_on_the_host(
    ranks4: RankPool, strategy: mo.Strategy, dispatch: mo.Dispatch, num_reads: int
) -> None:
    for targets in ranks4.run(targets_of_the_graph, strategy, dispatch):
        assert sum(target.startswith(("aten._local_scalar_dense", "aten.item")) for target in targets) == num_reads
        assert not any(name in target for target in targets for name in ("nonzero", "masked_select", "unique"))
        assert not any("prepare" in target or "dispatch" in target or "combine" in target for target in targets)


def test_a_capture_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, fake_group4: str) -> None:
    """A stand-in for a device that captures: there is none here."""

    class OnDevice(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ids = torch.zeros(2, 1, dtype=torch.int32).as_subclass(OnDevice)
    with pytest.raises(NotCapturableError, match=r"ALL_TO_ALL reads its split sizes on the host.*FIXED_CAPACITY can"):
        send((torch.zeros(2, H), ids, torch.zeros(2, 1)), None, mo.Group(fake_group4, 4, 0))
