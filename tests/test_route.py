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
from .problems import E, routings

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
    chosen=st.sampled_from(["by-logits", "ids", "ids-and-weights"]),
)
@settings(max_examples=200)
def test_agrees_with_the_oracle(
    routing: mo.Routing, num_tokens: int, seed: int, dtype: torch.dtype, shift: int, chosen: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randint(-12, 13, (num_tokens, E), generator=generator) / 4 + shift).to(dtype)
    shape = num_tokens, routing.top_k
    ids = None if chosen == "by-logits" else torch.randint(-2, E + 2, shape, generator=generator)
    weights = torch.randn(shape, generator=generator).to(dtype) if chosen == "ids-and-weights" else None
    is_active = torch.rand(num_tokens, generator=generator) < 0.8
    logits[~is_active] = torch.nan
    given_logits = logits if weights is None else None
    topk_weights, topk_ids = route(given_logits, routing, is_active=is_active, topk_ids=ids, topk_weights=weights)
    assert (topk_weights.dtype, topk_ids.dtype) == (torch.float32, torch.int32)
    assert (topk_ids[~is_active] == -1).all()
    assert (topk_weights[~is_active] == 0).all()
    expected = dense_weights(logits.nan_to_num(), routing, ids, weights).sum(0)
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


def test_a_choice_may_leave_places_open() -> None:
    """As a hash table does for tokens that have fewer experts; what is no expert's id is open, too."""
    table = torch.tensor([[2, -1, 1], [-1, -1, -1], [4, -7, 3]])
    topk_weights, topk_ids = route(torch.zeros(4, 4), mo.Routing(3, 4, "sigmoid"), topk_ids=table[[0, 1, 1, 2]])
    assert topk_ids.tolist() == [[2, -1, 1], [-1] * 3, [-1] * 3, [-1, -1, 3]]
    assert topk_weights.tolist() == [[0.5, 0, 0.5], [0.0] * 3, [0.0] * 3, [0, 0, 1]]


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
        ({"num_expert_group": 2, "topk_group": 0}, "must hold top_k = 2 experts, got 0"),
    ],
)
def test_bad_input_names_the_argument(changed: dict[str, Any], message: str) -> None:
    routing = mo.Routing(2, 8)._replace(**changed)
    with pytest.raises(ValueError, match=f"route: .*{message}|route: {message}"):
        route(torch.zeros(2, 8), routing)


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        ({"topk_ids": torch.zeros(2, 3).long()}, ValueError, r"columns of topk_ids must be routing\.top_k = 2, got 3"),
        ({"topk_ids": torch.zeros(2).long()}, ValueError, "topk_ids must be 2-D"),
        (
            {"topk_ids": torch.zeros(3, 2).long()},
            ValueError,
            "rows of topk_ids must be those of router_logits = 2, got 3",
        ),
        ({"topk_ids": torch.zeros(2, 2)}, TypeError, "topk_ids must have one of the dtypes"),
        ({"topk_weights": torch.ones(2, 2)}, ValueError, "topk_ids must be given with topk_weights, got None"),
        (
            {"topk_ids": torch.zeros(2, 2).long(), "topk_weights": torch.ones(2, 3)},
            ValueError,
            r"columns of topk_weights must be routing\.top_k = 2, got 3",
        ),
        (
            {"topk_ids": torch.zeros(2, 2).long(), "topk_weights": torch.ones(3, 2)},
            ValueError,
            "rows of topk_weights must be those of topk_ids = 2, got 3",
        ),
        (
            {"topk_ids": torch.zeros(2, 2).long(), "topk_weights": torch.ones(2, 2).int()},
            TypeError,
            "topk_weights must have one of the dtypes",
        ),
    ],
)
def test_what_may_not_be_chosen(chosen: dict[str, torch.Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        route(torch.zeros(2, E), mo.Routing(2, E), **chosen)


def test_logits_are_needed_without_weights() -> None:
    with pytest.raises(ValueError, match="router_logits must be given without topk_weights, got None"):
        route(None, mo.Routing(2, E), topk_ids=torch.zeros(2, 2).long())


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_experts", [24, 7, 256])
def test_no_token_depends_on_its_batch(scoring: str, dtype: torch.dtype, num_experts: int) -> None:
    """Wherever a row stands, its choice and its weights are the same to the bit."""
    routing = mo.Routing(2, num_experts, scoring, routed_scaling_factor=2.5)
    generator = torch.Generator().manual_seed(0)
    equal = torch.full((3, num_experts), 0.3)
    logits = torch.cat([torch.randn(200, num_experts, generator=generator) * 4, equal]).to(dtype)
    weights, ids = route(logits, routing)
    assert ids[-3:].tolist() == [[0, 1]] * 3
    for rows in (slice(0, 1), slice(1, 3), slice(5, 22), slice(202, 203)):
        alone = route(logits[rows].clone(), routing)
        assert torch.equal(alone[0], weights[rows])
        assert torch.equal(alone[1], ids[rows])
    strided = logits.t().contiguous().t()
    assert torch.equal(route(strided, routing)[0], weights)
