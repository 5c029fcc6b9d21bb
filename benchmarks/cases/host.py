"""What the host pays: a call of the stage, the dispatch of our ops, and compiling layer after layer.

T tokens, H hidden, E experts, K top-k, W ranks.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree

import moe_ops as mo
from benchmarks import inline_stage as inline
from benchmarks import ours
from benchmarks.calls import Calls, count_calls
from benchmarks.layer import ROUTING, make_weights
from benchmarks.ranks import Ranks
from benchmarks.registry import Aim, Case, Effort, Table
from benchmarks.timing import Timing, compare, time_in_turn
from fake_impls.route import RouteSettings
from moe_ops._library import KERNELS, PORTABLE

OPS = torch.ops.moe_ops
TOKENS, HIDDEN, EXPERTS, TOP_K, RANKS = 8, 1024, 256, 8, 32
CALLS = 50
LAYERS = (1, 12, 48)
BODY, BY_HAND = " body", " by hand"


def measure_host(effort: Effort) -> list[Table]:
    return [_stage_table(effort), _ops_table(effort), _layers_table()]


def _ops_table(effort: Effort) -> Table:
    columns = ("op", "op us", "body us", "by hand us", "ratio", "ratio by hand")
    note = (
        "body: the aten calls of the op in a plain function, without dispatch and checks. by hand: "
        "what is enough where every id is a local expert's, inline_stage.py; compared first. "
        f"T={TOKENS}, H={HIDDEN}, E={EXPERTS}, k={TOP_K}, {RANKS} ranks; torch.no_grad(), CPU time."
    )
    table = Table("Eager cost of an op against the same aten calls inline", columns, note, aim=Aim("ratio", 1.5))
    with Ranks(1) as ranks:
        timings = ranks.run(_measure_ops, effort.rounds)[0]
    for name in (name for name in timings if not name.endswith((BODY, BY_HAND))):
        op, body, by_hand = (1e6 * timings[key].cpu for key in (name, name + BODY, name + BY_HAND))
        table.add(name, op, body, by_hand, op / body, op / by_hand)
    return table


def _measure_ops(_: mo.Group, rounds: int) -> dict[str, Timing]:
    variants: dict[str, Callable[[], Any]] = {}
    with torch.no_grad():
        for name, (arguments, by_hand) in _subjects().items():
            op = partial(getattr(OPS, name).default, *arguments)
            for found, wanted in zip(pytree.tree_leaves(op()), pytree.tree_leaves(by_hand()), strict=True):
                torch.testing.assert_close(found, wanted)
            variants |= {name: op, name + BODY: partial(_body(name), *arguments), name + BY_HAND: by_hand}
        return compare(variants, rounds=rounds, calls=CALLS)


def _body(name: str) -> Callable[..., Any]:
    """The kernel that a CPU runs, without the op's check."""
    kernels = KERNELS[name]
    return kernels.get("CPU", kernels[PORTABLE])


