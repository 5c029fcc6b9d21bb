"""Transformers: the experts of Qwen3-MoE, by its ``grouped_mm`` implementation."""

import warnings

import torch

import moe_ops as mo
from benchmarks.contest import Entry, Implementation
from benchmarks.layer import EXPERTS as NUM_EXPERTS
from benchmarks.layer import HIDDEN, INTERMEDIATE, Weights


def build_experts(weights: Weights, _: mo.Group) -> Implementation:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    warnings.filterwarnings(
        "ignore", message="Dynamo detected a call to a `functools.lru_cache`"
    )  # of its version checks
    config = Qwen3MoeConfig(
        num_experts=NUM_EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, hidden_act="silu"
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(weights.w13, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(weights.w2, requires_grad=False)
    return Implementation(experts, lambda batch: batch)


EXPERTS = Entry("transformers", build_experts, requires="transformers")
