"""A contest: entries that compute the same layer run in turn in the same processes.

An entry is a way to compute the layer, in one or more modes; a mode of an entry is a contestant.
"""

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import moe_ops as mo
from benchmarks.layer import Batch, Weights, expected_of, make_batch, make_weights
from benchmarks.timing import Timing, compare, slowest
from moe_ops.traffic import Traffic, count_traffic

EAGER, COMPILED, KERNEL = "eager", "compiled", "kernel"
MODES = (EAGER, COMPILED, KERNEL)
"""In the order in which they run: the modes of an entry are not neighbours, which would warm the caches for each other."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
CALLS = 8  # of a batch of one token; fewer where a call takes longer


class Implementation(NamedTuple):
    """What is timed, and what brings a batch into the layout of its arguments (which is not)."""

    call: Callable[..., torch.Tensor]
    arrange: Callable[[Batch], Sequence[Any]]


@dataclass(frozen=True)
class Entry:
    """One way to compute the layer.

    Attributes:
        name: as the tables show it.
        build: makes it of weights (its own copy) for one rank of a group.
        requires: the package that it needs.
        modes: one call of a kernel (KERNEL) is not compiled.
        is_ours: whether it is this library's.
        dtype: what it computes in; None: what the batch has.
    """

    name: str
    build: Callable[[Weights, mo.Group], Implementation]
    requires: str = "moe_ops"
    modes: tuple[str, ...] = (EAGER, COMPILED)
    is_ours: bool = False
    dtype: torch.dtype | None = None

    @property
    def is_available(self) -> bool:
        return importlib.util.find_spec(self.requires) is not None

    def contestants(self) -> dict[str, str]:
        """Names and modes."""
        return {self.name if mode == KERNEL else f"{self.name} {mode}": mode for mode in self.modes}


class Answer(NamedTuple):
    """What one rank found, by contestant; what could not be compiled is left out of the rest.

    Attributes:
        failures: the first line of the error.
        graphs: compiled for all batches.
        timings: by tokens.
        traffic: by tokens.
    """

    failures: dict[str, str]
    graphs: dict[str, int]
    timings: dict[int, dict[str, Timing]]
    traffic: dict[int, dict[str, Traffic]]


def merge(answers: Sequence[Answer]) -> Answer:
    """What is largest of any rank."""
    first = answers[0]
    graphs = {name: max(answer.graphs[name] for answer in answers) for name in first.graphs}
    timings = {tokens: slowest([answer.timings[tokens] for answer in answers]) for tokens in first.timings}
    traffic = {
        tokens: {
            name: Traffic(*map(max, zip(*(a.traffic[tokens][name] for a in answers), strict=True))) for name in found
        }
        for tokens, found in first.traffic.items()
    }
    return Answer(first.failures, graphs, timings, traffic)


def measure(
    group: mo.Group, entries: Sequence[Entry], dtype: torch.dtype, tokens: Sequence[int], rounds: int
) -> Answer:
    """On one rank: check the values of every contestant, count its graphs and what it sends, then time them in turn."""
    answer = Answer({}, {}, {count: {} for count in tokens}, {count: {} for count in tokens})
    with torch.no_grad():
        calls = _prepare(group, entries, dtype, tokens, answer)
        for count, variants in calls.items():
            if group.size > 1:
                for name, call in variants.items():
                    dist.barrier()
                    answer.traffic[count][name] = count_traffic(call)
            answer.timings[count].update(compare(variants, rounds=rounds, calls=max(1, CALLS // count)))
    return answer


def profile(
    group: mo.Group, entries: Sequence[Entry], dtype: torch.dtype, tokens: int, names: Sequence[str], calls: int
) -> dict[str, dict[str, float]]:
    """On one rank: seconds that each op itself takes in a call of the contestants, medians over `calls` calls in turn."""
    chosen = [entry for entry in entries if set(entry.contestants()) & set(names)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with torch.no_grad():
        variants = _prepare(group, chosen, dtype, (tokens,), Answer({}, {}, {}, {}))[tokens]
        for _ in range(calls):
            for name in names:
                variants[name]()  # the first call under a profiler, and after a pause, is slower
                dist.barrier()
                found[name].append(profile_call(variants[name]))
    return {name: _medians(profiles) for name, profiles in found.items()}


def _prepare(
    group: mo.Group, entries: Sequence[Entry], dtype: torch.dtype, tokens: Sequence[int], answer: Answer
) -> dict[int, dict[str, Callable[[], torch.Tensor]]]:
    """The calls by tokens and contestant, each called once, and its values checked."""
    torch._dynamo.reset()
    weights = make_weights(dtype)
    batches = {count: make_batch(dtype, count, group.rank) for count in tokens}
    expected = {count: expected_of(batch, weights) for count, batch in batches.items()}
    calls: dict[int, dict[str, Callable[[], torch.Tensor]]] = {count: {} for count in tokens}
    built: dict[str, Implementation] = {}
    for mode in MODES:
        for entry in entries:
            for name in (name for name, its in entry.contestants().items() if its == mode):
                if entry.name not in built:
                    built[entry.name] = entry.build(weights.clone(), group)
                function, arrange = built[entry.name]
                if mode == COMPILED:  # with no entries in common in Dynamo's cache, which is searched in each call
                    function = torch.compile(function, fullgraph=True, isolate_recompiles=True)
                sweep = {count: partial(function, *arrange(batch.clone())) for count, batch in batches.items()}
                if _check(name, sweep, expected, TOLERANCE[entry.dtype or dtype], answer):
                    for count, call in sweep.items():
                        calls[count][name] = call
    return calls


def _check(
    name: str,
    sweep: dict[int, Callable[[], torch.Tensor]],
    expected: dict[int, torch.Tensor],
    tolerance: float,
    answer: Answer,
) -> bool:
    """Whether it compiles for all batches; its graphs.

    Raises:
        AssertionError: a row differs from what is expected by more than the tolerance.
    """
    torch._dynamo.utils.counters.clear()
    for count, call in sweep.items():
        try:
            result = call()
        except torch._dynamo.exc.TorchDynamoException as error:
            answer.failures[name] = str(error).strip().splitlines()[0]
            return False
        error = ((result - expected[count]).norm(dim=1) / expected[count].norm(dim=1)).max().item()
        if not error <= tolerance:
            raise AssertionError(
                f"{name}: rows must be within {tolerance} of the expected, got {error:.2g} at T={count}"
            )
    answer.graphs[name] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return True


def profile_call(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds that each op itself takes in the call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        call()
    return {event.key: event.self_cpu_time_total * 1e-6 for event in recorded.key_averages()}


def _medians(profiles: list[dict[str, float]]) -> dict[str, float]:
    ops = dict.fromkeys(op for profile in profiles for op in profile)
    return {op: statistics.median(profile.get(op, 0.0) for profile in profiles) for op in ops}
