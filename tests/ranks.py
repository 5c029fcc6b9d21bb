"""A pool of real gloo ranks that tests share: starting processes costs seconds, handing them a call milliseconds."""

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import moe_ops as mo

TIMEOUT_SECONDS = 120
_groups: dict[tuple[int, int, int], mo.ParallelGroups] = {}


def groups_of(dp: int, pcp: int, tp: int) -> mo.ParallelGroups:
    """The groups of this rank in a [DP, PCP, TP] layout of all ranks, made once. A collective call."""
    if (dp, pcp, tp) not in _groups:
        mesh = dist.init_device_mesh("cpu", (dp, pcp, tp), mesh_dim_names=("dp", "pcp", "tp"))
        _groups[dp, pcp, tp] = mo.ParallelGroups.from_device_mesh(mesh)
    return _groups[dp, pcp, tp]


def coordinates(rank: int, pcp: int, tp: int) -> tuple[int, int, int]:
    """(d, p, t) of an EP rank, by the specification: rank = (d * PCP + p) * TP + t."""
    return rank // (pcp * tp), rank // tp % pcp, rank % tp


def _serve(rank: int, size: int, store: str, calls: Connection) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout)
    while True:
        call = calls.recv()
        if call is None:
            break
        function, arguments = call
        try:
            calls.send((function(rank, *arguments), None))
        except Exception:
            calls.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class RankPool:
    """Ranks that wait for calls. A call that fails on any rank ends them, since others may wait; the next starts anew."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self._folder = folder
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call ``function(rank, *arguments)`` on every rank and return the results in rank order."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            if errors and not pipe.poll(5):  # it waits for the rank that failed
                errors.append(f"rank {rank}: no answer")
                continue
            if not pipe.poll(2 * TIMEOUT_SECONDS):
                errors.append(f"rank {rank}: hung")
                continue
            result, error = pipe.recv()
            results.append(result)
            if error:
                errors.append(f"rank {rank}: {error}")
        if errors:
            self.close()
            raise AssertionError("\n".join(errors))
        return results

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = self._folder / f"store{len(list(self._folder.iterdir()))}"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, str(store), theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        self._pipes, self._processes = [], []


def pool_of_ranks(size: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """For a fixture that lends a pool to many tests."""
    pool = RankPool(size, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
