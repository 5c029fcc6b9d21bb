"""Routing against the oracle and against the routers of Transformers."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

import moe_ops as mo
from moe_ops.route import count_expert_load, route

from .oracle import dense_weights
from .problems import E, by_softmax, routings

H = 16


def dense(topk_weights: torch.Tensor, topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """``[T, E]``: each expert's weight, once for each time it was chosen."""
    columns = torch.zeros(topk_ids.shape[0], num_experts + 1, dtype=torch.float64)
    ids = torch.where(topk_ids >= 0, topk_ids, num_experts).long()
    return columns.scatter_add(1, ids, topk_weights.double())[:, :num_experts]


@given(
    routing=routings(),
    num_tokens=st.integers(0, 20),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shift=st.sampled_from([0, -20]),
)
@settings(max_examples=200)
def test_agrees_with_the_oracle(
    routing: mo.Routing, num_tokens: int, seed: int, dtype: torch.dtype, shift: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randint(-12, 13, (num_tokens, E), generator=generator) / 4 + shift).to(dtype)
    input_ids = torch.randint(-1, 11, (num_tokens,), generator=generator)
    ids = input_ids if routing.token_to_experts is not None else None
    is_active = torch.rand(num_tokens, generator=generator) < 0.8
    logits[~is_active] = torch.nan
    topk_weights, topk_ids = route(logits, routing, is_active=is_active, input_ids=ids)
    assert (topk_weights.dtype, topk_ids.dtype) == (torch.float32, torch.int32)
    assert (topk_ids[~is_active] == -1).all()
    assert (topk_weights[~is_active] == 0).all()
    expected = dense_weights(logits.nan_to_num(), routing, ids)
    expected[~is_active] = 0
    torch.testing.assert_close(dense(topk_weights, topk_ids, E), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("groups", [(None, None), (4, 2)])
def test_ties_go_to_the_lowest_id(scoring: str, groups: tuple[int | None, int | None]) -> None:
    routing = mo.Routing(3, 256, scoring=scoring, num_expert_group=groups[0], topk_group=groups[1])
    _, topk_ids = route(torch.zeros(5, 256), routing)
    assert topk_ids.tolist() == [[0, 1, 2]] * 5


def test_groups_that_are_not_chosen_never_win() -> None:
    """All biased scores are negative: a fill with zeros would let the masked experts win."""
    bias = torch.tensor([-5.0, -5, -6, -6, -7, -7, -8, -8])
    routing = mo.Routing(4, 8, "sigmoid", num_expert_group=4, topk_group=2, e_score_correction_bias=bias)
    _, topk_ids = route(torch.zeros(1, 8), routing)
    assert topk_ids.tolist() == [[0, 1, 2, 3]]


def test_not_even_experts_of_chosen_groups_that_are_disabled_give_way() -> None:
    bias = torch.tensor([0.0, 0, 0, 0, 0, 0, -torch.inf, -torch.inf])
    routing = mo.Routing(3, 8, "sigmoid", num_expert_group=2, topk_group=1, e_score_correction_bias=bias)
    _, topk_ids = route(torch.tensor([[0.0, 0, 0, 0, 2, 2, 1, 1]]), routing)
    assert topk_ids.tolist() == [[4, 5, 6]]


def test_a_hash_table_may_leave_choices_open() -> None:
    table = torch.tensor([[2, -1, 1], [-1, -1, -1]])
    routing = mo.Routing(3, 4, "sigmoid", token_to_experts=table)
    topk_weights, topk_ids = route(torch.zeros(3, 4), routing, input_ids=torch.tensor([0, 1, -1]))
    assert topk_ids.tolist() == [[2, -1, 1], [-1] * 3, [-1] * 3]
    assert topk_weights.tolist() == [[0.5, 0, 0.5], [0.0] * 3, [0.0] * 3]


def test_a_bias_chooses_and_does_not_weigh() -> None:
    bias = torch.tensor([0.0, 0, 0, 9])
    topk_weights, topk_ids = route(
        torch.zeros(1, 4), mo.Routing(1, 4, "sigmoid", renormalize=False, e_score_correction_bias=bias)
    )
    assert (topk_ids.item(), topk_weights.item()) == (3, 0.5)


def test_weights_do_not_underflow_to_nan() -> None:
    topk_weights, _ = route(torch.full((1, 4), -200.0), mo.Routing(2, 4, "sigmoid"))
    assert topk_weights.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "qwen3-renormalised", "gpt-oss", "deepseek-v3"])
