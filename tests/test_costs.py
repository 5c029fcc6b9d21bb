"""The cost model: its arithmetic, and the bytes that it counts against what ranks really send."""

import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given

import moe_ops as mo
from moe_ops import Quant
from moe_ops.cost_types import CollectiveKind, FormCost, RowCopies
from moe_ops.costs import COSTS, FORMS, expected_copies, payload_bytes, predict_costs, result_bytes
from moe_ops.load import count_copies
from moe_ops.route import route
from moe_ops.strategies import STRATEGIES, strategy_of
from moe_ops.traffic import count_traffic

from .ranks import RankPool, groups_of

NOMINAL = mo.Calibration.uniform(latency=20e-6, bandwidth=50e9)
QWEN3 = mo.LayerShape(hidden_size=4096, num_experts=128, top_k=8)


@pytest.mark.parametrize(("ep", "copies"), [(2, 1.0), (4, 2.7), (8, 4.6), (16, 6.1), (32, 7.0), (64, 7.6)])
def test_expected_copies(ep: int, copies: float) -> None:
    assert round(expected_copies(num_experts=256, top_k=8, ep_size=ep), 1) == copies


def test_every_form_of_the_stage_has_a_cost() -> None:
    assert set(COSTS) == set(STRATEGIES)
    two = mo.Group("ep", 2, 0)
    for strategy in mo.Strategy:
        for dispatch in mo.Dispatch:
            layout = mo.Layout(strategy, mo.ParallelGroups(dp=two, ep=two), dispatch)
            if (strategy, dispatch) in FORMS:
                strategy_of("test", layout)
            else:
                with pytest.raises(ValueError, match="dispatch must be"):
                    strategy_of("test", layout)
    # Equal costs go to the first: a strategy by its own dispatch.
    assert {form[0] for form in FORMS[: len(STRATEGIES)]} == set(STRATEGIES)
    assert all(STRATEGIES[strategy].dispatches[0] is dispatch for strategy, dispatch in FORMS[: len(STRATEGIES)])


# What ranks really send. gloo's all-gather, all-reduce and all-to-all send what the model counts, its reduce-scatter twice as
# much: that of an all-reduce.
GLOO_FACTOR = {kind: 2 if kind is CollectiveKind.REDUCE_SCATTER else 1 for kind in CollectiveKind}
H, E, K, T = 1024, 8, 2, 510
Shape = tuple[int, int, int]
"""[DP, PCP, TP]"""
KINDS = [
    (torch.bfloat16, Quant.NONE),
    (torch.bfloat16, Quant.W8A8),
    (torch.bfloat16, Quant.MXFP4),
    (torch.float16, Quant.NONE),
    (torch.float16, Quant.MXFP8),
]
"""Of the tokens. Results of float16 travel in float32."""


def logits_of(owner: int, num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, E, generator=torch.Generator().manual_seed(owner))


