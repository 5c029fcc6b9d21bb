"""Prepare and finalize on simulated ranks, against the layout written out here row by row.

rank layout of DP 2, PCP 2, TP 2:     tp 0  tp 1        EP rank = (d * PCP + p) * TP + t
                          d0 p0        0     1
                          d0 p1        2     3
                          d1 p0        4     5
                          d1 p1        6     7
"""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import moe_ops as mo
from moe_ops import Strategy
from moe_ops.quantize import quantize_activations

from .simulated import World, local, simulated_world

pytestmark = pytest.mark.slow

WIDTH, EXPERTS = 3, 2
TOKENS = st.one_of(st.integers(0, 9), st.sampled_from([13, 31, 64]))


@st.composite
def topologies(draw: Any) -> tuple[int, int, int]:
    sizes = [(dp, pcp, tp) for dp in (1, 2, 3) for pcp in (1, 2) for tp in (1, 2, 3, 4)]
    return draw(st.sampled_from([size for size in sizes if size[0] * size[1] * size[2] <= 8]))  # torch simulates slowly


def tokens_of(num_tokens: int, owner: int) -> torch.Tensor:
    """Rows that tell whose they are and which: small integers, so that sums are exact."""
    return owner * 1000.0 + torch.arange(num_tokens * WIDTH, dtype=torch.float32).view(num_tokens, WIDTH) + 1


