"""What the host pays: the dispatch of our ops, and compiling layer after layer.

T tokens, H hidden, E experts, K top-k, W ranks.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import moe_ops as mo
from benchmarks.layer import ROUTING, make_weights
from benchmarks.ranks import Ranks
from benchmarks.registry import Aim, Case, Effort, Table
from benchmarks.timing import Timing, compare
from moe_ops import collectives, route
from moe_ops.dispatchers import copies, local

OPS = torch.ops.moe_ops
TOKENS, HIDDEN, EXPERTS, TOP_K, RANKS = 8, 1024, 256, 8, 32
CALLS = 50
LAYERS = (1, 12, 48)


def measure_host(effort: Effort) -> list[Table]:
    return [_ops_table(effort), _layers_table()]


def _ops_table(effort: Effort) -> Table:
    columns = ("op", "op us", "inline us", "ratio")
    note = (
        "inline: the body of the op called as a function, so the same aten calls and checks without the dispatch. "
        f"T={TOKENS}, H={HIDDEN}, E={EXPERTS}, k={TOP_K}, {RANKS} ranks; torch.no_grad(), CPU time."
    )
    table = Table("Eager cost of an op against its aten calls inline", columns, note, aim=Aim("ratio", 1.5))
    with Ranks(1) as ranks:
        timings = ranks.run(_measure_ops, effort.rounds)[0]
    for name in (name for name in timings if not name.endswith(" inline")):
        op, inline = (1e6 * timings[key].cpu for key in (name, f"{name} inline"))
        table.add(name, op, inline, op / inline)
    return table


def _measure_ops(_: mo.Group, rounds: int) -> dict[str, Timing]:
    with torch.no_grad():
        variants: dict[str, Callable[[], Any]] = {}
        for name, (body, arguments) in _bodies().items():
            variants[name] = partial(getattr(OPS, name).default, *arguments)
            variants[f"{name} inline"] = partial(body, *arguments)
        return compare(variants, rounds=rounds, calls=CALLS)


def _bodies() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(torch.bfloat16)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    weights, ids = route.route(logits, mo.Routing(TOP_K, EXPERTS))
    rows, _, positions = local._permute_on_host([hidden], ids, 0, EXPERTS)
    places, _ = copies._plan_copies(ids, EXPERTS // RANKS, RANKS, None)
    payload = [hidden, ids, weights]
    packed = collectives._pack_rows(payload, TOKENS, [0, -1, 0])
    routed = (logits, TOP_K, "softmax", True, 1, 1, None, 1.0, None, None, None)
    return {
        "route": (route._route, routed),
        "permute_by_expert": (local._permute_on_host, ([hidden], ids, 0, EXPERTS)),
        "unpermute": (local._unpermute_on_host, (rows, weights, positions)),
        "plan_copies": (copies._plan_copies, (ids, EXPERTS // RANKS, RANKS, None)),
        "pack_copies": (copies._pack_copies, (payload, places, int((places >= 0).sum()), [0, -1, 0])),
        "pack_rows": (collectives._pack_rows, (payload, TOKENS, [0, -1, 0])),
        "unpack_rows": (collectives._unpack_rows, (packed, payload)),
    }


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
    groups = mo.ParallelGroups(dp=group, ep=group)
    weights = [make_weights(torch.float32).share_of(group) for _ in range(2)]

    @partial(torch.compile, fullgraph=True)
    def layer(x: torch.Tensor, logits: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return mo.moe_stage(
            x, logits, mo.ExpertWeights(w13, w2), routing=ROUTING, strategy=mo.Strategy.ALL2ALL, groups=groups
        )

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


CASE = Case("host", "What does the host pay for an op, and for a layer more?", measure_host)
