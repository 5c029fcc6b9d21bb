"""Layers on tensors of an NPU: the forms of the stage that tests convert, capture and launch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import moe_ops as mo
from moe_ops import Dispatch, Quant, Strategy

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, RANKS = 1024, 64, 16, 4, 8
ROUTING = mo.Routing(top_k=TOP_K, num_experts=EXPERTS)


class Form(NamedTuple):
    """A layer on rank 0 of eight, laid out ``[DP, PCP, TP]``."""

    strategy: Strategy
    layout: tuple[int, int, int] = (8, 1, 1)
    dispatch: Dispatch | None = None
    sharded: bool = False
    counts: tuple[int, ...] | None = None  # of EP ranks, of which the first is this one's
    quant: Quant = Quant.NONE
    routing: mo.Routing = ROUTING
    reduce_results: bool = False
    is_packed: bool = False
    has_shared_experts: bool = False
    weights: mo.ExpertWeights | None = None  # others than `experts` makes

    def experts(self) -> mo.ExpertWeights:
        """This rank's, with weights in the format of `quant`, packed if asked for."""
        experts = make_experts(self.quant) if self.weights is None else self.weights
        return mo.prepack_experts(experts) if self.is_packed else experts

    def build(self, groups: mo.ParallelGroups) -> Callable[..., torch.Tensor]:
        """``layer(hidden_states, router_logits, mc2_mask)``."""
        experts, routing = self.experts(), self.routing
        if routing.e_score_correction_bias is not None:
            routing = routing._replace(e_score_correction_bias=routing.e_score_correction_bias.npu())
        if routing.logical_to_physical is not None:
            routing = routing._replace(logical_to_physical=routing.logical_to_physical.npu())
        shared = mo.SharedExperts(half(2 * INTERMEDIATE, HIDDEN), half(HIDDEN, INTERMEDIATE), is_tp_sharded=True)

        def layer(hidden_states: torch.Tensor, router_logits: torch.Tensor, mc2_mask: torch.Tensor) -> torch.Tensor:
            return mo.moe_stage(
                hidden_states,
                router_logits,
                experts,
                routing=routing,
                strategy=self.strategy,
                groups=groups,
                dispatch=self.dispatch,
                reduce_results=self.reduce_results,
                mc2_mask=mc2_mask if self.strategy is Strategy.MC2 else None,
                num_tokens_across_ep=self.counts,
                tokens_are_sharded=self.sharded,
                quant=self.quant,
                shared_experts=shared if self.has_shared_experts else None,
            )

        return layer


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).npu()


def make_experts(quant: Quant) -> mo.ExpertWeights:
    w13, w2 = half(EXPERTS // RANKS, 2 * INTERMEDIATE, HIDDEN).cpu(), half(EXPERTS // RANKS, HIDDEN, INTERMEDIATE).cpu()
    if quant is Quant.NONE:
        return mo.ExpertWeights(w13.npu(), w2.npu())
    (w13, w13_scale), (w2, w2_scale) = (mo.quantize_weights(weight, quant=quant) for weight in (w13, w2))
    return mo.ExpertWeights(*map(to_npu, (w13, w2)), w13_scale=to_npu(w13_scale), w2_scale=to_npu(w2_scale))


def to_npu(x: torch.Tensor) -> torch.Tensor:
    """A copy of its bytes, for dtypes that the device does not copy itself."""
    return x.view(torch.uint8).npu().view(x.dtype)


def make_inputs(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, logits, and a mask of which the last quarter is False."""
    mask = torch.arange(num_tokens) < num_tokens - num_tokens // 4
    return half(num_tokens, HIDDEN), half(num_tokens, EXPERTS), mask.npu()


def make_groups(form: Form) -> mo.ParallelGroups:
    """Of a world of eight."""
    mesh: Any = dist.init_device_mesh("npu", form.layout, mesh_dim_names=("dp", "pcp", "tp"))
    return mo.ParallelGroups.from_device_mesh(mesh)


FORMS = {
    "mc2": Form(Strategy.MC2),
    "mc2-tp": Form(Strategy.MC2, (4, 1, 2)),
    "mc2-shared": Form(Strategy.MC2, has_shared_experts=True),
    "mc2-packed": Form(Strategy.MC2, is_packed=True),
    "mc2-w8a8": Form(Strategy.MC2, quant=Quant.W8A8),
    "mc2-w8a8-packed": Form(Strategy.MC2, quant=Quant.W8A8, is_packed=True),
    "mc2-w4a8": Form(Strategy.MC2, quant=Quant.W4A8),
    "mc2-weighed": Form(Strategy.MC2, routing=ROUTING._replace(apply_router_weight_on_input=True)),
    "mc2-deepseek": Form(
        Strategy.MC2,
        routing=ROUTING._replace(
            scoring="sigmoid",
            num_expert_group=4,
            topk_group=2,
            e_score_correction_bias=torch.arange(EXPERTS) / EXPERTS,
            routed_scaling_factor=2.5,
        ),
    ),
    "mc2-sqrtsoftplus": Form(Strategy.MC2, routing=ROUTING._replace(scoring="sqrtsoftplus")),
    "mc2-eplb": Form(Strategy.MC2, routing=ROUTING._replace(logical_to_physical=torch.arange(EXPERTS).flip(0))),
    "all2all-fixed": Form(Strategy.ALL2ALL, (4, 1, 2), Dispatch.FIXED_CAPACITY),
    "allgather-dp": Form(Strategy.ALLGATHER, (4, 1, 2), reduce_results=True),
    "allgather-pcp": Form(Strategy.ALLGATHER, (2, 4, 1)),
    "allgather-ep": Form(Strategy.ALLGATHER, (4, 1, 2), sharded=True),
    "allgather-ep-ragged": Form(Strategy.ALLGATHER, (4, 1, 2), sharded=True, counts=(6, 3, 4, 5, 9, 1, 0, 2)),
    "allgather-ep-w8a8": Form(Strategy.ALLGATHER, (4, 1, 2), sharded=True, quant=Quant.W8A8),
}
A5_FORMS = {
    "mc2-mxfp8": Form(Strategy.MC2, quant=Quant.MXFP8),
    "mc2-mxfp4": Form(Strategy.MC2, quant=Quant.MXFP4),
    "allgather-ep-mxfp8": Form(Strategy.ALLGATHER, (4, 1, 2), sharded=True, quant=Quant.MXFP8),
}
