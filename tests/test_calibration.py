"""The calibration: what it fits, and that all ranks return the same."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings

import moe_ops as mo
from moe_ops.calibration import _largest, _make_call, fit_link
from moe_ops.cost_types import CollectiveKind
from moe_ops.traffic import count_traffic

from .ranks import RankPool, groups_of


def calibrate_once(rank: int) -> mo.Calibration:
    return mo.calibrate(groups_of(2, 1, 1).ep, sizes=(1 << 10, 1 << 18), rounds=3)


@pytest.mark.slow
def test_all_ranks_measure_the_same(ranks2: RankPool) -> None:
    first, second = ranks2.run(calibrate_once)
    assert first == second
    for link in first:
        assert 0 <= link.latency < 1 and 1e5 < link.bandwidth < 1e13


def sent_by_call(rank: int, kind: CollectiveKind, num_bytes: int) -> int:
    call = _make_call(kind, num_bytes, groups_of(2, 1, 1).ep, torch.device("cpu"))

    def call_and_meet() -> None:
        call()
        dist.barrier()  # what the other has received, this rank has sent

    dist.barrier()
    return count_traffic(call_and_meet).bytes_sent


def largest_of_ranks(rank: int) -> float:
    return _largest(float(rank + 2), groups_of(2, 1, 1).ep, torch.device("cpu"))


def test_the_time_is_that_of_the_slowest_rank(ranks2: RankPool) -> None:
    assert ranks2.run(largest_of_ranks) == [3.0, 3.0]


@pytest.mark.parametrize("kind", CollectiveKind, ids=lambda kind: kind.value)
def test_what_is_timed_sends_the_bytes_that_the_model_counts(ranks2: RankPool, kind: CollectiveKind) -> None:
    factor = 2 if kind is CollectiveKind.REDUCE_SCATTER else 1  # gloo's is an all-reduce
    assert ranks2.run(sent_by_call, kind, 1 << 20) == [pytest.approx(factor << 20, rel=0.02)] * 2


def run_what_is_chosen(rank: int) -> tuple[str, torch.Tensor]:
    groups = groups_of(2, 1, 1)
    calibration = mo.calibrate(groups.ep, sizes=(1 << 10, 1 << 16), rounds=1)
    layer, topology = mo.LayerShape(8, 4, 2, dtype=torch.float32), mo.Topology.from_groups(groups)
    choice = mo.select_strategy(layer, topology, 5, calibration=calibration, must_be_capturable=True)
    weights = torch.ones(2, 4, 8) / 8, torch.ones(2, 8, 2)
    y = mo.moe_stage(
        torch.ones(5, 8),
        torch.ones(5, 4),
        mo.ExpertWeights(*weights),
        mo.Routing(top_k=2, num_experts=4),
        mo.Layout(choice.strategy, groups, choice.dispatch),
        lengths=mo.Lengths(equal=True),
    )
    return choice.reason, y


def test_the_stage_runs_as_chosen(ranks2: RankPool) -> None:
    (reason, first), (other_reason, second) = ranks2.run(run_what_is_chosen)
    assert reason == other_reason  # to the last digit
    torch.testing.assert_close(
        first, torch.full((5, 8), 2 / (1 + math.exp(-1)))
    )  # two units of silu(1) * 1, weights of 1
    torch.testing.assert_close(first, second)


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


ERRORS = {
    "calibrate: group must have 2 ranks or more, got 1": lambda: mo.calibrate(mo.Group.single()),
    r"calibrate: sizes must be a small and a large number of bytes, got \(8, 8\)": lambda: mo.calibrate(
        mo.Group("none", 2, 0), sizes=(8, 8)
    ),
    "calibrate: rounds must be at least 1, got 0": lambda: mo.calibrate(mo.Group("none", 2, 0), rounds=0),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()


def test_a_group_that_is_none() -> None:
    with pytest.raises(RuntimeError, match="calibrate: the group must name an initialised process group, got 'none'"):
        mo.calibrate(mo.Group("none", 2, 0))
