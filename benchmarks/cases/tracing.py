"""Tracing cost against the size of the world: nodes of the graph and time to trace, in fake process groups."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

import moe_ops as mo
from benchmarks.forms import ALL2ALL, ALLGATHER_DP, ALLGATHER_EP, ALLGATHER_EP_RAGGED, Form
from benchmarks.ranks import Ranks
from benchmarks.registry import Aim, Case, Chart, Effort, Table

TOKENS, FEWER = 9, 7  # of even and odd ranks, where they differ
HIDDEN, EXPERTS = 16, 6


class Subject(NamedTuple):
    """What is traced: a form, and where its ragged counts come from."""

    name: str
    form: Form
    counts: str = ""


CONSTANT = (
    Subject("ALLGATHER EP equal", ALLGATHER_EP),
    Subject("ALLGATHER EP ragged, counts in the code", ALLGATHER_EP_RAGGED, "code"),
    Subject("ALLGATHER DP", ALLGATHER_DP),
    Subject("ALL2ALL, TP", ALL2ALL),
)
GROWING = (
    Subject("ALLGATHER EP ragged, counts in a list of ints", ALLGATHER_EP_RAGGED, "list"),
    Subject("ALLGATHER EP ragged, variable counts", ALLGATHER_EP_RAGGED, "variable"),
)


class Trace(NamedTuple):
    """Nodes of the graph that AOT makes, and seconds that the first call takes over the second."""

    nodes: int
    seconds: float


def measure_tracing(effort: Effort) -> list[Table]:
    """The forms whose graph knows the world's size alone, and those that are given a value for each rank."""
    rounds = effort.rounds // 4 + 2
    constant = _measure("Tracing prepare + finalize, by ranks in the world", CONSTANT, (8, 64, 1024), rounds)
    constant.aim = Aim("nodes ratio", 1, is_exact=True)
    title = "The same, with an argument for each rank: Dynamo guards each int, and each variable count is an input"
    return [constant, _measure(title, GROWING, (8, 64), rounds)]


def _measure(title: str, subjects: Sequence[Subject], worlds: Sequence[int], rounds: int) -> Table:
    times = tuple(f"ms, {world}" for world in worlds)
    columns = ("form", *(f"nodes, {world}" for world in worlds), *times, "nodes ratio", "time ratio")
    note = "One process for each world, in turn; medians. Ratios: the largest world against the smallest."
    table = Table(title, columns, note, chart=Chart(times, "ms"))
    with ExitStack() as stack:
        processes = [stack.enter_context(Ranks(world, is_fake=True)) for world in worlds]
        for subject in subjects:
            traces: list[list[Trace]] = [[] for _ in worlds]
            for _ in range(rounds):
                for found, ranks in zip(traces, processes, strict=True):
                    found += ranks.run(_trace, subject)
            nodes = [max(trace.nodes for trace in found) for found in traces]
            medians = [1e3 * statistics.median(trace.seconds for trace in found[1:]) for found in traces]
            table.add(subject.name, *nodes, *medians, nodes[-1] / nodes[0], medians[-1] / medians[0])
    return table


def _trace(group: mo.Group, subject: Subject) -> Trace:
    torch._dynamo.reset()
    nodes: list[int] = []

    def capture(graph: torch.fx.GraphModule, _: Any) -> Any:
        nodes.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    tensors = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, EXPERTS)
    mo.mark_token_axes(*tensors)
    round_trip = _make_round_trip(group, subject)
    compiled = torch.compile(round_trip, backend=aot_autograd(fw_compiler=capture), fullgraph=True)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        compiled(*tensors)
        seconds.append(time.perf_counter() - start)
    return Trace(sum(nodes), seconds[0] - seconds[1])


def _make_round_trip(group: mo.Group, subject: Subject) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    layout, pairs = subject.form.layout(group), group.size // 2
    counts = [TOKENS, FEWER] * pairs
    carriers = [mo.token_count(count) for count in counts] if subject.counts == "variable" else []

    def lengths() -> mo.Lengths:
        if subject.counts == "code":
            return mo.Lengths(per_rank=[TOKENS, FEWER] * pairs)
        if subject.counts == "list":
            return mo.Lengths(per_rank=counts)
        if subject.counts == "variable":
            return mo.Lengths(per_rank=[carrier.shape[0] for carrier in carriers])
        return mo.Lengths(longest=TOKENS)

    def round_trip(hidden_states: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        prepared = mo.prepare(hidden_states, router_logits, layout, lengths())
        return mo.finalize(prepared.hidden_states, prepared.state, layout)

    return round_trip


CASE = Case("tracing", "Does tracing prepare + finalize cost more in a larger world?", measure_tracing)
