"""What the host pays: the dispatch of our ops, and compiling layer after layer.

T tokens, H hidden, E experts, K top-k, W ranks.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree

import fake_impls as shapes
import moe_ops as mo
from benchmarks import inline_stage as inline
from benchmarks.layer import ROUTING, make_weights
from benchmarks.ranks import Ranks
from benchmarks.registry import Aim, Case, Effort, Table
from benchmarks.timing import Timing, compare
from moe_ops import collectives, experts, route
from moe_ops.dispatchers import copies, local

OPS = torch.ops.moe_ops
TOKENS, HIDDEN, EXPERTS, TOP_K, RANKS = 8, 1024, 256, 8, 32
CALLS = 50
LAYERS = (1, 12, 48)
BODY, BY_HAND = " body", " by hand"
CHECKS = (
    (shapes.collectives, "check_pack"),
    (shapes.collectives, "check_unpack"),
    (shapes.dispatchers.copies, "check_copies"),
    (shapes.dispatchers.copies, "check_plan"),
    (shapes.dispatchers.local, "check_permute"),
    (shapes.dispatchers.local, "check_unpermute"),
    (shapes.experts, "check_grouped_linear"),
)


def measure_host(effort: Effort) -> list[Table]:
    return [_ops_table(effort), _layers_table()]


def _ops_table(effort: Effort) -> Table:
    columns = ("op", "op us", "body us", "by hand us", "ratio", "ratio by hand")
    note = (
        "body: the aten calls of the op in a plain function, without dispatch and checks (route: without dispatch). by hand: "
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
        for name, (body, arguments, by_hand) in _pairs().items():
            op = partial(getattr(OPS, name).default, *arguments)
            for found, wanted in zip(pytree.tree_leaves(op()), pytree.tree_leaves(by_hand()), strict=True):
                torch.testing.assert_close(found, wanted)
            variants |= {name: op, name + BODY: _without_checks(partial(body, *arguments)), name + BY_HAND: by_hand}
        return compare(variants, rounds=rounds, calls=CALLS)


def _without_checks(call: Callable[[], Any]) -> Callable[[], Any]:
    def unchecked() -> Any:
        saved = [getattr(module, name) for module, name in CHECKS]
        for module, name in CHECKS:
            setattr(module, name, _nothing)
        try:
            return call()
        finally:
            for (module, name), check in zip(CHECKS, saved, strict=True):
                setattr(module, name, check)

    return unchecked


def _nothing(*arguments: Any) -> None:
    pass


def _pairs() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], Callable[[], Any]]]:
    """The body and the arguments of each op, and the call that does the same by hand."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(torch.bfloat16)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    weight = torch.randn(EXPERTS, 16, HIDDEN, generator=generator).to(torch.bfloat16)
    weights, ids = inline.route(logits, TOP_K)
    rows, counts, positions = inline.permute_by_expert(hidden, ids, EXPERTS)
    places, per_rank = inline.plan_copies(ids, EXPERTS // RANKS, RANKS)
    num_copies, payload, fill = int(per_rank.sum()), [hidden, ids, weights], [0, -1, 0]
    packed = inline.pack_rows(payload)
    routed = (logits, TOP_K, "softmax", True, 1, 1, None, 1.0, None, None, None)
    return {
        "route": (route._route, routed, partial(inline.route, logits, TOP_K)),
        "permute_by_expert": (
            local._permute_on_host,
            ([hidden], ids, 0, EXPERTS),
            partial(inline.permute_by_expert, hidden, ids, EXPERTS),
        ),
        "unpermute": (
            local._unpermute_on_host,
            (rows, weights, positions),
            partial(inline.unpermute, rows, weights, positions),
        ),
        "plan_copies": (
            copies._plan_copies,
            (ids, EXPERTS // RANKS, RANKS, None),
            partial(inline.plan_copies, ids, EXPERTS // RANKS, RANKS),
        ),
        "pack_copies": (
            copies._pack_copies,
            (payload, places, num_copies, fill),
            partial(inline.pack_copies, payload, places, num_copies),
        ),
        "pack_rows": (collectives._pack_rows, (payload, TOKENS, fill), partial(inline.pack_rows, payload)),
        "unpack_rows": (collectives._unpack_rows, (packed, payload), partial(inline.unpack_rows, packed, payload)),
        "grouped_linear": (
            experts._grouped_linear_on_host,
            (rows, counts, weight, None),
            partial(inline.grouped_linear, rows, counts, weight),
        ),
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
