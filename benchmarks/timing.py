"""Times of variants that run side by side: round by round, one after the other, in the same process."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.distributed as dist


class Timing(NamedTuple):
    """Seconds of one call: on the clock, and of this thread's CPU."""

    wall: float
    cpu: float


def compare(variants: Mapping[str, Callable[[], Any]], *, rounds: int, calls: int) -> dict[str, Timing]:
    """The median time of a call of each variant, over the batches of `time_in_turn`."""
    batches = time_in_turn(variants, rounds=rounds, calls=calls)
    return {name: median(timings) for name, timings in batches.items()}


def time_in_turn(variants: Mapping[str, Callable[[], Any]], *, rounds: int, calls: int) -> dict[str, list[Timing]]:
    """The time of a call of each variant in each of `rounds` batches of `calls` calls: A B C A B C ...

    In a process group, every rank calls it; the ranks meet before each batch.
    """
    for call in variants.values():  # twice: the first call allocates, compiles or connects
        call(), call()
    batches: dict[str, list[Timing]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            if dist.is_initialized():
                dist.barrier()
            batches[name].append(_time_batch(call, calls))
    return batches


def slowest(timings: list[dict[str, Timing]]) -> dict[str, Timing]:
    """Of what each rank measured, the largest."""
    return {
        name: Timing(max(rank[name].wall for rank in timings), max(rank[name].cpu for rank in timings))
        for name in timings[0]
    }


def _time_batch(call: Callable[[], Any], calls: int) -> Timing:
    wall, cpu = time.perf_counter(), time.thread_time()
    for _ in range(calls):
        call()
    return Timing((time.perf_counter() - wall) / calls, (time.thread_time() - cpu) / calls)


def median(timings: list[Timing]) -> Timing:
    """Of each kind of seconds by itself."""
    return Timing(statistics.median(t.wall for t in timings), statistics.median(t.cpu for t in timings))
