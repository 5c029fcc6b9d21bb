"""Processes that stay: real gloo ranks, or one rank of a world that is only pretended."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import moe_ops as mo

TIMEOUT = timedelta(seconds=120)
"""A rank waits no longer for another; compiling may hold one up."""

Result = TypeVar("Result")


class Ranks:
    """One thread a process. `size` gloo ranks, or with `is_fake` rank 0 of a world whose collectives send nothing."""

    def __init__(self, size: int, *, is_fake: bool = False) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler prints no notices
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        context = multiprocessing.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory()
        store = str(Path(self._directory.name) / "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(1 if is_fake else size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, is_fake, store), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Result], *arguments: Any) -> list[Result]:
        """Call ``function(group, *arguments)`` on every rank, with the group of all of them; the results in rank order.

        Raises:
            RuntimeError: a rank raised; its traceback is the message.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [self._receive(rank) for rank in range(len(self._pipes))]
        failures = [answer for is_ok, answer in answers if not is_ok]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [answer for _, answer in answers]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            answer: tuple[bool, Any] = self._pipes[rank].recv()
        except EOFError:
            self._processes[rank].join(timeout=5)
            return False, f"rank {rank} ended with exit code {self._processes[rank].exitcode}"
        return answer

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # else a rank may still wait for one that failed
            for pipe in self._pipes:
                pipe.send(None)
        for process in self._processes:
            process.join(timeout=20 if error is None else 0)
            process.kill()
            process.join()
        self._directory.cleanup()


def _serve(pipe: Connection, rank: int, size: int, is_fake: bool, store: str) -> None:
    torch.set_num_threads(1)
    if is_fake:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    else:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT)
    group = mo.Group.from_process_group(dist.group.WORLD)
    while (work := pipe.recv()) is not None:
        function, arguments = work
        try:
            pipe.send((True, function(group, *arguments)))
        except Exception:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()
