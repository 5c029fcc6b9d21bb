"""What this library enters: a name and a builder for each way to run the experts, and the whole stage."""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

import moe_ops as mo
from benchmarks.contest import Entry, Implementation
from benchmarks.layer import EXPERTS, ROUTING, Batch, Weights
from moe_ops.backends.vllm_cpu import pack_experts, run_rows
from moe_ops.dispatchers import combine, dispatch
from moe_ops.experts import run_experts


@dataclass(frozen=True)
class Path:
    """One way through the stage; each rank's tokens are its own."""

    name: str
    strategy: mo.Strategy
    dispatch: mo.Dispatch
    is_sharded: bool = False
    is_packed: bool = False
    is_float32: bool = False

    def layout(self, group: mo.Group) -> mo.Layout:
        groups = mo.ParallelGroups(dp=group, ep=group)
        return mo.Layout(self.strategy, groups, self.dispatch, tokens_are_sharded=self.is_sharded)


PATHS = (
    Path("ALL2ALL, ALL_TO_ALL", mo.Strategy.ALL2ALL, mo.Dispatch.ALL_TO_ALL),
    Path("ALL2ALL, FIXED_CAPACITY", mo.Strategy.ALL2ALL, mo.Dispatch.FIXED_CAPACITY),
    Path("MC2, ALL_TO_ALL", mo.Strategy.MC2, mo.Dispatch.ALL_TO_ALL),
    Path("MC2, FIXED_CAPACITY", mo.Strategy.MC2, mo.Dispatch.FIXED_CAPACITY),
    Path("ALLGATHER DP", mo.Strategy.ALLGATHER, mo.Dispatch.LOCAL),
    Path("ALLGATHER EP", mo.Strategy.ALLGATHER, mo.Dispatch.LOCAL, is_sharded=True),
)
PACKED_PATHS = tuple(
    replace(path, name=f"{path.name}, packed weights", is_packed=True) for path in (PATHS[0], PATHS[3], PATHS[4])
)
FLOAT32_PATHS = tuple(
    replace(path, name=f"{path.name}, float32 weights", is_float32=True) for path in (PATHS[0], PATHS[3], PATHS[4])
)


def build_experts(weights: Weights, _: mo.Group, is_float32: bool = False) -> Implementation:
    """Local dispatch, experts, combine."""
    w13, w2 = (weight.float() if is_float32 else weight for weight in (weights.w13, weights.w2))
    experts, alone = mo.ExpertWeights(w13, w2), mo.Group.single()

    def run(hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        dispatched = dispatch(
            hidden_states, topk_ids, topk_weights, kind=mo.Dispatch.LOCAL, num_local_experts=EXPERTS, ep=alone
        )
        rows = run_experts(dispatched.local.rows, dispatched.local.counts, experts)
        return combine(rows, dispatched, ep=alone)

    return Implementation(run, _mark)


def build_packed_experts(weights: Weights, _: mo.Group) -> Implementation:
    """The same through vLLM's kernel, which groups the rows itself."""
    experts = pack_experts(mo.ExpertWeights(weights.w13, weights.w2))

    def run(hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return run_rows(hidden_states, topk_ids, topk_weights, 0, experts, False)

    return Implementation(run, _mark)


def build_stage(path: Path, weights: Weights, group: mo.Group) -> Implementation:
    """The router and the whole stage, over data parallel ranks that share the experts out."""
    experts, router = weights.share_of(group), weights.router
    experts = pack_experts(experts) if path.is_packed else experts
    experts = experts._replace(w13=experts.w13.float(), w2=experts.w2.float()) if path.is_float32 else experts
    layout = path.layout(group)

    def run(hidden_states: torch.Tensor, longest: torch.Tensor) -> torch.Tensor:
        logits, lengths = F.linear(hidden_states, router), mo.Lengths(longest=longest.shape[0])
        return mo.moe_stage(hidden_states, logits, experts, ROUTING, layout, lengths=lengths, reduce_results=True)

    return Implementation(run, _mark_stage)


def _mark(batch: Batch) -> Batch:
    mo.mark_token_axes(*batch)
    return batch


def _mark_stage(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    mo.mark_token_axes(batch.hidden_states)
    return batch.hidden_states, mo.token_count(batch.hidden_states.shape[0])


EXPERTS_ENTRIES = (
    Entry("moe_ops", build_experts, is_ours=True),
    Entry("moe_ops, packed weights", build_packed_experts, requires="vllm", is_ours=True),
    Entry("moe_ops, float32 weights", partial(build_experts, is_float32=True), is_ours=True),
)
STAGE_ENTRIES = (
    *(Entry(path.name, partial(build_stage, path), is_ours=True) for path in PATHS),
    *(Entry(path.name, partial(build_stage, path), requires="vllm", is_ours=True) for path in PACKED_PATHS),
    *(Entry(path.name, partial(build_stage, path), is_ours=True) for path in FLOAT32_PATHS),
)