def test_agrees_with_the_routers_of_transformers(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, gate = torch.randn(50, H, generator=generator), torch.randn(16, H, generator=generator)
    bias = torch.randn(16, generator=generator) / 4
    common: dict[str, Any] = {"hidden_size": H, "num_experts_per_tok": 4}
    logits = hidden @ gate.T
    if name == "deepseek-v3":
        config = DeepseekV3Config(
            n_routed_experts=16, n_group=4, topk_group=2, norm_topk_prob=True, moe_intermediate_size=4, **common
        )
        router = DeepseekV3TopkRouter(config)
        router.weight.data, router.e_score_correction_bias = gate, bias
        _, weights, ids = router(hidden)
        routing = mo.Routing(
            4,
            16,
            "sigmoid",
            num_expert_group=4,
            topk_group=2,
            e_score_correction_bias=bias,
            routed_scaling_factor=config.routed_scaling_factor,
        )
    elif name == "gpt-oss":
        router = GptOssTopKRouter(GptOssConfig(num_local_experts=16, **common))
        router.weight.data, router.bias.data = gate, bias
        logits = logits + bias
        _, weights, ids = router(hidden)
        routing = mo.Routing(4, 16)
    elif name == "mixtral":
        router = MixtralTopKRouter(MixtralConfig(num_local_experts=16, **common))
        router.weight.data = gate
        _, weights, ids = router(hidden)
        routing = mo.Routing(4, 16)
    else:
        router = Qwen3MoeTopKRouter(Qwen3MoeConfig(num_experts=16, norm_topk_prob=name != "qwen3", **common))
        router.weight.data = gate
        _, weights, ids = router(hidden)
        routing = mo.Routing(4, 16, renormalize=name != "qwen3")
    expected = dense(weights, ids, 16)
    torch.testing.assert_close(dense(*route(logits, routing), 16), expected, rtol=1e-5, atol=1e-6)


@given(top_k=st.integers(1, 4), num_tokens=st.integers(0, 30), num_experts=st.integers(1, 9))
def test_expert_load_counts_every_choice(top_k: int, num_tokens: int, num_experts: int) -> None:
    topk_ids = torch.randint(-1, num_experts, (num_tokens, top_k))
    load = count_expert_load(topk_ids, num_experts=num_experts)
    assert load.tolist() == [(topk_ids == expert).sum().item() for expert in range(num_experts)]


def test_replicas_take_turns() -> None:
    table = torch.tensor([[0, 4, 5], [-1, 1, -1], [2, -1, 3]])
    routing = mo.Routing(1, 3, logical_to_physical=table, num_redundant_experts=3)
    logits = torch.tensor([[9.0, 0, 0]] * 4 + [[0, 9.0, 0]] + [[0, 0, 9.0]] * 2)
    _, topk_ids = route(logits, routing)
    assert topk_ids.flatten().tolist() == [0, 4, 5, 0, 1, 3, 2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"top_k": 9}, r"top_k must be in \[1, 8\] \(experts\), got 9"),
        ({"scoring": "tanh"}, r"scoring must be one of .*, got 'tanh'"),
        ({"num_experts": 9}, r"router_logits must be \[T, 9\], got \(2, 8\)"),
        ({"num_expert_group": 4}, "num_expert_group and topk_group must be given together, got 4 and None"),
        ({"num_expert_group": 3, "topk_group": 1}, "num_expert_group must divide 8 experts, got 3"),
        ({"num_expert_group": 8, "topk_group": 1}, "must hold top_k = 2 experts, got 1"),
        ({"e_score_correction_bias": torch.zeros(7)}, r"e_score_correction_bias must be \[8\], got \(7,\)"),
        ({"logical_to_physical": torch.zeros(7).int()}, r"logical_to_physical must be of 8 experts, got \(7,\)"),
        ({"num_expert_group": 2, "topk_group": 0}, "must hold top_k = 2 experts, got 0"),
        ({"token_to_experts": torch.zeros(5, 2, dtype=torch.int64)}, "input_ids must be given with token_to_experts"),
    ],
)
def test_bad_input_names_the_argument(changed: dict[str, Any], message: str) -> None:
    routing = mo.Routing(2, 8)._replace(**changed)
    with pytest.raises(ValueError, match=f"route: .*{message}|route: {message}"):
        route(torch.zeros(2, 8), routing)


