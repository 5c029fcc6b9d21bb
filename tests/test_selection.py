"""Which strategy: published rules, the cost model against what ranks really send, and the choice."""

import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings

import moe_ops as mo
from moe_ops import Dispatch, Quant, Strategy
from moe_ops.calibration import fit_link
from moe_ops.cost_types import CollectiveKind, FormCost, RowCopies
from moe_ops.costs import FORMS, expected_copies, payload_bytes, predict_costs
from moe_ops.load import count_copies, draw_topk_ids, measure_load
from moe_ops.route import route
from moe_ops.selection import DeviceFamily, mc2_capacity, select_by_device
from moe_ops.traffic import count_traffic

from .ranks import RankPool, groups_of

NOMINAL = mo.Calibration.uniform(latency=20e-6, bandwidth=50e9)
QWEN3 = mo.LayerShape(hidden_size=4096, num_experts=128, top_k=8)

A2, A3, A5, P310 = DeviceFamily.A2, DeviceFamily.A3, DeviceFamily.A5, DeviceFamily.ASCEND_310P
GATHER = Strategy.ALLGATHER, Dispatch.LOCAL
EXCHANGE = Strategy.ALL2ALL, Dispatch.ALL_TO_ALL
MC2 = Strategy.MC2, Dispatch.FIXED_CAPACITY

# device, tokens, capacity, experts, top-k, EP, world, options -> the published choice
RULES = [
    (A2, 100, 512, 256, 8, 1, 1, {}, GATHER),  # no expert parallelism
    (A3, 100, 512, 256, 8, 1, 16, {}, GATHER),
    (A2, 100, 512, 256, 8, 16, 16, {"has_lora": True}, EXCHANGE),
    (P310, 100, 512, 256, 8, 2, 2, {"has_lora": True}, EXCHANGE),
    (A3, 100, 512, 256, 8, 1, 1, {"has_lora": True}, GATHER),
    (A2, 512, 512, 384, 8, 16, 16, {}, MC2),  # 24 experts a rank, EP 16, just fits
    (A2, 513, 512, 384, 8, 16, 16, {}, GATHER),
    (A2, 512, 512, 400, 8, 16, 16, {}, GATHER),  # 25 experts a rank
    (A2, 512, 512, 120, 8, 15, 15, {}, GATHER),  # EP 15
    (A2, None, 0, 256, 8, 16, 32, {}, MC2),  # not known: fits
    (A2, 1, 512, 256, 8, 8, 32, {}, GATHER),  # EP decides, not the world
    (A3, 512, 512, 256, 8, 16, 16, {}, MC2),
    (A3, 513, 512, 256, 8, 16, 16, {}, EXCHANGE),
    (A3, None, 0, 256, 8, 2, 2, {}, MC2),
    (A3, 9999, 512, 256, 8, 32, 32, {"has_fused_mc2": True}, MC2),
    (A3, 9999, 512, 256, 8, 33, 33, {"has_fused_mc2": True}, EXCHANGE),
    (A3, 512, 512, 256, 8, 33, 33, {"has_fused_mc2": True}, MC2),
    (A3, 9999, 512, 256, 8, 64, 64, {"has_fused_mc2": True, "has_mega_moe": True}, MC2),
    (A3, 9999, 512, 256, 8, 65, 65, {"has_fused_mc2": True, "has_mega_moe": True}, EXCHANGE),
    (A3, 9999, 512, 256, 8, 16, 16, {"has_mega_moe": True}, EXCHANGE),  # there, but not enabled
    (A5, 512, 512, 256, 8, 4, 4, {}, MC2),
    (A5, 513, 512, 256, 8, 8, 8, {}, GATHER),  # no more ranks than choices
    (A5, 513, 512, 256, 8, 9, 9, {}, EXCHANGE),
    (A5, 513, 512, 256, 8, 8, 16, {}, EXCHANGE),  # two pipeline stages: the world decides
    (A5, 9999, 512, 256, 8, 16, 16, {"has_fused_mc2": True}, EXCHANGE),  # A3 alone has it
    (P310, 1, 512, 8, 2, 4, 4, {}, GATHER),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0].value}-{rule[1]}-E{rule[3]}-EP{rule[5]}-W{rule[6]}")
