"""A round trip of prepare and finalize, compiled by inductor against eager."""

from functools import partial

import torch

import moe_ops as mo
from benchmarks.forms import FORMS, Form, make_inputs, make_round_trip, make_traced
from benchmarks.ranks import Ranks
from benchmarks.registry import Case, Chart, Effort, Table
from benchmarks.timing import Timing, compare, slowest

TOKENS = (8, 512)
CALLS = 20


def measure_compiled(effort: Effort) -> list[Table]:
    columns = ("form", "T", "eager us", "compiled us", "compiled / eager", "eager CPU us", "compiled CPU us")
    note = "One graph for both token counts. Compiled includes the guards and the python around the graph."
    table = Table("Round trip of prepare and finalize, 2 gloo ranks", columns, note, 2, chart=Chart(columns[2:4], "us"))
    with Ranks(2) as ranks:
        for form in FORMS:
            answers = ranks.run(_measure_form, form, effort.pick(TOKENS), effort.rounds)
            for tokens in answers[0]:
                timings = slowest([answer[tokens] for answer in answers])
                eager, fast = timings["eager"], timings["compiled"]
                wall = (1e6 * eager.wall, 1e6 * fast.wall, fast.wall / eager.wall)
                table.add(form.name, tokens, *wall, 1e6 * eager.cpu, 1e6 * fast.cpu)
    return [table]


def _measure_form(group: mo.Group, form: Form, tokens: tuple[int, ...], rounds: int) -> dict[int, dict[str, Timing]]:
    torch._dynamo.reset()
    eager = make_round_trip(form, form.layout(group))
    compiled = torch.compile(eager, fullgraph=True)
    answers = {}
    for count in tokens:
        inputs = make_traced(make_inputs(group, form.tokens(group.size, count)))
        torch.testing.assert_close(compiled(inputs), eager(inputs), rtol=0, atol=0)
        calls = {"eager": partial(eager, inputs), "compiled": partial(compiled, inputs)}
        answers[count] = compare(calls, rounds=rounds, calls=CALLS)
    return answers


CASE = Case("compiled", "Is prepare + finalize faster compiled by inductor than eager?", measure_compiled)
