"""The MoE blocks of Transformers, computed by themselves in float64, against the stage on 1, 2 and 4 real ranks."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moe_ops as mo
from moe_ops import Dispatch, Strategy

from .ranks import RankPool, groups_of

H, I, E, K = 24, 16, 8, 3
COMMON: dict[str, Any] = {"hidden_size": H, "num_experts_per_tok": K, "experts_implementation": "eager"}
COUNTS = [13, 0, 6, 1]
FORMS = [
    (Strategy.ALL2ALL, Dispatch.ALL_TO_ALL, False),
    (Strategy.ALL2ALL, Dispatch.FIXED_CAPACITY, False),
    (Strategy.ALLGATHER, Dispatch.LOCAL, False),
    (Strategy.ALL2ALL, Dispatch.ALL_TO_ALL, True),
    (Strategy.ALLGATHER, Dispatch.LOCAL, True),
]


class Layer(NamedTuple):
    """What the stage is given of a block."""

    gate: torch.Tensor
    gate_bias: torch.Tensor
    experts: mo.ExpertWeights
    routing: mo.Routing
    shared: mo.SharedExperts | None = None


def make_block(family: str) -> torch.nn.Module:
    if family == "mixtral":
        return MixtralSparseMoeBlock(MixtralConfig(intermediate_size=I, num_local_experts=E, **COMMON))
    if family == "qwen3":
        return Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(moe_intermediate_size=I, num_experts=E, **COMMON))
    if family == "qwen2":
        config = Qwen2MoeConfig(
            moe_intermediate_size=I, shared_expert_intermediate_size=I, num_experts=E, norm_topk_prob=False, **COMMON
        )
        return Qwen2MoeSparseMoeBlock(config)
    if family == "gpt-oss":
        return GptOssMLP(GptOssConfig(intermediate_size=I, num_local_experts=E, **COMMON))
    config = DeepseekV3Config(
        moe_intermediate_size=I, n_routed_experts=E, n_group=4, topk_group=2, n_shared_experts=2, **COMMON
    )
    return DeepseekV3MoE(config)


def fill(block: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random weights and buffers, as float32; the block itself gets them as float64."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, tensor in [*block.named_parameters(), *block.named_buffers()]:
        weights[key] = torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5
        tensor.data = weights[key].double()
    return weights


def layer_of(family: str, weights: dict[str, torch.Tensor]) -> Layer:
    no_bias = torch.zeros(E)
    if family == "gpt-oss":  # which holds its weights transposed
        experts = mo.ExpertWeights(
            weights["experts.gate_up_proj"].transpose(1, 2).contiguous(),
            weights["experts.down_proj"].transpose(1, 2).contiguous(),
            weights["experts.gate_up_proj_bias"],
            weights["experts.down_proj_bias"],
            activation="swigluoai",
        )
        return Layer(weights["router.weight"], weights["router.bias"], experts, mo.Routing(K, E))
    experts = mo.ExpertWeights(weights["experts.gate_up_proj"], weights["experts.down_proj"])
    plain = Layer(weights["gate.weight"], no_bias, experts, mo.Routing(K, E, renormalize=family == "mixtral"))
    if family not in ("deepseek-v3", "qwen2"):
        return plain
    name = "shared_experts" if family == "deepseek-v3" else "shared_expert"
    gate, up, down = (weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    shared = mo.SharedExperts(torch.cat([gate, up]), down, False, weights.get("shared_expert_gate.weight"))
    if family == "qwen2":
        return plain._replace(shared=shared)
    routing = mo.Routing(
        K,
        E,
        "sigmoid",
        num_expert_group=4,
        topk_group=2,
        e_score_correction_bias=weights["gate.e_score_correction_bias"],
        routed_scaling_factor=2.5,
    )
    return plain._replace(routing=routing, shared=shared)


def tokens_of(owner: int) -> torch.Tensor:
    return torch.randn(COUNTS[owner], H, generator=torch.Generator().manual_seed(owner))


def run_layer(rank: int, layer: Layer, topology: tuple[int, int, int], is_shared_sharded: bool) -> list[torch.Tensor]:
    """The result of every form, and of MC2."""
    groups, ranks = groups_of(*topology), math.prod(topology)
    per_rank = E // ranks
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    parts = [x[mine].clone() if isinstance(x, torch.Tensor) else x for x in layer.experts]
    experts, shared = mo.ExpertWeights(*parts), layer.shared
    if shared is not None and is_shared_sharded:
        gate, up = (half.chunk(groups.tp.size)[groups.tp.rank] for half in shared.w13.chunk(2))
        down = shared.w2.chunk(groups.tp.size, dim=1)[groups.tp.rank].clone()
        shared = shared._replace(w13=torch.cat([gate, up]), w2=down, is_tp_sharded=True)
    results = []
    for strategy, dispatch, sharded in [*FORMS, (Strategy.MC2, Dispatch.FIXED_CAPACITY, False)]:
        owners = [other if sharded else other // topology[2] for other in range(ranks)]
        hidden = tokens_of(owners[rank])
        result = mo.moe_stage(
            hidden,
            torch.nn.functional.linear(hidden, layer.gate, layer.gate_bias),
            experts,
            layer.routing,
            mo.Layout(strategy, groups, dispatch, tokens_are_sharded=sharded),
            lengths=mo.Lengths(per_rank=[COUNTS[owner] for owner in owners]),
            shared_experts=shared,
            reduce_results=True,
        )
        results.append(result)
    return results


TOPOLOGIES = [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 1, 4), (4, 1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3", "qwen2", "gpt-oss", "deepseek-v3"])
def test_blocks(
    family: str, topology: tuple[int, int, int], ranks1: RankPool, ranks2: RankPool, ranks4: RankPool
) -> None:
    block = make_block(family)
    layer = layer_of(family, fill(block))
    num_ranks = math.prod(topology)
    pool = {1: ranks1, 2: ranks2, 4: ranks4}[num_ranks]
    for is_shared_sharded in (False, True) if layer.shared is not None else (False,):
        answers = pool.run(run_layer, layer, topology, is_shared_sharded)
        for rank, results in enumerate(answers):
            for (_, _, sharded), result in zip([*FORMS, (None, None, False)], results, strict=True):
                tokens = tokens_of(rank if sharded else rank // topology[2])
                with torch.no_grad():
                    expected = block(tokens.double().unsqueeze(0))
                expected = (expected[0] if isinstance(expected, tuple) else expected).squeeze(0)
                torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)