def test_published_rules(rule: tuple) -> None:
    device, tokens, capacity, experts, top_k, ep, world, options, expected = rule
    choice = select_by_device(
        device,
        num_tokens=tokens,
        capacity=capacity,
        num_experts=experts,
        top_k=top_k,
        ep_size=ep,
        world_size=world,
        **options,
    )
    assert choice[:2] == expected
    assert choice.reason


@pytest.mark.parametrize(
    ("device", "tokens", "tp", "mega", "capacity"),
    [
        (A2, 0, 4, False, 0),
        (A2, 1, 4, False, 4),
        (A2, 1024, 4, False, 1024),
        (A2, 1025, 4, False, 1024),  # 256 rows a rank
        (A3, 1025, 4, False, 1028),
        (A3, 2049, 4, False, 2048),  # 512
        (A5, 513, 1, False, 512),
        (A3, 9000, 2, True, 8192),  # 4096
    ],
)
def test_mc2_capacity(device: DeviceFamily, tokens: int, tp: int, mega: bool, capacity: int) -> None:
    assert mc2_capacity(device, tokens, tp_size=tp, has_mega_moe=mega) == capacity


@pytest.mark.parametrize(("ep", "copies"), [(2, 1.0), (4, 2.7), (8, 4.6), (16, 6.1), (32, 7.0), (64, 7.6)])
def test_expected_copies(ep: int, copies: float) -> None:
    assert round(expected_copies(num_experts=256, top_k=8, ep_size=ep), 1) == copies


@given(experts_each=st.integers(1, 8), ep=st.integers(1, 8), data=st.data())
def test_expected_copies_are_the_mean_of_counted_ones(experts_each: int, ep: int, data: st.DataObject) -> None:
    experts = experts_each * ep
    top_k = data.draw(st.integers(1, min(experts, 4)))
    ids = draw_topk_ids(500 * ep, num_experts=experts, top_k=top_k, seed=data.draw(st.integers(0, 99)))
    counted = sum(count_copies(ids.view(ep, 500, top_k), num_experts=experts).sent) / (500 * ep)
    assert counted == pytest.approx(expected_copies(num_experts=experts, top_k=top_k, ep_size=ep), abs=0.3)


