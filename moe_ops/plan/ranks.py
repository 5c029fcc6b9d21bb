"""A calibration on this machine: gloo ranks that talk over the loopback interface."""

import os
import tempfile
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

from moe_ops.calibration import calibrate
from moe_ops.cost_types import Calibration
from moe_ops.groups import Group

TIMEOUT = timedelta(seconds=60)


class Sink(Protocol):
    """The sending end of a queue."""

    def put(self, calibration: Calibration, /) -> None:
        """Send it."""


def calibrate_here(num_ranks: int) -> Calibration:
    """Start gloo ranks and measure.

    Raises:
        torch.multiprocessing.ProcessException: a rank failed.
    """
    sink = get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        spawn(_run_rank, (num_ranks, os.path.join(folder, "store"), sink), nprocs=num_ranks)
    calibration: Calibration = sink.get()
    return calibration


def _run_rank(rank: int, num_ranks: int, store: str, sink: Sink) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=TIMEOUT)
    calibration = calibrate(Group.from_process_group(dist.group.WORLD))
    if rank == 0:
        sink.put(calibration)
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()
