"""The blocks of the demo, built and run by `transformers` on one process: where expected results come from."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import MixtralConfig, Qwen3MoeConfig
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
    """Qwen3-MoE and Mixtral with random weights, the same in each run, and what they make of random tokens."""
    qwen3 = Qwen3MoeConfig(moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS, **COMMON)
    mixtral = MixtralConfig(intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, **COMMON)
    make_mixtral: Callable[[MixtralConfig], torch.nn.Module] = MixtralSparseMoeBlock  # which is not annotated
    return [
        # By default Qwen3-MoE leaves the weights of the chosen experts as they are; Mixtral always renormalises them.
        _family("Qwen3-MoE", Qwen3MoeSparseMoeBlock(qwen3), renormalize=qwen3.norm_topk_prob, dtype=dtype, seed=0),
        _family("Mixtral", make_mixtral(mixtral), renormalize=True, dtype=dtype, seed=1),
    ]


def _family(name: str, block: torch.nn.Module, *, renormalize: bool, dtype: torch.dtype, seed: int) -> Family:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, parameter in block.named_parameters():
        # A variance of 1 / inputs keeps values near 1 from layer to layer.
        parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        weights[key] = parameter.data.to(dtype)
        parameter.data = weights[key].double()  # so that the reference itself does not round
    block.eval()
    gate = weights["gate.weight"]
    tokens = [[_draw_tokens(count, gate, generator) for count in counts] for counts in COUNTS]
    return Family(
        name=name,
        routing=mo.Routing(TOP_K, EXPERTS, renormalize=renormalize),
        gate=gate,
        experts=mo.ExpertWeights(weights["experts.gate_up_proj"], weights["experts.down_proj"]),
        replicated=[_case(block, [x for x in of_dp for _ in range(TP)]) for of_dp in tokens],
        sharded=[_case(block, [shard for x in of_dp for shard in _shards(x)]) for of_dp in tokens],
    )


def _draw_tokens(count: int, gate: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random tokens ``[count, H]`` whose choice of experts is beyond doubt.

    Where the last expert chosen and the first left out score the same but for rounding, either choice is right, and the
    results have nothing in common: such tokens are left out.
    """
    drawn = torch.randn(2 * count + 16, HIDDEN, generator=generator).to(gate.dtype)
    logits = drawn.double() @ gate.double().T
    best = logits.topk(TOP_K + 1).values
    is_clear = best[:, -2] - best[:, -1] > 4 * torch.finfo(gate.dtype).eps * logits.abs().amax(dim=1)
    tokens = drawn[is_clear][:count].clone()
    if len(tokens) != count:
        raise RuntimeError(f"_draw_tokens: needs {count} tokens with a clear choice of experts, got {len(tokens)}")
    return tokens


def _shards(tokens: torch.Tensor) -> Sequence[torch.Tensor]:
    """The tokens of a TP group, spread over its ranks; the last may get fewer than the others."""
    first, last = tokens.tensor_split([-(-len(tokens) // TP)])
    return first.clone(), last.clone()


@torch.no_grad()
def _case(block: torch.nn.Module, tokens: list[torch.Tensor]) -> Case:
    """Run the block on each rank's own tokens."""
    return Case(tokens, [block(x.double().unsqueeze(0)).squeeze(0) for x in tokens])