def count_copies_row_by_row(ids: list[torch.Tensor], num_experts: int) -> RowCopies:
    ranks, sent, received = len(ids), [0] * len(ids), [0] * len(ids)
    for source, rows in enumerate(ids):
        for row in rows.tolist():
            for target in {chosen * ranks // num_experts for chosen in row if chosen >= 0} - {source}:
                sent[source] += 1
                received[target] += 1
    return RowCopies(tuple(sent), tuple(received))


@given(ep=st.integers(1, 4), experts_each=st.integers(1, 3), seed=st.integers(0, 999), data=st.data())
def test_count_copies(ep: int, experts_each: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = data.draw(st.lists(st.integers(0, 7), min_size=ep, max_size=ep))
    ids = [torch.randint(-1, ep * experts_each, (count, 3), generator=generator) for count in rows]
    assert count_copies(ids, num_experts=ep * experts_each) == count_copies_row_by_row(ids, ep * experts_each)


def test_load() -> None:
    load = measure_load(torch.tensor([[0, 1], [0, 3], [0, -1]]), num_experts=4, ep_size=2)
    assert load == ((3, 1, 0, 1), (4, 1), 3 / (5 / 4), 4 / (5 / 2))
    assert measure_load(torch.empty(0, 2, dtype=torch.int32), num_experts=4, ep_size=2)[2:] == (1.0, 1.0)


def test_drawn_routings() -> None:
    even, skewed = (draw_topk_ids(20000, num_experts=64, top_k=4, exponent=exponent) for exponent in (0.0, 1.2))
    for ids in (even, skewed):
        assert ids.shape == (20000, 4) and ids.dtype == torch.int32
        assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()  # no expert twice
    loads = [sorted(measure_load(ids, num_experts=64, ep_size=1).experts, reverse=True) for ids in (even, skewed)]
    assert loads[0][0] < 1.15 * loads[0][-1]
    first = draw_topk_ids(20000, num_experts=64, top_k=1, exponent=1.2)
    shares = sorted(measure_load(first, num_experts=64, ep_size=1).experts, reverse=True)
    assert shares[0] / shares[1] == pytest.approx(2**1.2, rel=0.1)
    assert torch.equal(even, draw_topk_ids(20000, num_experts=64, top_k=4))


# What ranks really send. gloo's all-gather, all-reduce and all-to-all send what the model counts, its reduce-scatter twice as
# much: that of an all-reduce.
GLOO_FACTOR = {kind: 2 if kind is CollectiveKind.REDUCE_SCATTER else 1 for kind in CollectiveKind}
H, E, K, T = 1024, 8, 2, 510
Layout = tuple[int, int, int]


def logits_of(owner: int, num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, E, generator=torch.Generator().manual_seed(owner))


def tokens_at(ranks: int, layout: Layout, is_sharded: bool) -> tuple[list[int], int]:
    """Whose tokens each EP rank brings, and how many these are."""
    tp = layout[2]
    return [rank if is_sharded else rank // tp for rank in range(ranks)], -(-T // tp) if is_sharded else T


def sent_by_stage(rank: int, ranks: int, layout: Layout, form: tuple, is_sharded: bool, quant: Quant) -> int:
    groups = groups_of(*layout)
    owners, count = tokens_at(ranks, layout, is_sharded)
    experts = mo.ExpertWeights(torch.zeros(E // ranks, 8, H).bfloat16(), torch.zeros(E // ranks, H, 4).bfloat16())

    def call() -> None:
        mo.moe_stage(
            torch.ones(count, H).bfloat16(),
            logits_of(owners[rank], count),
            experts,
            routing=mo.Routing(top_k=K, num_experts=E),
            strategy=form[0],
            dispatch=form[1],
            groups=groups,
            padded_num_tokens=-(-T // layout[2]) * layout[2],
            reduce_results=True,
            tokens_are_sharded=is_sharded,
            quant=quant,
        )

        dist.barrier()  # what the others have received, this rank has sent: nothing is still in a socket

    dist.barrier()
    return count_traffic(call).bytes_sent


def copies_of_stage(ranks: int, layout: Layout, is_sharded: bool) -> RowCopies:
    owners, count = tokens_at(ranks, layout, is_sharded)
    ids, tp, rows = [], layout[2], -(-T // layout[2])
    for rank, owner in enumerate(owners):
        whole = route(logits_of(owner, count), mo.Routing(top_k=K, num_experts=E))[1]
        ids.append(whole if is_sharded else whole[rows * (rank % tp) : rows * (rank % tp + 1)])
    return count_copies(ids, num_experts=E)


def as_gloo_sends(cost: FormCost) -> float:
    extra = sum(one.bytes_sent * (GLOO_FACTOR[one.kind] - 1) for one in cost.collectives)
    return cost.bytes_sent + extra


def check_bytes(pool: RankPool, ranks: int, layout: Layout, is_sharded: bool, quant: Quant) -> None:
    dp, pcp, tp = layout
    costs = predict_costs(
        mo.LayerShape(H, E, K, quant=quant),
        mo.Topology(tp=tp, dp=dp, pcp=pcp),
        T,
        calibration=NOMINAL,
        tokens_are_sharded=is_sharded,
        copies=copies_of_stage(ranks, layout, is_sharded),
    )
    for cost in costs:
        form = cost.strategy, cost.dispatch
        sent = max(pool.run(sent_by_stage, ranks, layout, form, is_sharded, quant))
        assert sent == pytest.approx(as_gloo_sends(cost), rel=0.02), (form, cost)


@pytest.mark.parametrize("quant", [Quant.NONE, Quant.W8A8, Quant.MXFP4], ids=lambda quant: quant.value)
@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 1, 2)], ids=["dp2", "tp2"])
def test_bytes_on_two_ranks(ranks2: RankPool, layout: Layout, is_sharded: bool, quant: Quant) -> None:
    check_bytes(ranks2, 2, layout, is_sharded, quant)


@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("layout", [(2, 1, 2), (2, 2, 1)], ids=["dp2-tp2", "dp2-pcp2"])
def test_bytes_on_four_ranks(ranks4: RankPool, layout: Layout, is_sharded: bool) -> None:
    check_bytes(ranks4, 4, layout, is_sharded, Quant.NONE)


@pytest.mark.parametrize("quant", [quant for quant in Quant if quant is not Quant.NONE], ids=lambda quant: quant.value)
@pytest.mark.parametrize("width", [64, 65, 97])
def test_payload_bytes_are_those_of_quantised_rows(quant: Quant, width: int) -> None:
    tensors = mo.quantize_activations(torch.randn(3, width), quant=quant)
    assert 3 * payload_bytes(mo.LayerShape(width, 8, 2, quant=quant)) == sum(tensor.nbytes for tensor in tensors)
    assert payload_bytes(mo.LayerShape(width, 8, 2, dtype=torch.float32)) == 4 * width


def test_seconds_are_latency_plus_bytes_over_bandwidth() -> None:
    calibration = mo.Calibration(mo.Link(1.0, 10.0), mo.Link(2.0, 100.0), mo.Link(4.0, 1000.0), mo.Link(8.0, 10000.0))
    layer, topology = mo.LayerShape(hidden_size=8, num_experts=4, top_k=1), mo.Topology(tp=2, dp=2)
    gather, fixed, ragged, *_ = predict_costs(
        layer, topology, 6, calibration=calibration, copies=RowCopies([1, 1, 1, 9], [3, 3, 6, 0])
    )
    # Rows of 16 bytes, 24 with an id and a weight. DP 2 of 6 tokens; EP 4 of 3 rows; TP 2.
    assert gather.seconds == pytest.approx(1 + 6 * 24 / 10 + 2 + 6 * 16 / 100 + 8 + 6 * 16 / 10000)
    assert fixed.seconds == pytest.approx(4 + 9 * 24 / 1000 + 4 + 9 * 16 / 1000 + 1 + 3 * 16 / 10)
    assert ragged.seconds == pytest.approx(4 + 24 / 1000 + 4 + 9 * 24 / 1000 + 4 + 9 * 16 / 1000 + 1 + 48 / 10)
    assert ragged.bytes_sent == 24 + 9 * 24 + 48  # rank 3, which receives nothing; rank 2 sends 24 + 24 + 6 * 16 + 48
    assert [one.rows for one in ragged.collectives] == [3, 9, 6, 3]
    assert [(one.step, one.axis) for one in ragged.collectives] == [
        ("counts", "EP"),
        ("dispatch", "EP"),
        ("combine", "EP"),
        ("finalize", "TP"),
    ]


SIZES = st.sampled_from([1, 2, 4])
TOPOLOGIES = st.builds(mo.Topology, tp=SIZES, dp=SIZES, pcp=SIZES)
LINKS = st.builds(mo.Link, latency=st.floats(0, 1e-3), bandwidth=st.floats(1e6, 1e12))
CALIBRATIONS = st.builds(mo.Calibration, LINKS, LINKS, LINKS, LINKS)
LAYERS = st.builds(
    mo.LayerShape,
    hidden_size=st.integers(1, 8192),
    num_experts=st.sampled_from([64, 128, 256]),
    top_k=st.integers(1, 8),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    quant=st.sampled_from(Quant),
)


@given(LAYERS, TOPOLOGIES, st.integers(0, 5000), CALIBRATIONS, st.booleans(), st.booleans())
def test_the_choice_is_the_cheapest_that_is_allowed(
    layer: mo.LayerShape, topology: mo.Topology, tokens: int, calibration: mo.Calibration, sharded: bool, graph: bool
) -> None:
    def select() -> tuple:
        return mo.select_strategy(
            layer,
            topology,
            tokens,
            calibration=calibration,
            tokens_are_sharded=sharded,
            must_be_capturable=graph,
        )

    choice = select()
    assert choice == select()
    assert [(cost.strategy, cost.dispatch) for cost in choice.costs] == list(FORMS)
    allowed = [cost for cost in choice.costs if not graph or cost.dispatch is not Dispatch.ALL_TO_ALL]
    least = min(cost.seconds for cost in allowed)
    first = next(cost for cost in allowed if cost.seconds == least)
    assert (choice.strategy, choice.dispatch) == (first.strategy, first.dispatch)


@given(LAYERS, TOPOLOGIES, st.integers(0, 5000), st.integers(0, 5000), CALIBRATIONS, st.booleans())
def test_more_bytes_never_take_less_time(
    layer: mo.LayerShape, topology: mo.Topology, first: int, second: int, calibration: mo.Calibration, sharded: bool
) -> None:
    few, many = (
        predict_costs(layer, topology, tokens, calibration=calibration, tokens_are_sharded=sharded)
        for tokens in sorted((first, second))
    )
    for less, more in zip(few, many, strict=True):
        assert less.bytes_sent <= more.bytes_sent and less.seconds <= more.seconds
        assert math.isfinite(more.seconds)
    wider = predict_costs(
        layer._replace(hidden_size=layer.hidden_size + 1),
        topology,
        second,
        calibration=calibration,
        tokens_are_sharded=sharded,
    )
    narrow = predict_costs(layer, topology, second, calibration=calibration, tokens_are_sharded=sharded)
    assert all(less.seconds <= more.seconds for less, more in zip(narrow, wider, strict=True))


def test_one_rank_sends_nothing_and_gathers() -> None:
    choice = mo.select_strategy(QWEN3, mo.Topology(), 100, calibration=NOMINAL)
    assert choice.strategy is Strategy.ALLGATHER
    assert all(cost.bytes_sent == cost.seconds == 0 and cost.collectives == () for cost in choice.costs)


def test_skew_makes_the_ragged_exchange_slower() -> None:
    topology = mo.Topology(dp=8)
    ids = torch.zeros(8, 512, 8, dtype=torch.int32) + torch.arange(8)  # all on rank 0
    skewed = count_copies(ids, num_experts=128)
    costs = [predict_costs(QWEN3, topology, 512, calibration=NOMINAL, copies=copies)[2] for copies in (None, skewed)]
    assert costs[0].bytes_sent > 4 * 512 * 4096 * 2
    assert costs[1].collectives[1].rows == 512 and costs[1].collectives[1].bytes_received == 7 * 512 * (2 * 4096 + 64)
    assert costs[1].seconds > costs[0].seconds


def test_topology_of_groups() -> None:
    groups = mo.ParallelGroups(tp=mo.Group("t", 2, 1), dp=mo.Group("d", 3, 0), ep=mo.Group("e", 6, 1))
    assert mo.Topology.from_groups(groups) == mo.Topology(tp=2, dp=3)
    with pytest.raises(ValueError, match=r"Topology.from_groups: ep must have DP \* PCP \* TP = 6 ranks, got 1"):
        mo.Topology.from_groups(groups._replace(ep=mo.Group.single()))


def predict(**changes: int) -> Callable[[], object]:
    return lambda: predict_costs(QWEN3._replace(**changes), mo.Topology(dp=4), 8, calibration=NOMINAL)


def predict_copies(sent: list[int]) -> Callable[[], object]:
    copies = RowCopies(sent, sent)
    return lambda: predict_costs(QWEN3, mo.Topology(dp=4), 8, calibration=NOMINAL, copies=copies)


def by_device(**changes: int) -> Callable[[], object]:
    sizes = {"num_tokens": 1, "capacity": 1, "num_experts": 8, "top_k": 2, "ep_size": 2, "world_size": 2}
    return lambda: select_by_device(A3, **(sizes | changes))


BROKEN = mo.Calibration.uniform(latency=0, bandwidth=0)
ERRORS = {
    "predict_costs: hidden_size must be at least 1, got 0": predict(hidden_size=0),
    "predict_costs: top_k must be at most num_experts = 128, got 129": predict(top_k=129),
    "predict_costs: num_experts must be a multiple of EP = 4, got 130": predict(num_experts=130),
    "predict_costs: tp must be at least 1, got 0": lambda: predict_costs(
        QWEN3, mo.Topology(tp=0), 8, calibration=NOMINAL
    ),
    "predict_costs: num_tokens must be at least 0, got -1": lambda: mo.select_strategy(
        QWEN3, mo.Topology(), -1, calibration=NOMINAL
    ),
    "predict_costs: calibration.all_gather must have latency >= 0 and bandwidth > 0": lambda: predict_costs(
        QWEN3, mo.Topology(), 1, calibration=BROKEN
    ),
    r"predict_costs: copies must be of EP = 4 ranks, got \(2, 2\)": predict_copies([1, 1]),
    "predict_costs: copies must be at most 8 rows to each of 3 ranks, got 25": predict_copies([1, 1, 25, 1]),
    "select_by_device: ep_size must be at least 1, got 0": by_device(ep_size=0),
    "select_by_device: capacity must be at least 0, got -1": by_device(capacity=-1),
    "mc2_capacity: device must be one with MC2, got ASCEND_310P": lambda: mc2_capacity(P310, 1, tp_size=1),
    "mc2_capacity: num_tokens must be at least 0, got -1": lambda: mc2_capacity(A2, -1, tp_size=1),
    "mc2_capacity: tp_size must be at least 1, got 0": lambda: mc2_capacity(A2, 1, tp_size=0),
    "count_copies: num_experts must be a multiple of EP = 3, got 8": lambda: count_copies(
        torch.zeros(3, 1, 1, dtype=torch.int32), num_experts=8
    ),
    "measure_load: num_experts must be a multiple of EP = 3, got 8": lambda: measure_load(
        torch.zeros(1, 1, dtype=torch.int32), num_experts=8, ep_size=3
    ),
    r"draw_topk_ids: top_k must be in \[1, num_experts = 4\], got 5": lambda: draw_topk_ids(1, num_experts=4, top_k=5),
    "draw_topk_ids: exponent must be at least 0, got -1": lambda: draw_topk_ids(1, num_experts=4, top_k=2, exponent=-1),
    "calibrate: group must have 2 ranks or more, got 1": lambda: mo.calibrate(mo.Group.single()),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()


def calibrate_once(rank: int) -> mo.Calibration:
    return mo.calibrate(groups_of(2, 1, 1).ep, sizes=(1 << 10, 1 << 18), rounds=3)


def test_all_ranks_measure_the_same(ranks2: RankPool) -> None:
    first, second = ranks2.run(calibrate_once)
    assert first == second
    for link in first:
        assert 0 <= link.latency < 1 and 1e5 < link.bandwidth < 1e13


@given(st.floats(0, 1e-2), st.floats(1e3, 1e12))
@settings(max_examples=50)
def test_a_link_is_found_again(latency: float, bandwidth: float) -> None:
    sizes = 4096, 4194304
    found = fit_link(sizes, (latency + sizes[0] / bandwidth, latency + sizes[1] / bandwidth))
    assert found.latency == pytest.approx(latency, rel=1e-6, abs=1e-6)
    if sizes[1] / bandwidth > 1e-6 * latency:
        assert found.bandwidth == pytest.approx(bandwidth, rel=1e-3)


def test_a_link_that_is_too_fast_to_see() -> None:
    assert fit_link((10, 1000), (0.5, 0.5)) == (0.5 - 10 * 0.5 / 1000, 2000.0)
    assert fit_link((10, 1000), (0.001, 0.5)).latency == 0