@given(num_tokens=st.integers(0, 20), seed=st.integers(0, 1000))
def test_a_function_of_the_caller_routes(num_tokens: int, seed: int) -> None:
    """Choices of -1 and rows that are not active go nowhere, whatever it weighs them with; the weights are not touched."""
    generator = torch.Generator().manual_seed(seed)
    hidden, logits, weights = (torch.randn(num_tokens, n, generator=generator) for n in (H, E, 3))
    ids = torch.randint(-1, E, (num_tokens, 3), generator=generator)
    is_active = torch.rand(num_tokens, generator=generator) < 0.7
    weights[~is_active] = torch.nan
    seen = []

    def select(*given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(given)
        return weights.double().to(torch.bfloat16), ids

    routing = mo.Routing(3, E, renormalize=True, routed_scaling_factor=2.0, select_experts=select)
    topk_weights, topk_ids = route(logits, routing, is_active=is_active, hidden_states=hidden)
    assert seen[0][0] is hidden and seen[0][1] is logits and seen[0][2] is None
    is_choice = (ids >= 0) & is_active.unsqueeze(1)
    assert (topk_weights.dtype, topk_ids.dtype) == (torch.float32, torch.int32)
    assert torch.equal(topk_ids, torch.where(is_choice, ids, -1).int())
    assert torch.equal(topk_weights, torch.where(is_choice, weights.to(torch.bfloat16).float(), 0.0))


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        ((torch.ones(2, 3), torch.zeros(2, 2).long()), ValueError, r"topk_weights of select_experts must be \[T, 2\]"),
        ((torch.ones(2, 2), torch.zeros(2).long()), ValueError, "topk_ids of select_experts must be 2-D"),
        ((torch.ones(3, 2), torch.zeros(2, 2).long()), ValueError, "rows of topk_weights of select_experts must be"),
        ((torch.ones(2, 2), torch.zeros(2, 2)), TypeError, "topk_ids of select_experts must"),
        ((torch.ones(2, 2).int(), torch.zeros(2, 2).long()), TypeError, "topk_weights of select_experts must"),
    ],
)
def test_what_a_function_of_the_caller_may_not_return(chosen: Any, error: type[Exception], message: str) -> None:
    routing = mo.Routing(2, E, select_experts=lambda *_: chosen)
    with pytest.raises(error, match=message):
        route(torch.zeros(2, E), routing, hidden_states=torch.zeros(2, H))


def test_a_function_of_the_caller_needs_hidden_states() -> None:
    with pytest.raises(ValueError, match="hidden_states must be given for select_experts, got None"):
        route(torch.zeros(2, E), mo.Routing(2, E, select_experts=lambda *_: None))


def test_the_reference_takes_a_function_of_the_caller() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, logits = (torch.randn(5, n, generator=generator) for n in (H, E))
    w13, w2 = torch.randn(E, 8, H, generator=generator), torch.randn(E, H, 4, generator=generator)
    plain, by_caller = mo.Routing(2, E), mo.Routing(2, E, select_experts=by_softmax)
    found, wanted = (
        mo.reference.moe_stage(hidden, logits, mo.ExpertWeights(w13, w2), routing=routing)
        for routing in (by_caller, plain)
    )
    torch.testing.assert_close(found, wanted)