def _subjects() -> dict[str, tuple[tuple[Any, ...], Callable[[], Any]]]:
    """The arguments of each op, and the call that does the same by hand."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(torch.bfloat16)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    weight = torch.randn(EXPERTS, 16, HIDDEN, generator=generator).to(torch.bfloat16)
    weights, ids = inline.route(logits, TOP_K)
    rows, counts, positions = inline.permute_by_expert(hidden, ids, EXPERTS)
    places, per_rank = inline.plan_copies(ids, EXPERTS // RANKS, RANKS)
    num_copies, payload, fill = int(per_rank.sum()), [hidden, ids, weights], [0, -1, 0]
    packed = inline.pack_rows(payload)
    settings = RouteSettings(TOP_K, "softmax", True, 1, 1, None, 1.0)
    return {
        "route": ((logits, None, *settings), partial(inline.route, logits, TOP_K)),
        "permute_by_expert": (
            ([hidden], ids, 0, EXPERTS),
            partial(inline.permute_by_expert, hidden, ids, EXPERTS),
        ),
        "unpermute": ((rows, weights, positions), partial(inline.unpermute, rows, weights, positions)),
        "plan_copies": (
            (ids, EXPERTS // RANKS, RANKS, None),
            partial(inline.plan_copies, ids, EXPERTS // RANKS, RANKS),
        ),
        "pack_copies": (
            (payload, places, num_copies, fill),
            partial(inline.pack_copies, payload, places, num_copies),
        ),
        "pack_rows": ((payload, TOKENS, fill), partial(inline.pack_rows, payload)),
        "unpack_rows": ((packed, payload), partial(inline.unpack_rows, packed, payload)),
        "grouped_linear": ((rows, counts, weight, None), partial(inline.grouped_linear, rows, counts, weight)),
    }


def _stage_table(effort: Effort) -> Table:
    columns = ("form", "frames to each collective", "frames", "calls before", "calls", "CPU us", "CPU us, least")
    note = (
        "frames: from moe_stage to a functional collective, both included. calls: of functions of this library, up to the "
        "first collective and in all. CPU us: of the calling thread of the slower rank, median and least of the rounds, in "
        "which the forms take turns. One token a rank, H=64, I=32, E=8, k=2, float32, two gloo ranks, torch.no_grad()."
    )
    table = Table("What the host pays for a call of the stage", columns, note, aim=Aim("frames", 5))
    with Ranks(2) as ranks:
        answers = ranks.run(_measure_stage, effort.rounds)
    for name, (found, _) in answers[0].items():
        medians, least = zip(*(answer[name][1] for answer in answers), strict=True)
        frames = " ".join(map(str, found.frames))
        table.add(name, frames, max(found.frames), found.before, found.total, 1e6 * max(medians), 1e6 * max(least))
    return table


def _measure_stage(group: mo.Group, rounds: int) -> dict[str, tuple[Calls, tuple[float, float]]]:
    """Of each form, the calls, and the median and the least CPU seconds."""
    generator = torch.Generator().manual_seed(group.rank)
    shapes = (1, 64), (1, 8), (8 // group.size, 64, 64), (8 // group.size, 64, 32)
    x, logits, w13, w2 = (torch.randn(shape, generator=generator) for shape in shapes)
    experts, routing, lengths = mo.ExpertWeights(w13, w2), mo.Routing(top_k=2, num_experts=8), mo.Lengths(longest=1)
    variants = {
        path.name: partial(mo.moe_stage, x, logits, experts, routing, path.layout(group), lengths=lengths)
        for path in (*ours.PATHS[:2], *ours.PATHS[3:])
    }
    with torch.no_grad():
        timings = time_in_turn(variants, rounds=rounds, calls=CALLS)
        counted = {name: count_calls(call) for name, call in variants.items()}
    cpu = {name: [timing.cpu for timing in found] for name, found in timings.items()}
    return {name: (counted[name], (statistics.median(found), min(found))) for name, found in cpu.items()}


def _layers_table() -> Table:
    columns = ("layers", "graphs", "first call s", "s a layer, after the first")
    note = (
        "One compiled layer called with the weights of each in turn, inductor, two gloo ranks, ALL2ALL: the time of the first "
        "call, which compiles, and what each further layer adds to the first pass."
    )
    table = Table("Compiling identical layers", columns, note, aim=Aim("graphs", 1, is_exact=True))
    with Ranks(2) as ranks:
        for layers in LAYERS:
            graphs, first, rest = ranks.run(_compile_layers, layers)[0]
            table.add(layers, graphs, first, rest)
    return table


def _compile_layers(group: mo.Group, layers: int) -> tuple[int, float, float]:
    """Graphs, seconds of the first call, seconds of each further layer."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layout = ours.PATHS[0].layout(group)
    weights = [make_weights(torch.float32).share_of(group) for _ in range(2)]

    @partial(torch.compile, fullgraph=True)
    def layer(x: torch.Tensor, logits: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return mo.moe_stage(x, logits, mo.ExpertWeights(w13, w2), ROUTING, layout)

    x, logits = torch.randn(5, weights[0].w13.shape[2]), torch.randn(5, ROUTING.num_experts)
    seconds = []
    with torch.no_grad():
        for index in range(layers):
            mo.mark_token_axes(x, logits)
            start = time.perf_counter()
            experts = weights[index % 2]
            x = layer(x, logits, experts.w13, experts.w2)
            seconds.append(time.perf_counter() - start)
    return (
        torch._dynamo.utils.counters["stats"]["unique_graphs"],
        seconds[0],
        sum(seconds[1:]) / max(len(seconds) - 1, 1),
    )


CASE = Case("host", "What does the host pay for a call of the stage, for an op, and for a layer more?", measure_host)
