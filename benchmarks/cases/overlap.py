"""Rows that travel while something computes, against the same work one after the other, on two gloo ranks."""

from collections.abc import Callable
from typing import Any

import torch

import moe_ops as mo
from benchmarks import ours
from benchmarks.layer import HIDDEN, INTERMEDIATE, ROUTING, SIZES, make_batch, make_weights
from benchmarks.ranks import Ranks
from benchmarks.registry import Case, Chart, Effort, Table
from benchmarks.timing import Timing, compare, slowest
from moe_ops.shared_experts import run_shared_experts

TOKENS = (8, 512)
APART, TOGETHER = "one after the other", "overlapped"
Pair = dict[str, Callable[[], Any]]


def measure_overlap(effort: Effort) -> list[Table]:
    columns = ("what", "path", "mode", "T", "apart ms", "overlapped ms", "ratio", "CPU ratio")
    note = (
        "gate: the gather of hidden states is in flight during routing, for one collective more. shared experts: run while "
        "rows travel, or after the stage. micro-batches: two halves of T / 2 tokens, interleaved or in turn. bfloat16. The two "
        "ranks and gloo's threads share two cores: what can be won here is little, on a device with its own engines more."
    )
    table = Table(f"Overlap, {SIZES}, 2 gloo ranks", columns, note, 4, chart=Chart(columns[4:6], "ms"))
    with Ranks(2) as ranks:
        for what, paths in (("gate", ours.PATHS[4:]), ("shared experts", PATHS), ("micro-batches", PATHS)):
            for path in paths:
                for mode in ("eager", "compiled"):
                    for tokens in effort.pick(TOKENS):
                        timings = slowest(ranks.run(_measure, what, path, mode, tokens, effort.rounds))
                        apart, together = timings[APART], timings[TOGETHER]
                        times = 1e3 * apart.wall, 1e3 * together.wall
                        table.add(what, path.name, mode, tokens, *times, times[1] / times[0], together.cpu / apart.cpu)
    return [table]


PATHS = (ours.PATHS[0], ours.PATHS[3], ours.PATHS[4])


def _measure(group: mo.Group, what: str, path: ours.Path, mode: str, tokens: int, rounds: int) -> dict[str, Timing]:
    torch._dynamo.reset()
    with torch.no_grad():
        pair = {"gate": _gate, "shared experts": _shared, "micro-batches": _halves}[what](group, path, tokens, mode)
        for one, other in zip(pair[APART](), pair[TOGETHER](), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
        return compare(pair, rounds=rounds, calls=max(1, 32 // tokens))


def _stage(group: mo.Group, path: ours.Path, run: Callable[..., Any]) -> Callable[..., Any]:
    """The stage of a path with what all of these have in common."""
    experts, layout = make_weights(torch.bfloat16).share_of(group), path.layout(group)

    def stage(hidden_states: torch.Tensor, router_logits: torch.Tensor, **keywords: Any) -> Any:
        lengths = mo.Lengths(equal=True)
        return run(hidden_states, router_logits, experts, ROUTING, layout, lengths=lengths, **keywords)

    return stage


def _gate(group: mo.Group, path: ours.Path, tokens: int, mode: str) -> Pair:
    stage = _stage(group, path, mo.moe_stage)
    x, logits = _tokens(group, tokens)
    return {
        APART: _bind(mode, lambda x, logits: [stage(x, logits)], x, logits),
        TOGETHER: _bind(mode, lambda x, logits: [stage(x, logits, overlap_gate=True)], x, logits),
    }


def _shared(group: mo.Group, path: ours.Path, tokens: int, mode: str) -> Pair:
    stage = _stage(group, path, mo.moe_stage)
    x, logits = _tokens(group, tokens)
    generator = torch.Generator().manual_seed(1)
    shapes = (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    w13, w2 = ((torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(torch.bfloat16) for shape in shapes)
    shared, layout = mo.SharedExperts(w13, w2, is_tp_sharded=False), path.layout(group)
    return {
        APART: _bind(mode, lambda x, logits: [stage(x, logits) + run_shared_experts(x, shared, layout)[0]], x, logits),
        TOGETHER: _bind(mode, lambda x, logits: [stage(x, logits, shared_experts=shared)], x, logits),
    }


def _halves(group: mo.Group, path: ours.Path, tokens: int, mode: str) -> Pair:
    stage, steps = _stage(group, path, mo.moe_stage), _stage(group, path, mo.moe_stage_steps)
    x, logits = _tokens(group, tokens)
    halves = [half.clone() for tensor in (x, logits) for half in tensor.chunk(2)]

    def apart(x1: torch.Tensor, x2: torch.Tensor, logits1: torch.Tensor, logits2: torch.Tensor) -> list[torch.Tensor]:
        return [stage(x1, logits1), stage(x2, logits2)]

    def together(
        x1: torch.Tensor, x2: torch.Tensor, logits1: torch.Tensor, logits2: torch.Tensor
    ) -> list[torch.Tensor]:
        return mo.interleave(steps(x1, logits1), steps(x2, logits2))

    return {APART: _bind(mode, apart, *halves), TOGETHER: _bind(mode, together, *halves)}


def _tokens(group: mo.Group, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch = make_batch(torch.bfloat16, tokens, group.rank)
    return batch.hidden_states, batch.hidden_states[:, : ROUTING.num_experts].contiguous()


def _bind(mode: str, function: Callable[..., Any], *tensors: torch.Tensor) -> Callable[[], Any]:
    mo.mark_token_axes(*tensors)
    function = torch.compile(function, fullgraph=True, isolate_recompiles=True) if mode == "compiled" else function
    return lambda: function(*tensors)


CASE = Case("overlap", "What is won by computing while rows travel?", measure_overlap)