def zeros_after(x: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


class Case:
    """Tokens for each (d, p), replicated over TP, or for each rank where they are sharded."""

    def __init__(self, world: World, counts: list[int], sharded: bool = False) -> None:
        self.world = world
        owners = list(range(world.size)) if sharded else [rank // world.tp for rank in range(world.size)]
        self.tokens = [tokens_of(counts[owner], owner) for owner in owners]
        self.logits = [tokens[:, :EXPERTS] - 0.5 for tokens in self.tokens]
        self.ids = [tokens[:, 0].to(torch.int64) for tokens in self.tokens]
        self.x, self.l, self.i = (world.tensor(per_rank) for per_rank in (self.tokens, self.logits, self.ids))

    def prepare(self, layout: mo.Layout, quant: mo.Quant = mo.Quant.NONE, **lengths: Any) -> mo.PrepareOutput:
        return mo.prepare(self.x, self.l, layout, mo.Lengths(**lengths), quant)

    def finalize(self, hidden: Any, state: Any, layout: mo.Layout, reduce_results: bool = False) -> list[torch.Tensor]:
        out = mo.finalize(hidden, state, layout, reduce_results)
        return [local(out, rank) for rank in range(self.world.size)]

    def check_inputs_kept(self) -> None:
        for rank, (tokens, logits) in enumerate(zip(self.tokens, self.logits, strict=True)):
            assert torch.equal(local(self.x, rank), tokens)
            assert torch.equal(local(self.l, rank), logits)


def check_not_aliased(out: mo.PrepareOutput, case: Case) -> None:
    for rank in range(case.world.size):
        for result, given_tensor in ((out.hidden_states, case.x), (out.router_logits, case.l)):
            assert not torch._C._is_alias_of(local(result, rank), local(given_tensor, rank))


def share_of_owner(gathered: Any, world: World) -> Any:
    """Each rank's share of every row: the row itself where it owns it (row modulo ranks), zero elsewhere."""
    shares = []
    for rank in range(world.size):
        rows = local(gathered, rank)
        owned = torch.arange(rows.shape[0]) % world.size == rank
        shares.append(torch.where(owned.unsqueeze(1), rows, 0))
    return world.tensor(shares)


@given(
    topology=topologies(),
    counts=st.lists(TOKENS, min_size=6, max_size=6),
    has_mask=st.booleans(),
    actual=st.integers(0, 70),
)
@settings(max_examples=25)
def test_all2all_chunks_and_returns(
    topology: tuple[int, int, int], counts: list[int], has_mask: bool, actual: int
) -> None:
    with simulated_world(*topology) as world:
        case, layout = Case(world, counts), mo.Layout(Strategy.ALL2ALL, world.groups)
        longest = max(len(tokens) for tokens in case.tokens)
        mask = world.tensor([torch.arange(-(-longest // world.tp) * world.tp) < actual] * world.size)
        out = case.prepare(layout, mask=mask if has_mask else None)
        ids = mo.lay_out_like_prepared(case.i, out.state, layout)
        result = case.finalize(out.hidden_states * 2, out.state, layout)
        for rank in range(world.size):
            rows = -(-len(case.tokens[rank]) // world.tp)
            chunk = slice(world.coordinates(rank)[2] * rows, (world.coordinates(rank)[2] + 1) * rows)
            padded = zeros_after(case.tokens[rank], rows * world.tp)
            assert torch.equal(local(out.hidden_states, rank), padded[chunk])
            assert torch.equal(local(out.router_logits, rank), zeros_after(case.logits[rank], rows * world.tp)[chunk])
            is_pad = (padded[chunk] == 0).all(dim=1)
            assert torch.equal(local(ids, rank), torch.where(is_pad, -1, padded[chunk][:, 0].to(torch.int64)))
            if has_mask:
                is_kept = torch.arange(rows * world.tp)[chunk] < actual
                assert torch.equal(local(out.mask, rank), is_kept & ~is_pad)
            assert local(out.state.num_tokens, rank) == len(case.tokens[rank])
            assert local(out.state.padded_num_tokens, rank) == rows * world.tp
            assert torch.equal(result[rank], case.tokens[rank] * 2)
        assert (out.mask is None) is not has_mask
        assert out.pertoken_scale is None
        case.check_inputs_kept()
        if world.tp > 1:
            check_not_aliased(out, case)


@given(
    topology=topologies(),
    counts=st.lists(TOKENS, min_size=6, max_size=6),
    extra_chunks=st.integers(0, 3),
    shared_expert_dp=st.booleans(),
    has_mask=st.booleans(),
    has_length=st.booleans(),
    actual=st.integers(0, 70),
)
@settings(max_examples=30)
def test_mc2_mask_rows_are_hidden_rows(
    topology: tuple[int, int, int],
    counts: list[int],
    extra_chunks: int,
    shared_expert_dp: bool,
    has_mask: bool,
    has_length: bool,
    actual: int,
) -> None:
    with simulated_world(*topology) as world:
        case, layout = Case(world, counts), mo.Layout(Strategy.MC2, world.groups, shared_expert_dp=shared_expert_dp)
        longest = max(len(tokens) for tokens in case.tokens)
        extra_chunks = extra_chunks if has_mask else 0
        padded = (-(-longest // world.tp) + extra_chunks) * world.tp
        masks = [torch.arange(padded) < actual] * world.size
        out = case.prepare(
            layout,
            longest=longest if has_length or not has_mask else None,
            mask=world.tensor(masks) if has_mask else None,
        )
        result = case.finalize(out.hidden_states * 2, out.state, layout)
        rows = padded if shared_expert_dp else padded // world.tp
        for rank in range(world.size):
            start = 0 if shared_expert_dp else world.coordinates(rank)[2] * rows
            chunk, count = slice(start, start + rows), len(case.tokens[rank])
            assert torch.equal(local(out.hidden_states, rank), zeros_after(case.tokens[rank], padded)[chunk])
            assert torch.equal(local(out.router_logits, rank), zeros_after(case.logits[rank], padded)[chunk])
            if has_mask:
                assert torch.equal(local(out.mask, rank), torch.arange(padded)[chunk] < min(actual, count))
            assert torch.equal(result[rank], case.tokens[rank] * 2)
            assert local(out.state.num_tokens, rank) == count
        assert (out.mask is None) is not has_mask
        case.check_inputs_kept()


@given(
    topology=topologies(),
    shard_rows=st.lists(st.integers(0, 7), min_size=6, max_size=6),
    extra=st.integers(0, 2),
    missing=st.integers(0, 3),
    has_mask=st.booleans(),
)
@settings(max_examples=25)
def test_mc2_pads_shards_and_gives_each_its_own_part_of_the_mask(
    topology: tuple[int, int, int], shard_rows: list[int], extra: int, missing: int, has_mask: bool
) -> None:
    """Shards of S rows: token i of the TP group is row i % S of rank i // S, whatever the common length is."""
    with simulated_world(*topology) as world:
        rows_of = [shard_rows[rank // world.tp] for rank in range(world.size)]
        case, layout = (
            Case(world, rows_of, sharded=True),
            mo.Layout(Strategy.MC2, world.groups, tokens_are_sharded=True),
        )
        common = max(rows_of) + (extra if has_mask else 0)
        actual = [max(0, rows * world.tp - missing) for rows in rows_of]
        masks = [torch.arange(common * world.tp) < count for count in actual]
        out = case.prepare(layout, longest=max(rows_of), mask=world.tensor(masks) if has_mask else None)
        result = case.finalize(out.hidden_states * 2, out.state, layout)
        ids = mo.lay_out_like_prepared(case.i, out.state, layout)
        for rank in range(world.size):
            t = world.coordinates(rank)[2]
            assert torch.equal(local(out.hidden_states, rank), zeros_after(case.tokens[rank], common))
            assert torch.equal(local(ids, rank), zeros_after(case.ids[rank] + 1, common) - 1)
            if has_mask:
                real = [i < rows_of[rank] and t * rows_of[rank] + i < actual[rank] for i in range(common)]
                assert local(out.mask, rank).tolist() == real
            assert torch.equal(result[rank], case.tokens[rank] * 2)


@given(
    topology=topologies(),
    counts=st.lists(TOKENS, min_size=6, max_size=6),
    extra=st.integers(0, 4),
    reduce_results=st.booleans(),
    shared_expert_dp=st.booleans(),
    has_mask=st.booleans(),
    actual=st.integers(0, 70),
)
@settings(max_examples=30)
def test_allgather_over_dp_and_pcp(
    topology: tuple[int, int, int],
    counts: list[int],
    extra: int,
    reduce_results: bool,
    shared_expert_dp: bool,
    has_mask: bool,
    actual: int,
) -> None:
    with simulated_world(*topology) as world:
        layout = mo.Layout(Strategy.ALLGATHER, world.groups, shared_expert_dp=shared_expert_dp)
        case = Case(world, counts)
        longest = max(len(tokens) for tokens in case.tokens) + extra
        gathers = world.dp * world.pcp > 1
        mask = world.tensor([torch.arange(-(-longest // world.tp) * world.tp) < actual] * world.size)
        out = case.prepare(layout, longest=longest, mask=mask if has_mask else None)
        ids = mo.lay_out_like_prepared(case.i, out.state, layout)
        shares = share_of_owner(out.hidden_states, world) if gathers else out.hidden_states
        result = case.finalize(shares, out.state, layout, reduce_results)
        for rank in range(world.size):
            expected = gathered_over_dp(case, rank, longest)
            assert torch.equal(local(out.hidden_states, rank), expected)
            is_pad = (expected == 0).all(dim=1)
            assert torch.equal(local(ids, rank), torch.where(is_pad, -1, expected[:, 0].to(torch.int64)))
            if has_mask:
                is_kept = torch.arange(longest if gathers else len(expected)) < actual
                assert torch.equal(local(out.mask, rank), is_kept.repeat(world.dp * world.pcp) & ~is_pad)
            if gathers and (reduce_results or world.tp == 1):
                assert torch.equal(result[rank], case.tokens[rank])
            if not gathers and not reduce_results:
                assert torch.equal(result[rank], case.tokens[rank])
        if gathers and not reduce_results:
            for first in range(0, world.size, world.tp):  # what the caller's all-reduce over TP makes of it
                summands = result[first : first + world.tp]
                assert torch.equal(torch.stack(summands).sum(0), case.tokens[first])
        is_open = mo.output_reduction(layout) is mo.Reduction.PARTIAL_OVER_TP
        assert is_open is (world.tp > 1)
        case.check_inputs_kept()


def gathered_over_dp(case: Case, rank: int, per_rank: int) -> torch.Tensor:
    """DP blocks inside PCP blocks, each padded with zeros; a rank's own tokens where there is nobody to gather from."""
    world = case.world
    if world.dp * world.pcp == 1:
        return case.tokens[rank]
    t = world.coordinates(rank)[2]
    ranks = [(d * world.pcp + p) * world.tp + t for p in range(world.pcp) for d in range(world.dp)]
    return torch.cat([zeros_after(case.tokens[other], per_rank) for other in ranks])


@given(
    topology=topologies(),
    counts=st.lists(TOKENS, min_size=24, max_size=24),
    equal=st.booleans(),
    quant=st.sampled_from(list(mo.Quant)),
)
@settings(max_examples=25)
def test_allgather_over_ep(topology: tuple[int, int, int], counts: list[int], equal: bool, quant: mo.Quant) -> None:
    with simulated_world(*topology) as world:
        counts = [counts[0]] * world.size if equal else counts[: world.size]
        case = Case(world, counts, sharded=True)
        layout = mo.Layout(Strategy.ALLGATHER, world.groups, tokens_are_sharded=True)
        lengths = {"equal": True} if equal else {"per_rank": counts}
        out = case.prepare(layout, quant, **lengths)
        everything = torch.cat(case.tokens)
        ids = mo.lay_out_like_prepared(case.i, out.state, layout)
        for rank in range(world.size):
            assert torch.equal(local(out.router_logits, rank), torch.cat(case.logits))
            assert torch.equal(local(ids, rank), torch.cat(case.ids))
            if quant is mo.Quant.NONE:
                assert torch.equal(local(out.hidden_states, rank), everything)
                assert out.pertoken_scale is None
            else:
                quantized, scale = quantize_activations(everything, quant=quant)
                assert torch.equal(as_bytes(local(out.hidden_states, rank)), as_bytes(quantized))
                assert torch.equal(as_bytes(local(out.pertoken_scale, rank)), as_bytes(scale))
        gathered = world.tensor([everything] * world.size)
        result = case.finalize(share_of_owner(gathered, world), out.state, layout, reduce_results=True)
        for rank in range(world.size):
            assert torch.equal(result[rank], case.tokens[rank])
        assert mo.output_reduction(layout) is mo.Reduction.COMPLETE
        case.check_inputs_kept()


@given(topology=topologies(), counts=st.lists(TOKENS, min_size=24, max_size=24), missing=st.integers(0, 9))
@settings(max_examples=20)
def test_allgather_over_ep_knows_the_longest_alone(
    topology: tuple[int, int, int], counts: list[int], missing: int
) -> None:
    """Each rank's block is as long; what pads is zero, -1 and not active."""
    with simulated_world(*topology) as world:
        counts = [counts[rank // world.tp] for rank in range(world.size)]
        case, longest = Case(world, counts, sharded=True), max(counts)
        layout = mo.Layout(Strategy.ALLGATHER, world.groups, tokens_are_sharded=True)
        masks = [torch.arange(longest * world.tp) < counts[rank] * world.tp - missing for rank in range(world.size)]
        out = case.prepare(layout, longest=longest, mask=world.tensor(masks))
        ids = mo.lay_out_like_prepared(case.i, out.state, layout)
        rows = longest if world.size > 1 else counts[0]
        everything = torch.cat([zeros_after(tokens, rows) for tokens in case.tokens])
        ids_of_all = torch.cat([zeros_after(ids + 1, rows) - 1 for ids in case.ids])
        kept = []
        for rank, count in enumerate(counts):
            before = world.coordinates(rank)[2] * count
            kept += [i < count and before + i < count * world.tp - missing for i in range(rows)]
        result = case.finalize(share_of_owner(out.hidden_states, world), out.state, layout)
        for rank in range(world.size):
            assert torch.equal(local(out.hidden_states, rank), everything)
            assert torch.equal(local(ids, rank), ids_of_all)
            assert local(out.mask, rank).tolist() == kept
            assert torch.equal(result[rank], case.tokens[rank])


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("strategy", list(Strategy), ids=lambda s: s.value)
@given(first=st.lists(TOKENS, min_size=4, max_size=4), second=st.lists(TOKENS, min_size=4, max_size=4))
@settings(max_examples=8)
def test_micro_batches_interleave(strategy: Strategy, first: list[int], second: list[int]) -> None:
    with simulated_world(2, 1, 2) as world:
        a, b, layout = Case(world, first), Case(world, second), mo.Layout(strategy, world.groups)
        out_a, out_b = a.prepare(layout, longest=64), b.prepare(layout, longest=64)
        share = share_of_owner if strategy is Strategy.ALLGATHER else lambda hidden, _: hidden
        result_a = a.finalize(share(out_a.hidden_states, world), out_a.state, layout, reduce_results=True)
        result_b = b.finalize(share(out_b.hidden_states, world), out_b.state, layout, reduce_results=True)
        for rank in range(world.size):
            assert torch.equal(result_a[rank], a.tokens[rank])
            assert torch.equal(result_b[rank], b.tokens[rank])


@pytest.mark.parametrize("strategy", list(Strategy), ids=lambda s: s.value)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("shared_expert_dp", [False, True])
def test_identity_steps_return_their_input(strategy: Strategy, sharded: bool, shared_expert_dp: bool) -> None:
    x, logits = torch.randn(5, 4), torch.randn(5, 2)
    layout = mo.Layout(strategy, mo.ParallelGroups(), tokens_are_sharded=sharded, shared_expert_dp=shared_expert_dp)
    out = mo.prepare(x, logits, layout)
    assert out.hidden_states is x and out.router_logits is logits
    assert mo.finalize(x, out.state, layout, reduce_results=True) is x
    ids = torch.arange(5)
    assert mo.lay_out_like_prepared(ids, out.state, layout) is ids


@pytest.mark.parametrize("flag", ["tokens_are_sharded", "shared_expert_dp"])
def test_all2all_keeps_all_tokens_on_request(flag: str) -> None:
    with simulated_world(1, 1, 4) as world:
        case, layout = Case(world, [5] * 4), mo.Layout(Strategy.ALL2ALL, world.groups, **{flag: True})
        out = case.prepare(layout)
        assert out.hidden_states is case.x
        assert mo.finalize(case.x, out.state, layout) is case.x


def test_reduce_results_never_reduces_a_finished_value() -> None:
    with simulated_world(1, 1, 4) as world:
        case = Case(world, [5])
        for strategy in (Strategy.ALL2ALL, Strategy.MC2):
            layout = mo.Layout(strategy, world.groups)
            out = case.prepare(layout, longest=5)
            for rows in case.finalize(out.hidden_states, out.state, layout, reduce_results=True):
                assert torch.equal(rows, case.tokens[0])
            assert mo.output_reduction(layout) is mo.Reduction.COMPLETE


def test_reduce_results_sums_over_tp_where_nothing_was_gathered() -> None:
    with simulated_world(1, 1, 4) as world:
        case, layout = Case(world, [5]), mo.Layout(Strategy.ALLGATHER, world.groups)
        out = case.prepare(layout)
        for rows in case.finalize(out.hidden_states, out.state, layout, reduce_results=True):
            assert torch.equal(rows, case.tokens[0] * 4)


def test_state_is_plain_integers() -> None:
    out = mo.prepare(torch.randn(5, 4), torch.randn(5, 2), mo.Layout(Strategy.ALL2ALL, mo.ParallelGroups()))
    assert all(type(value) is int for value in out.state)
    assert (out.state.num_tokens, out.state.padded_num_tokens) == (5, 5)
