"""The stage in graphs of a device, captured and replayed as a server does it: one graph for each bucket of token counts.

A graph holds addresses, so what changes from step to step is written into buffers that stay: tokens, logits and the mask of a
bucket's size. Weights stay where they are, and so does the result, which each replay overwrites.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import moe_ops as mo

BUCKETS = (8, 16, 32)
H, I, E, TOP_K = 1024, 64, 16, 2  # MC2 takes no narrower rows on A3
WARM_UPS = 3
GRAPHS = {"cuda": "CUDAGraph", "npu": "NPUGraph"}


class Form(NamedTuple):
    """One way to run the layer.

    `counts`: rows of EP ranks, None where all have as many. `masked`: whether a mask says which of them are real, or all are.
    `is_choice_given`: whether a function of the caller's routes.
    """

    strategy: mo.Strategy
    dispatch: mo.Dispatch | None = None
    sharded: bool = False
    counts: str | None = None
    quant: mo.Quant = mo.Quant.NONE
    shared: str | None = None
    overlap_gate: bool = False
    dtype: torch.dtype = torch.bfloat16
    routing: mo.Routing = mo.Routing(TOP_K, E)
    is_packed: bool = False
    masked: bool = True
    is_choice_given: bool = False


MC2, ALL2ALL, ALLGATHER = mo.Strategy.MC2, mo.Strategy.ALL2ALL, mo.Strategy.ALLGATHER
FIXED, W8A8 = mo.Dispatch.FIXED_CAPACITY, mo.Quant.W8A8
FORMS = {
    "mc2": Form(MC2),
    "mc2-shared": Form(MC2, shared="sharded"),
    "mc2-given": Form(MC2, is_choice_given=True),
    "mc2-sharded-tokens": Form(MC2, FIXED, sharded=True, counts="ragged", shared="replicated"),
    "all2all": Form(ALL2ALL, FIXED),
    "allgather": Form(ALLGATHER),
    "allgather-shared": Form(ALLGATHER, shared="sharded"),
    "allgather-overlap-gate": Form(ALLGATHER, overlap_gate=True),
    "allgather-ep-even": Form(ALLGATHER, sharded=True),
    "allgather-ep-ragged": Form(ALLGATHER, sharded=True, counts="ragged"),
    "allgather-ep-shared": Form(ALLGATHER, sharded=True, counts="ragged", shared="replicated"),
}
QUANTISED_FORMS = {
    "mc2-w8a8": Form(MC2, quant=W8A8),
    "all2all-w8a8": Form(ALL2ALL, FIXED, quant=W8A8, shared="sharded"),
    "allgather-w8a8": Form(ALLGATHER, quant=W8A8),
    "allgather-ep-w8a8": Form(ALLGATHER, sharded=True, counts="ragged", quant=W8A8),
}


class Buffers(NamedTuple):
    """What enters the graph of one bucket."""

    hidden_states: torch.Tensor
    router_logits: torch.Tensor
    mask: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.hidden_states.shape[0]

    def write(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> None:
        """Put a batch into the first rows; what was in the others stays, and the mask leaves it out."""
        count = hidden_states.shape[0]
        self.hidden_states[:count].copy_(hidden_states)
        self.router_logits[:count].copy_(router_logits)
        self.mask.copy_(torch.arange(self.mask.shape[0]) < count)


def make_buffers(num_tokens: int, form: Form, groups: mo.ParallelGroups, device: str) -> Buffers:
    return Buffers(
        torch.zeros(num_tokens, H, dtype=form.dtype, device=device),
        torch.zeros(num_tokens, E, device=device),
        torch.zeros(rows_of_mask(num_tokens, form, groups), dtype=torch.bool, device=device),
    )


def rows_of_mask(num_tokens: int, form: Form, groups: mo.ParallelGroups) -> int:
    """Those of the TP group's tokens, of which this rank may have a shard."""
    return num_tokens * groups.tp.size if form.sharded else num_tokens


class Captured(NamedTuple):
    """A graph, and the tensors that each replay overwrites."""

    graph: Any
    output: Any


def draw(count: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, H, generator=generator).to(dtype), torch.randn(count, E, generator=generator)