def tokens_at(ranks: int, shape: Shape, is_sharded: bool) -> tuple[list[int], int]:
    """Whose tokens each EP rank brings, and how many these are."""
    tp = shape[2]
    return [rank if is_sharded else rank // tp for rank in range(ranks)], -(-T // tp) if is_sharded else T


def sent_by_stage(rank: int, shape: Shape, form: tuple, is_sharded: bool, dtype: torch.dtype, quant: Quant) -> int:
    groups = groups_of(*shape)
    owners, count = tokens_at(groups.ep.size, shape, is_sharded)
    weights = torch.zeros(E // groups.ep.size, 8, H), torch.zeros(E // groups.ep.size, H, 4)
    experts = mo.ExpertWeights(*(weight.to(dtype) for weight in weights))
    layout = mo.Layout(form[0], groups, form[1], tokens_are_sharded=is_sharded)

    def call() -> None:
        mo.moe_stage(
            torch.ones(count, H, dtype=dtype),
            logits_of(owners[rank], count),
            experts,
            mo.Routing(top_k=K, num_experts=E),
            layout,
            lengths=mo.Lengths(longest=count),
            quant=quant,
            reduce_results=True,
        )
        dist.barrier()  # what the others have received, this rank has sent: nothing is still in a socket

    dist.barrier()
    return count_traffic(call).bytes_sent


def copies_of_stage(ranks: int, shape: Shape, is_sharded: bool) -> RowCopies:
    owners, count = tokens_at(ranks, shape, is_sharded)
    ids, tp, rows = [], shape[2], -(-T // shape[2])
    for rank, owner in enumerate(owners):
        whole = route(logits_of(owner, count), mo.Routing(top_k=K, num_experts=E))[1]
        ids.append(whole if is_sharded else whole[rows * (rank % tp) : rows * (rank % tp + 1)])
    return count_copies(ids, num_experts=E)


def as_gloo_sends(cost: FormCost) -> float:
    extra = sum(one.bytes_sent * (GLOO_FACTOR[one.kind] - 1) for one in cost.collectives)
    return cost.bytes_sent + extra


def check_bytes(pool: RankPool, shape: Shape, is_sharded: bool, dtype: torch.dtype, quant: Quant) -> None:
    dp, pcp, tp = shape
    costs = predict_costs(
        mo.LayerShape(H, E, K, dtype=dtype, quant=quant),
        mo.Topology(tp=tp, dp=dp, pcp=pcp),
        T,
        calibration=NOMINAL,
        tokens_are_sharded=is_sharded,
        copies=copies_of_stage(dp * pcp * tp, shape, is_sharded),
    )
    for cost in costs:
        form = cost.strategy, cost.dispatch
        sent = max(pool.run(sent_by_stage, shape, form, is_sharded, dtype, quant))
        assert sent == pytest.approx(as_gloo_sends(cost), rel=0.02), (form, cost)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "quant"), KINDS, ids=lambda value: getattr(value, "value", str(value)))
@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 2)], ids=["dp2", "tp2"])
def test_bytes_on_two_ranks(ranks2: RankPool, shape: Shape, is_sharded: bool, dtype: torch.dtype, quant: Quant) -> None:
    check_bytes(ranks2, shape, is_sharded, dtype, quant)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("shape", [(2, 1, 2), (2, 2, 1)], ids=["dp2-tp2", "dp2-pcp2"])
def test_bytes_on_four_ranks(ranks4: RankPool, shape: Shape, is_sharded: bool, dtype: torch.dtype) -> None:
    check_bytes(ranks4, shape, is_sharded, dtype, Quant.NONE)


@pytest.mark.parametrize("quant", [quant for quant in Quant if quant is not Quant.NONE], ids=lambda quant: quant.value)
@pytest.mark.parametrize("width", [64, 65, 97])
def test_payload_bytes_are_those_of_quantised_rows(quant: Quant, width: int) -> None:
    tensors = mo.quantize_activations(torch.randn(3, width), quant=quant)
    assert 3 * payload_bytes(mo.LayerShape(width, 8, 2, quant=quant)) == sum(tensor.nbytes for tensor in tensors)
    assert payload_bytes(mo.LayerShape(width, 8, 2, dtype=torch.float32)) == 4 * width


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float16, 4), (torch.float32, 4)], ids=str)
def test_results_of_float16_travel_in_float32(dtype: torch.dtype, size: int) -> None:
    assert result_bytes(mo.LayerShape(65, 8, 2, dtype=dtype)) == 65 * size


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


BROKEN = mo.Calibration.uniform(latency=0, bandwidth=0)
ERRORS = {
    "predict_costs: hidden_size must be at least 1, got 0": predict(hidden_size=0),
    "predict_costs: top_k must be at most num_experts = 128, got 129": predict(top_k=129),
    "predict_costs: num_experts must be a multiple of EP = 4, got 130": predict(num_experts=130),
    "predict_costs: tp must be at least 1, got 0": lambda: predict_costs(
        QWEN3, mo.Topology(tp=0), 8, calibration=NOMINAL
    ),
    "predict_costs: num_tokens must be at least 0, got -1": lambda: predict_costs(
        QWEN3, mo.Topology(), -1, calibration=NOMINAL
    ),
    "predict_costs: calibration.all_gather must have latency >= 0 and bandwidth > 0": lambda: predict_costs(
        QWEN3, mo.Topology(), 1, calibration=BROKEN
    ),
    r"predict_costs: copies must be of EP = 4 ranks, got \(2, 2\)": predict_copies([1, 1]),
    "predict_costs: copies must be at most 8 rows to each of 3 ranks, got 25": predict_copies([1, 1, 25, 1]),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()
