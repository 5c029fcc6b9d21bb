"""Forward and backward of the whole layer on two ranks that share the experts out, against TorchTitan's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

import moe_ops as mo
from benchmarks import ours, peers
from benchmarks.contest import profile_call
from benchmarks.layer import ROUTING, SIZES, Weights, make_batch, make_weights
from benchmarks.peers import torchtitan
from benchmarks.ranks import Ranks
from benchmarks.registry import Aim, Case, Chart, Effort, Table
from benchmarks.timing import Timing, compare, slowest

TOKENS = (256, 512)
RIVAL = "TorchTitan compiled"
TOLERANCE = 3e-2  # bfloat16, in which TorchTitan computes always


class Trained(NamedTuple):
    """A layer as a function of this rank's tokens, and its weights: w13 of the experts, or its two halves, and w2."""

    call: Callable[[torch.Tensor], torch.Tensor]
    w13: tuple[torch.Tensor, ...]
    w2: torch.Tensor


class Answer(NamedTuple):
    timings: dict[str, Timing]
    graphs: dict[str, int]


def measure_training(effort: Effort) -> list[Table]:
    columns = ("contestant", "T", "ms", "CPU ms", "ratio", "CPU ratio", "graphs")
    note = (
        "Forward and backward in bfloat16, which TorchTitan computes in always; gradients of the tokens and of all weights, "
        "compared first. CPU: without the thread that runs the backward. Ratios: to TorchTitan compiled."
    )
    title = f"Training, {SIZES}, 2 gloo ranks, DP = EP = 2"
    table = Table(title, columns, note, 2, Aim("ratio", 0.9), _is_ours, Chart(("ms",), "ms"))
    with Ranks(2) as ranks:
        for tokens in effort.pick(TOKENS):
            answers = ranks.run(_measure, torch.bfloat16, tokens, effort.rounds)
            timings = slowest([answer.timings for answer in answers])
            rival = timings.get(RIVAL)
            for name, timing in timings.items():
                ratios = [timing.wall / rival.wall, timing.cpu / rival.cpu] if rival else ["-", "-"]
                graphs = max(answer.graphs[name] for answer in answers) if "compiled" in name else "-"
                table.add(name, tokens, 1e3 * timing.wall, 1e3 * timing.cpu, *ratios, graphs)
    return [table]


def _is_ours(row: dict[str, str | float]) -> bool:
    return "TorchTitan" not in str(row["contestant"]) and row["ratio"] != "-"


def _measure(group: mo.Group, dtype: torch.dtype, tokens: int, rounds: int) -> Answer:
    torch._dynamo.reset()
    weights, batch = make_weights(dtype), make_batch(dtype, tokens, group.rank)
    cotangent = torch.randn(tokens, batch.hidden_states.shape[1], generator=torch.Generator().manual_seed(group.rank))
    variants: dict[str, Callable[[], list[torch.Tensor]]] = {}
    graphs: dict[str, int] = {}
    wanted: list[torch.Tensor] = []
    for name, trained in _contestants(weights, group).items():
        for mode in ("eager", "compiled"):
            call = (
                torch.compile(trained.call, fullgraph=True, isolate_recompiles=True)
                if mode == "compiled"
                else trained.call
            )
            step = _make_step(trained._replace(call=call), batch.hidden_states, cotangent.to(dtype))
            torch._dynamo.utils.counters.clear()
            x_grad, *w13_grads, w2_grad = step()
            found = [x_grad, torch.cat(w13_grads, dim=1), w2_grad]
            graphs[f"{name} {mode}"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            wanted = wanted or found
            for gradient, expected in zip(found, wanted, strict=True):
                error = ((gradient - expected).norm() / expected.norm()).item()
                if not error <= TOLERANCE:
                    raise AssertionError(f"{name} {mode}: gradients must be within {TOLERANCE}, got {error:.2g}")
            variants[f"{name} {mode}"] = step
    return Answer(compare(variants, rounds=rounds, calls=1), graphs)


def profile_step(group: mo.Group, tokens: int, calls: int) -> dict[str, dict[str, float]]:
    """Seconds that each op itself takes in an eager forward and backward, of the first path of ours and the rival's."""
    torch._dynamo.reset()
    weights, batch = make_weights(torch.bfloat16), make_batch(torch.bfloat16, tokens, group.rank)
    contestants = _contestants(weights, group)
    steps = {
        name: _make_step(contestants[name], batch.hidden_states, torch.ones_like(batch.hidden_states))
        for name in (ours.PATHS[0].name, RIVAL.split()[0])
        if name in contestants
    }
    found: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        step(), step()
        dist.barrier()
        found[name] = profile_call(lambda step=step: [step() for _ in range(calls)])
        found[name] = {op: seconds / calls for op, seconds in found[name].items()}
    return found


def _make_step(
    trained: Trained, hidden_states: torch.Tensor, cotangent: torch.Tensor
) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward; the gradients of the tokens, of w13 (or its halves) and of w2."""
    x = hidden_states.clone()
    mo.mark_token_axes(x)
    x.requires_grad_()
    leaves = (x, *trained.w13, trained.w2)

    def step() -> list[torch.Tensor]:
        for leaf in leaves:
            leaf.grad = None
        trained.call(x).backward(cotangent)
        return [leaf.grad for leaf in leaves]

    return step


def _contestants(weights: Weights, group: mo.Group) -> dict[str, Trained]:
    found = {path.name: _build(path, weights, group) for path in (ours.PATHS[0], ours.PATHS[3], ours.PATHS[4])}
    if torchtitan.STAGE.is_available and torchtitan.STAGE in peers.STAGE_ENTRIES:
        layer: Any = torchtitan.make_layer(weights, group).requires_grad_(True)
        inner = layer.routed_experts.inner_experts
        call, _ = torchtitan.as_stage(layer)
        found["TorchTitan"] = Trained(lambda x: call(x.unsqueeze(0)), (inner.w1_EFD, inner.w3_EFD), inner.w2_EDF)
    return found


def _build(path: ours.Path, weights: Weights, group: mo.Group) -> Trained:
    share, router = weights.share_of(group), weights.router.clone().requires_grad_()
    experts = share._replace(w13=share.w13.requires_grad_(), w2=share.w2.requires_grad_())
    layout, lengths = path.layout(group), mo.Lengths(equal=True)

    def call(hidden_states: torch.Tensor) -> torch.Tensor:
        return mo.moe_stage(hidden_states, F.linear(hidden_states, router), experts, ROUTING, layout, lengths=lengths)

    return Trained(call, (experts.w13,), experts.w2)


CASE = Case("training", "Are forward and backward faster than TorchTitan's?", measure_training)
