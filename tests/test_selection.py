"""Which strategy: the choice by cost."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import moe_ops as mo
from moe_ops import Dispatch, Quant, Strategy
from moe_ops.costs import FORMS

NOMINAL = mo.Calibration.uniform(latency=20e-6, bandwidth=50e9)
QWEN3 = mo.LayerShape(hidden_size=4096, num_experts=128, top_k=8)

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


def test_one_rank_sends_nothing_and_gathers() -> None:
    choice = mo.select_strategy(QWEN3, mo.Topology(), 100, calibration=NOMINAL)
    assert choice.strategy is Strategy.ALLGATHER
    assert all(cost.bytes_sent == cost.seconds == 0 and cost.collectives == () for cost in choice.costs)


def test_errors() -> None:
    with pytest.raises(ValueError, match="predict_costs: num_tokens must be at least 0, got -1"):
        mo.select_strategy(QWEN3, mo.Topology(), -1, calibration=NOMINAL)