def make_experts(form: Form, groups: mo.ParallelGroups, device: str) -> mo.ExpertWeights:
    """Those of a rank, in the format and the layout of the form."""
    local = E // groups.ep.size
    generator = torch.Generator().manual_seed(groups.ep.rank)
    w13, w2 = (
        draw_weight((local, 2 * I, H), form, generator, device),
        draw_weight((local, H, I), form, generator, device),
    )
    experts = mo.ExpertWeights(w13, w2)
    if form.quant is not mo.Quant.NONE:
        w13, w13_scale = mo.quantize_weights(w13, quant=form.quant)
        w2, w2_scale = mo.quantize_weights(w2, quant=form.quant)
        experts = mo.ExpertWeights(w13, w2, w13_scale=w13_scale, w2_scale=w2_scale)
    return mo.prepack_experts(experts) if form.is_packed else experts


def draw_weight(shape: tuple[int, ...], form: Form, generator: torch.Generator, device: str) -> torch.Tensor:
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(form.dtype).to(device)


def make_stage(
    form: Form, groups: mo.ParallelGroups, device: str, run: Callable[..., Any] = mo.moe_stage
) -> Callable[..., Any]:
    """The stage of a rank as a function of `Buffers`, with weights that stay; `run` may be `moe_stage_steps`."""
    experts, generator = make_experts(form, groups, device), torch.Generator().manual_seed(1)
    tables = {
        name: table.to(device) for name, table in form.routing._asdict().items() if isinstance(table, torch.Tensor)
    }
    routing = form.routing._replace(**tables)
    shared = None
    if form.shared is not None:
        weights = [draw_weight(shape, form, generator, device) for shape in ((2 * I, H), (H, I))]
        shared = mo.SharedExperts(*weights, is_tp_sharded=form.shared == "sharded")

    layout = mo.Layout(form.strategy, groups, form.dispatch, tokens_are_sharded=form.sharded)

    def stage(hidden_states: torch.Tensor, router_logits: torch.Tensor, mask: torch.Tensor) -> Any:
        count, ep = hidden_states.shape[0], groups.ep
        counts = None
        if form.counts == "ragged":  # fewer on each rank, and this rank's as they are
            counts = [max(count - 3 * ((rank - ep.rank) % ep.size), 0) for rank in range(ep.size)]
        topk_weights, topk_ids = router_logits.topk(TOP_K) if form.is_choice_given else (None, None)
        return run(
            hidden_states,
            None if form.is_choice_given else router_logits,
            experts,
            routing,
            layout,
            lengths=mo.Lengths(equal=counts is None, per_rank=counts, mask=mask if form.masked else None),
            quant=form.quant,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            shared_experts=shared,
            reduce_results=True,
            overlap_gate=form.overlap_gate,
        )

    return stage


def warm_up(run: Callable[[], Any], device: str) -> None:
    """Run on a side stream before a capture, which cannot itself make communicators, or whatever else is made only once."""
    module = torch.get_device_module(device)
    side = module.Stream()
    side.wait_stream(module.current_stream())
    with module.stream(side):
        for _ in range(WARM_UPS):
            run()
    module.current_stream().wait_stream(side)


def capture(run: Callable[[], Any], device: str, pool: Any = None) -> Captured:
    """Capture a call whose inputs are buffers. Graphs that are never replayed at once may share a pool of memory."""
    module = torch.get_device_module(device)
    graph = getattr(module, GRAPHS[device])()
    with module.graph(graph, pool=pool):
        output = run()
    return Captured(graph, output)


def capture_buckets(form: Form, groups: mo.ParallelGroups, device: str) -> dict[int, tuple[Buffers, Captured]]:
    """A graph for each bucket, the largest first, since the others fit into its memory."""
    stage = make_stage(form, groups, device)
    captured: dict[int, tuple[Buffers, Captured]] = {}
    pool = None
    for num_tokens in sorted(BUCKETS, reverse=True):
        buffers = make_buffers(num_tokens, form, groups, device)
        warm_up(lambda buffers=buffers: stage(*buffers), device)
        captured[num_tokens] = buffers, capture(lambda buffers=buffers: stage(*buffers), device, pool)
        pool = captured[num_tokens][1].graph.pool()
    return captured
