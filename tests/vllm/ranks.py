"""A pool of processes that have imported vLLM once, and run one job after the other."""

import multiprocessing
import os
import socket
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any

from moe_ops.demo_vllm.environment import ENVIRONMENT, IN_PROCESS

from .engines import Job, Result, run_job

TIMEOUT = 240.0  # seconds of one job


class EnginePool:
    """Ranks that make engines together: `run` returns what each of them made of a job."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, job: Job) -> list[Result]:
        if not self.processes:
            self._start()
        port = _free_port()
        pipes = self.pipes[: job.world_size]
        for rank, pipe in enumerate(pipes):
            pipe.send((job, rank, port))
        results: dict[int, Result] = {}
        while len(results) < job.world_size:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = wait(waiting, TIMEOUT)
            try:
                if not ready:
                    raise RuntimeError(f"no answer of ranks {set(range(job.world_size)) - set(results)} to {job}")
                for pipe in ready:
                    rank = pipes.index(pipe)
                    result = pipe.recv()
                    if isinstance(result, str):
                        raise RuntimeError(f"rank {rank}:\n{result}")
                    results[rank] = result
            except (RuntimeError, EOFError):
                self.stop()  # the other ranks wait for the one that failed
                raise
        return [results[rank] for rank in range(job.world_size)]

    def _start(self) -> None:
        os.environ.update(ENVIRONMENT | IN_PROCESS)
        context = multiprocessing.get_context("spawn")
        for _ in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there,), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def _work(pipe: Connection) -> None:
    while True:
        try:
            job, rank, port = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(run_job(job, rank, port))
        except Exception:
            pipe.send(traceback.format_exc())


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
