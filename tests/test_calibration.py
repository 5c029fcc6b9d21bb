"""The calibration: what it fits, and that all ranks return the same."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import moe_ops as mo
from moe_ops.calibration import fit_link

from .ranks import RankPool, groups_of


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
