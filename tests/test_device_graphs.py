"""The stage in CUDA graphs on one GPU: what a replay computes is what eager mode computes.

Without quantised activations, whose products are float32 there: torch's way for them reads the groups on the host.
"""

import pytest
import torch

import moe_ops as mo

from .device_graphs import BUCKETS, FORMS, capture, capture_buckets, draw, make_buffers, make_stage, warm_up

DEVICE, GROUPS = "cuda", mo.ParallelGroups()
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {"rtol": 2.0**-7, "atol": 2.0**-7}  # products may be summed in another order


@pytest.mark.parametrize("form", FORMS)
def test_replay_equals_eager(form: str) -> None:
    stage = make_stage(FORMS[form], GROUPS, DEVICE)
    graphs = capture_buckets(FORMS[form], GROUPS, DEVICE)
    addresses = {bucket: captured.output.data_ptr() for bucket, (_, captured) in graphs.items()}
    for seed, count in enumerate([8, 3, 20, 0, 16, 32]):
        bucket = min(size for size in BUCKETS if size >= count)
        buffers, captured = graphs[bucket]
        buffers.write(*draw(count, seed))
        captured.output.fill_(torch.nan)  # each replay writes all of it
        captured.graph.replay()
        torch.testing.assert_close(captured.output, stage(*buffers), **TOLERANCE)
        assert captured.output.data_ptr() == addresses[bucket]
        if FORMS[form].shared is None:
            assert not captured.output[count:].any()
            assert bool(captured.output[:count].any(dim=1).all())


@pytest.mark.parametrize("form", ["mc2", "allgather"])
def test_interleaved_micro_batches(form: str) -> None:
    stage = make_stage(FORMS[form], GROUPS, DEVICE)
    steps = make_stage(FORMS[form], GROUPS, DEVICE, run=mo.moe_stage_steps)
    halves = [make_buffers(num_tokens, FORMS[form], GROUPS, DEVICE) for num_tokens in (16, 8)]

    def run() -> list[torch.Tensor]:
        return mo.interleave(*(steps(*half) for half in halves))

    warm_up(run, DEVICE)
    captured = capture(run, DEVICE)
    for seed in range(3):
        for half in halves:
            half.write(*draw(half.num_tokens - seed, seed))
        captured.graph.replay()
        for half, output in zip(halves, captured.output, strict=True):
            torch.testing.assert_close(output, stage(*half), **TOLERANCE)
