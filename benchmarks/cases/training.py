"""Forward and backward of the whole layer on two ranks that share the experts out, against TorchTitan's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import moe_ops as mo
from benchmarks import ours, peers
from benchmarks.layer import DTYPES, ROUTING, SIZES, Weights, make_batch, make_weights
from benchmarks.peers import torchtitan
from benchmarks.ranks import Ranks
from benchmarks.registry import Aim, Case, Chart, Effort, Table
from benchmarks.standings import name_of
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
    columns = ("contestant", "dtype", *(f"T={tokens}" for tokens in TOKENS), "ratio", "graphs")
    note = (
        "Wall time of forward and backward, ms; gradients of the tokens and of all weights. Ratio: to TorchTitan compiled at "
        f"T={TOKENS[0]}. Gradients are compared first. TorchTitan computes in bfloat16 always."
    )
    table = Table(
        f"Training, {SIZES}, 2 gloo ranks, DP = EP = 2",
        columns,
        note,
        2,
        Aim("ratio", 0.9),
        _is_aimed,
        Chart(columns[2:4], "ms"),
    )
    for dtype in DTYPES[: 1 if effort.is_quick else None]:
        with Ranks(2) as ranks:
            answers = [ranks.run(_measure, dtype, tokens, effort.rounds) for tokens in TOKENS]
        timings = [slowest([answer.timings for answer in found]) for found in answers]
        for name in timings[0]:
            walls = [1e3 * found[name].wall for found in timings]
            rival = timings[0].get(RIVAL)
            ratio = walls[0] / (1e3 * rival.wall) if rival else "-"
            graphs = max(answer.graphs[name] for answer in answers[0])
            table.add(name, name_of(dtype), *walls, ratio, graphs if "compiled" in name else "-")
    return [table]


def _is_aimed(row: dict[str, str | float]) -> bool:
    return (
        row["dtype"] == name_of(torch.bfloat16) and "TorchTitan" not in str(row["contestant"]) and row["ratio"] != "-"
    )


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
            found = step()
            graphs[f"{name} {mode}"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            wanted = wanted or found
            for gradient, expected in zip(found, wanted, strict=True):
                error = ((gradient - expected).norm() / expected.norm()).item()
                if not error <= TOLERANCE:
                    raise AssertionError(f"{name} {mode}: gradients must be within {TOLERANCE}, got {error:.2g}")
            variants[f"{name} {mode}"] = step
    return Answer(compare(variants, rounds=rounds, calls=1), graphs)


def _make_step(
    trained: Trained, hidden_states: torch.Tensor, cotangent: torch.Tensor
) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward; the gradients of the tokens, w13 and w2."""
    x = hidden_states.clone()
    mo.mark_token_axes(x)
    x.requires_grad_()
    leaves = (x, *trained.w13, trained.w2)

    def step() -> list[torch.Tensor]:
        for leaf in leaves:
            leaf.grad = None
        trained.call(x).backward(cotangent)
        found = [leaf.grad for leaf in leaves]
        return [found[0], torch.cat(found[1:-1], dim=1), found[-1]]

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
    groups = mo.ParallelGroups(dp=group, ep=group)

    def call(hidden_states: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden_states, router)
        mask = hidden_states.new_ones(hidden_states.shape[0], dtype=torch.bool)
        return mo.moe_stage(
            hidden_states,
            logits,
            experts,
            routing=ROUTING,
            strategy=path.strategy,
            groups=groups,
            dispatch=path.dispatch,
            mc2_mask=mask if path.strategy is mo.Strategy.MC2 else None,
        )

    return Trained(call, (experts.w13,), experts.w2)


CASE = Case("training", "Are forward and backward faster than TorchTitan's?", measure_training)
