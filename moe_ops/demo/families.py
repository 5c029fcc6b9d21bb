"""The blocks of the demo, built and run by `transformers` on one process: where expected results come from."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moe_ops as mo
from moe_ops.demo.cases import COUNTS, EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, TP, Case, Family

COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_experts_per_tok": TOP_K,
    "experts_implementation": "eager",  # the plain loop over experts
}


def build_families(dtype: torch.dtype) -> list[Family]:
    """Qwen3-MoE, Mixtral and DeepSeek-V3 with random weights, the same in each run, and what they make of random tokens."""
    qwen3 = Qwen3MoeConfig(moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS, **COMMON)
    mixtral = MixtralConfig(intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, **COMMON)
    deepseek = DeepseekV3Config(
        moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=EXPERTS,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        **COMMON,
    )
    make_mixtral: Callable[[MixtralConfig], torch.nn.Module] = MixtralSparseMoeBlock  # which is not annotated
    # By default Qwen3-MoE leaves the weights of the chosen experts as they are; Mixtral always renormalises them.
    plain = mo.Routing(TOP_K, EXPERTS, renormalize=qwen3.norm_topk_prob)
    grouped = mo.Routing(
        TOP_K,
        EXPERTS,
        scoring="sigmoid",
        renormalize=bool(deepseek.norm_topk_prob),
        num_expert_group=deepseek.n_group,
        topk_group=deepseek.topk_group,
        routed_scaling_factor=deepseek.routed_scaling_factor,
    )
    return [
        _family("Qwen3-MoE", Qwen3MoeSparseMoeBlock(qwen3), plain, dtype=dtype, seed=0),
        _family("Mixtral", make_mixtral(mixtral), plain._replace(renormalize=True), dtype=dtype, seed=1),
        _family("DeepSeek-V3", DeepseekV3MoE(deepseek), grouped, dtype=dtype, seed=2),
    ]


def _family(name: str, block: torch.nn.Module, routing: mo.Routing, *, dtype: torch.dtype, seed: int) -> Family:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, parameter in block.named_parameters():
        # A variance of 1 / inputs keeps values near 1 from layer to layer.
        parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        weights[key] = parameter.data.to(dtype)
        parameter.data = weights[key].double()  # so that the reference itself does not round
    block.eval()
    shared = None
    if routing.num_expert_group is not None:
        bias = torch.randn(EXPERTS, generator=generator) / 8
        block.get_submodule("gate").e_score_correction_bias = bias.double()
        routing = routing._replace(e_score_correction_bias=bias)
        gate_and_up = [weights[f"shared_experts.{part}_proj.weight"] for part in ("gate", "up")]
        down = weights["shared_experts.down_proj.weight"]
        shared = mo.SharedExperts(torch.cat(gate_and_up), down, is_tp_sharded=True)
    gate = weights["gate.weight"]
    tokens = [[_draw_tokens(count, gate, routing, generator) for count in counts] for counts in COUNTS]
    return Family(
        name=name,
        routing=routing,
        gate=gate,
        experts=mo.ExpertWeights(weights["experts.gate_up_proj"], weights["experts.down_proj"]),
        shared=shared,
        replicated=[_case(block, [x for x in of_dp for _ in range(TP)]) for of_dp in tokens],
        sharded=[_case(block, [shard for x in of_dp for shard in _shards(x)]) for of_dp in tokens],
    )


def _draw_tokens(count: int, gate: torch.Tensor, routing: mo.Routing, generator: torch.Generator) -> torch.Tensor:
    """Random tokens ``[count, H]`` whose choice of experts is beyond doubt.

    Where the last expert chosen and the first left out score the same but for rounding, either choice is right, and the
    results have nothing in common: such tokens are left out.
    """
    drawn = torch.randn(16 * count + 64, HIDDEN, generator=generator).to(gate.dtype)
    logits = drawn.double() @ gate.double().T
    # Neither a softmax nor a sigmoid moves scores apart by more than the logits, nor does the sum of two by more than twice.
    is_clear = _margins(logits, routing) > 8 * torch.finfo(gate.dtype).eps * logits.abs().amax(dim=1)
    tokens = drawn[is_clear][:count].clone()
    if len(tokens) != count:
        raise RuntimeError(f"_draw_tokens: needs {count} tokens with a clear choice of experts, got {len(tokens)}")
    return tokens


def _margins(logits: torch.Tensor, routing: mo.Routing) -> torch.Tensor:
    """By how much each token prefers the last expert, and the last group, that it chooses to the next."""
    if routing.e_score_correction_bias is None or routing.num_expert_group is None or routing.topk_group is None:
        return _gap(logits, TOP_K)
    choice = logits.sigmoid() + routing.e_score_correction_bias.double()
    groups = choice.unflatten(1, (routing.num_expert_group, -1))
    of_groups = groups.topk(2, dim=2).values.sum(dim=2)
    is_chosen = of_groups >= of_groups.topk(routing.topk_group, dim=1).values[:, -1:]
    allowed = torch.where(is_chosen.unsqueeze(2), groups, -torch.inf).flatten(1)
    return torch.minimum(_gap(of_groups, routing.topk_group), _gap(allowed, TOP_K))


def _gap(scores: torch.Tensor, count: int) -> torch.Tensor:
    best = scores.topk(count + 1, dim=1).values
    return best[:, -2] - best[:, -1]


def _shards(tokens: torch.Tensor) -> Sequence[torch.Tensor]:
    """The tokens of a TP group, spread over its ranks; the last may get fewer than the others."""
    first, last = tokens.tensor_split([-(-len(tokens) // TP)])
    return first.clone(), last.clone()


@torch.no_grad()
def _case(block: torch.nn.Module, tokens: list[torch.Tensor]) -> Case:
    """Run the block on each rank's own tokens."""
    return Case(tokens, [block(x.double().unsqueeze(0)).squeeze(0) for x in tokens])
