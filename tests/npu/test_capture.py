"""The stage in device graphs that a server captures itself (torch.npu.graph), over the stand-in for CANN.

It shows that nothing in a capture waits for the device, and that what is launched is what eager mode launches: not results.
Rank 5 of 8, in (DP, TP) = (4, 2), and in (DP, PCP, TP) = (2, 2, 2).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import moe_ops as mo
from moe_ops.dispatchers.all_to_all import NotCapturableError
from tests.device_graphs import (
    BUCKETS,
    FORMS,
    MC2,
    QUANTISED_FORMS,
    WARM_UPS,
    Form,
    capture,
    capture_buckets,
    draw,
    make_buffers,
    make_stage,
    warm_up,
)

RANK = 5
# Of float32 rows, which the fused ops do not take: the portable exchange, which also serves older chips.
PORTABLE_FORMS = {"mc2-portable": Form(MC2, dtype=torch.float32)}
ALL_FORMS = FORMS | QUANTISED_FORMS | PORTABLE_FORMS
LAYOUTS = {"pcp1": ((4, 2), ("dp", "tp")), "pcp2": ((2, 2, 2), ("dp", "pcp", "tp"))}

GATHER, SCATTER, REDUCE, EXCHANGE = "HcclAllGather", "HcclReduceScatter", "HcclAllReduce", "HcclAlltoAllV"
DISPATCH, COMBINE = "aclnnMoeDistributeDispatchV4", "aclnnMoeDistributeCombineV4"
FUSED = [DISPATCH, COMBINE, GATHER]  # and the chunks of the TP ranks are gathered
COMMUNICATION = {
    "mc2": FUSED,
    "mc2-w8a8": FUSED,
    "mc2-given": FUSED,
    "mc2-shared": [*FUSED, REDUCE],
    "mc2-sharded-tokens": [DISPATCH, COMBINE],
    "mc2-portable": [EXCHANGE, EXCHANGE, GATHER],
    "all2all": FUSED,
    "all2all-w8a8": [*FUSED, REDUCE],
    "allgather": [GATHER, SCATTER, REDUCE],
    "allgather-w8a8": [GATHER, SCATTER, REDUCE],
    "allgather-shared": [GATHER, SCATTER, REDUCE],
    "allgather-overlap-gate": [GATHER, GATHER, SCATTER, REDUCE],
    "allgather-ep-even": [GATHER, SCATTER],
    "allgather-ep-ragged": [GATHER, SCATTER],
    "allgather-ep-w8a8": [GATHER, SCATTER],
    "allgather-ep-shared": [GATHER, SCATTER],
}
WITH_PCP = {  # which gathers and scatters once more
    "allgather": [GATHER, GATHER, SCATTER, SCATTER, REDUCE],
    "allgather-w8a8": [GATHER, GATHER, SCATTER, SCATTER, REDUCE],
    "allgather-shared": [GATHER, GATHER, SCATTER, SCATTER, REDUCE],
    "allgather-overlap-gate": [GATHER, GATHER, GATHER, GATHER, SCATTER, SCATTER, REDUCE],
}


@pytest.fixture
def groups(hccl_groups: Callable[..., Any]) -> Callable[[str], mo.ParallelGroups]:
    def make(layout: str = "pcp1") -> mo.ParallelGroups:
        hccl_groups(rank=RANK, sizes=())
        sizes, names = LAYOUTS[layout]
        return mo.ParallelGroups.from_device_mesh(dist.init_device_mesh("npu", sizes, mesh_dim_names=names))

    return make


def communication(launches: list[str]) -> list[str]:
    return [launch for launch in launches if launch.startswith("Hccl") or "Distribute" in launch]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ALL_FORMS)
def test_captured_is_what_eager_mode_launches(groups, stand_in, form, layout):
    own, refusals = groups(layout), stand_in.refusals
    stage = make_stage(ALL_FORMS[form], own, "npu")
    expected = COMMUNICATION[form] if layout == "pcp1" else WITH_PCP.get(form, COMMUNICATION[form])
    for num_tokens in BUCKETS:
        buffers = make_buffers(num_tokens, ALL_FORMS[form], own, "npu")
        eager = stand_in.launches_during(lambda buffers=buffers: stage(*buffers))
        assert communication(eager) == expected
        warmed = stand_in.launches_during(lambda buffers=buffers: warm_up(lambda: stage(*buffers), "npu"))
        assert warmed == WARM_UPS * eager
        assert stand_in.launches_during(lambda buffers=buffers: capture(lambda: stage(*buffers), "npu")) == eager
    assert stand_in.refusals == refusals


@pytest.mark.parametrize("form", ALL_FORMS)
def test_buckets_are_replayed(groups, stand_in, form):
    dtype = ALL_FORMS[form].dtype
    captures, replays = stand_in.captures, stand_in.replays
    graphs = capture_buckets(ALL_FORMS[form], groups(), "npu")
    assert (stand_in.captures - captures, stand_in.replays - replays) == (len(BUCKETS), 0)
    addresses = {bucket: captured.output.data_ptr() for bucket, (_, captured) in graphs.items()}
    assert len(set(addresses.values())) == len(BUCKETS)
    steps = [8, 3, 20, 0, 16, 32]
    for seed, count in enumerate(steps):
        bucket = min(size for size in BUCKETS if size >= count)
        buffers, captured = graphs[bucket]
        buffers.write(*draw(count, seed, dtype))
        assert stand_in.launches_during(captured.graph.replay) == []
        assert int(buffers.mask.cpu().sum()) == count
        assert captured.output.shape == (bucket, buffers.hidden_states.shape[1])
        assert captured.output.dtype is dtype
        assert captured.output.data_ptr() == addresses[bucket]
    assert stand_in.replays - replays == len(steps)


@pytest.mark.parametrize("form", ["mc2", "mc2-portable", "allgather", "allgather-ep-ragged"])
def test_interleaved_micro_batches(groups, stand_in, form):
    own = groups()
    steps = make_stage(ALL_FORMS[form], own, "npu", run=mo.moe_stage_steps)
    halves = [make_buffers(num_tokens, ALL_FORMS[form], own, "npu") for num_tokens in (16, 8)]

    def run() -> list[torch.Tensor]:
        return mo.interleave(*(steps(*half) for half in halves))

    eager, refusals = stand_in.launches_during(run), stand_in.refusals
    assert sorted(communication(eager)) == sorted(2 * COMMUNICATION[form])
    warm_up(run, "npu")
    captured = []
    assert stand_in.launches_during(lambda: captured.append(capture(run, "npu"))) == eager
    assert stand_in.refusals == refusals
    assert [output.shape[0] for output in captured[0].output] == [16, 8]
    replays = stand_in.replays
    captured[0].graph.replay()
    assert stand_in.replays == replays + 1


@pytest.mark.parametrize("strategy", [mo.Strategy.ALL2ALL, mo.Strategy.MC2])
def test_a_ragged_exchange_is_an_error(groups, stand_in, strategy):
    form, own = Form(strategy, mo.Dispatch.ALL_TO_ALL), groups()
    stage, buffers = make_stage(form, own, "npu"), make_buffers(8, form, own, "npu")
    refusals = stand_in.refusals
    with pytest.raises(NotCapturableError, match="FIXED_CAPACITY can"):
        capture(lambda: stage(*buffers), "npu")
    assert stand_in.refusals == refusals  # ours comes first
    capture(lambda: buffers.hidden_states + 1, "npu")  # and what comes next can be captured


def test_a_host_read_is_refused(groups, stand_in):
    """What the tests above would see, were one in the stage."""
    own = groups()
    stage, buffers = make_stage(FORMS["mc2"], own, "npu"), make_buffers(8, FORMS["mc2"], own, "npu")

    def run() -> torch.Tensor:
        return stage(*buffers) * buffers.mask.sum().item()

    warm_up(run, "npu")
    refusals = stand_in.refusals
    with pytest.raises(RuntimeError, match="107030"):
        capture(run, "npu")
    assert stand_in.refusals == refusals + 1
