"""Compilations over a sweep of token counts."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend

import moe_ops as mo
from benchmarks.forms import FORMS, Form, make_inputs, make_round_trip, make_traced
from benchmarks.ranks import Ranks
from benchmarks.registry import Aim, Case, Effort, Table

SWEEP = (0, 1, 2, 3, 7, 64, 257, 4096)
BACKENDS = ("aot_eager", "inductor")


def count_graphs(effort: Effort) -> list[Table]:
    note = (
        f"T = {', '.join(map(str, SWEEP))}; where ranks may differ, rank 1 takes the sweep in the opposite order. "
        "The larger number of the two ranks, for prepare + finalize."
    )
    table = Table("Graphs of a sweep, 2 gloo ranks", ("form", "backend", "graphs"), note, 2, Aim("graphs", 1, True))
    with Ranks(2) as ranks:
        for backend in BACKENDS[: 1 if effort.is_quick else 2]:
            for form in FORMS:
                table.add(form.name, backend, max(ranks.run(_count, form, backend)))
    return [table]


def _count(group: mo.Group, form: Form, backend: str) -> int:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    eager = make_round_trip(form, form.layout(group))
    compiled = torch.compile(eager, backend=counter, fullgraph=True)
    may_differ = form.axis == "dp" or form.is_ragged  # tokens are the same on all TP ranks
    for first, second in zip(SWEEP, reversed(SWEEP) if may_differ else SWEEP, strict=True):
        inputs = make_traced(make_inputs(group, [first, second], hidden=64, experts=16))
        torch.testing.assert_close(compiled(inputs), eager(inputs), rtol=0, atol=0)
    return int(counter.frame_count)


CASE = Case("graphs", "How many graphs does a sweep over token counts compile?", count_graphs)
