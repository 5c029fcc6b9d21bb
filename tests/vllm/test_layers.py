"""MoE layers as vLLM's models make them, on one rank: every way to route, weights of every kind, and what is left to vLLM."""

import logging
import re
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.utils import weights_already_processed

import moe_ops as mo
from moe_ops.integrations.vllm.runner import MoeOpsRunner, _with_key, install
from moe_ops.integrations.vllm.settings import KEY, read_settings
from moe_ops.integrations.vllm.support import why_not

from ..oracle import dense_moe

E, H, I, TOP_K, VOCABULARY = 8, 64, 32, 2, 11


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1, 1)
    yield
    cleanup_dist_env_and_memory()


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmConfig]:
    """The plugin is in vLLM."""
    monkeypatch.delitem(op_registry_oot, "MoERunner", raising=False)
    install()
    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    with set_current_vllm_config(config):
        yield config
    op_registry_oot.pop("MoERunner", None)


def make_layer(config: VllmConfig, prefix: str = "layer", seed: int = 0, **arguments: Any) -> Any:
    """A layer with random weights, which are not packed yet."""
    routed = {"num_experts": E, "top_k": TOP_K, "hidden_size": H, "intermediate_size": I}
    layer = FusedMoEFactory(**{**routed, "prefix": prefix, "params_dtype": torch.float32, **arguments})
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.routed_experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return layer


def pack(layer: Any) -> None:
    layer.routed_experts.quant_method.process_weights_after_loading(layer.routed_experts)


def plain_weights(layer: Any) -> mo.ExpertWeights:
    """A copy of them, before they are packed."""
    named = dict(layer.routed_experts.named_parameters())
    weights = [
        named[name].clone() if name in named else None for name in ("w13_weight", "w2_weight", "w13_bias", "w2_bias")
    ]
    return mo.ExpertWeights(*weights, activation=layer.activation.value)


def inputs(count: int = 7, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, logits = (torch.randn(count, width, generator=generator) for width in (H, E))
    return hidden, logits, torch.randint(VOCABULARY, (count,), generator=generator)


def call(layer: Any, config: VllmConfig, *tensors: torch.Tensor) -> torch.Tensor:
    with set_forward_context(None, config, num_tokens=tensors[0].shape[0]):
        output: torch.Tensor = layer(*(tensor.clone() for tensor in tensors))
        return output


def second_best(
    hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A routing function as a model may have it."""
    values, ids = gating_output.topk(topk + 1, dim=1)
    return values[:, 1:].sigmoid(), ids[:, 1:].to(torch.int32)


def second_best_of_oracle(
    hidden_states: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return second_best(hidden_states, router_logits, TOP_K, False)


BIAS = torch.randn(E, generator=torch.Generator().manual_seed(2))
TABLE = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(i))[:TOP_K] for i in range(VOCABULARY)])
ROUTING = mo.Routing(TOP_K, E)
GROUPS = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}


class Case(NamedTuple):
    """Arguments of a layer, and what the oracle is told; whether vLLM itself runs it, with so few experts, on a CPU."""

    arguments: dict[str, Any]
    routing: mo.Routing = ROUTING
    runs_in_stock: bool = True


CASES = {
    "softmax": Case({}),
    "softmax-raw": Case({"renormalize": False}, ROUTING._replace(renormalize=False)),
    "softmax-bias": Case({"e_score_correction_bias": BIAS}, ROUTING._replace(e_score_correction_bias=BIAS), False),
    "sigmoid": Case({"scoring_func": "sigmoid"}, ROUTING._replace(scoring="sigmoid"), False),
    "groups": Case(GROUPS, ROUTING._replace(num_expert_group=4, topk_group=2)),
    "groups-bias": Case(
        {**GROUPS, "scoring_func": "sigmoid", "e_score_correction_bias": BIAS, "routed_scaling_factor": 2.5},
        mo.Routing(TOP_K, E, "sigmoid", True, 4, 2, BIAS, 2.5),
    ),
    "scaled-output": Case(
        {**GROUPS, "routed_scaling_factor": 2.5, "apply_routed_scale_to_output": True},
        ROUTING._replace(num_expert_group=4, topk_group=2, routed_scaling_factor=2.5),
    ),
    "sqrtsoftplus": Case(
        {"scoring_func": "sqrtsoftplus", "e_score_correction_bias": BIAS, "routed_scaling_factor": 1.5},
        ROUTING._replace(scoring="sqrtsoftplus", e_score_correction_bias=BIAS, routed_scaling_factor=1.5),
        False,
    ),
    "hash": Case(
        {"scoring_func": "sqrtsoftplus", "hash_indices_table": TABLE.to(torch.int32)},
        ROUTING._replace(scoring="sqrtsoftplus", token_to_experts=TABLE),
        False,
    ),
    "custom": Case(
        {"custom_routing_function": second_best},
        ROUTING._replace(select_experts=second_best_of_oracle),
    ),
    "weighed-input": Case(
        {"top_k": 1, "renormalize": False, "apply_router_weight_on_input": True},
        mo.Routing(1, E, renormalize=False, apply_router_weight_on_input=True),
    ),
    "biases": Case({"has_bias": True}),
    "swigluoai": Case({"activation": "swigluoai", "has_bias": True, "swiglu_limit": 7.0}),
    "gelu": Case({"activation": "gelu"}),
    "gelu-tanh": Case({"activation": "gelu_pytorch_tanh"}),
    "narrow": Case({"intermediate_size": 24}),
    "narrow-biases": Case({"intermediate_size": 24, "has_bias": True}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layers(config: VllmConfig, case: Case) -> None:
    layer = make_layer(config, **case.arguments)
    assert isinstance(layer, MoeOpsRunner) and layer.plan is not None
    weights = plain_weights(layer)
    pack(layer)
    assert layer.routed_experts.quant_method.layout is mo.WeightLayout.VLLM_CPU
    for count in (0, 1, 7):
        hidden, logits, ids = inputs(count)
        found = call(layer, config, hidden, logits, ids)
        expected = expected_of(case.routing, hidden, logits, ids, weights)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    if case.runs_in_stock:
        del op_registry_oot["MoERunner"]
        stock = make_layer(config, "stock", **case.arguments)
        assert not isinstance(stock, MoeOpsRunner)
        pack(stock)
        torch.testing.assert_close(found, call(stock, config, hidden, logits, ids), rtol=1e-4, atol=1e-5)


def expected_of(
    routing: mo.Routing, hidden: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, weights: mo.ExpertWeights
) -> torch.Tensor:
    if routing.select_experts is None:
        return dense_moe(hidden, logits, weights, routing, input_ids=ids)
    return mo.reference.moe_stage(hidden, logits, weights, routing=routing).double()


def test_shared_experts_and_a_gate_of_the_runner(config: VllmConfig) -> None:
    """Qwen3's block hands the runner hidden states for logits, and its gate."""

    class Gate(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return super().forward(x), None

    gate, shared = Gate(H, E, bias=False), torch.nn.Linear(H, H)
    layer = make_layer(config, gate=gate, shared_experts=shared)
    weights = plain_weights(layer)
    pack(layer)
    hidden, _, _ = inputs()
    with torch.no_grad():
        logits, beside = torch.nn.functional.linear(hidden, gate.weight), shared(hidden)
        found = call(layer, config, hidden, hidden)
    torch.testing.assert_close(
        found.double(), dense_moe(hidden, logits, weights, ROUTING) + beside, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("is_recorded", [True, False])
def test_copies_of_experts_by_the_maps_of_the_engine(config: VllmConfig, is_recorded: bool) -> None:
    layer = make_layer(config, enable_eplb=True, num_redundant_experts=2)
    slots = torch.tensor([[9, 4], [0, -1], [1, 8], [2, -1], [3, -1], [5, -1], [6, -1], [7, -1]])
    physical = plain_weights(layer)
    logical = physical._replace(w13=physical.w13[slots[:, 0]].clone(), w2=physical.w2[slots[:, 0]].clone())
    for name, weight in {"w13_weight": logical.w13, "w2_weight": logical.w2}.items():
        for expert, copies in enumerate(slots.tolist()):
            for slot in copies:
                if slot >= 0:
                    getattr(layer.routed_experts, name).data[slot] = weight[expert]
    pack(layer)
    load = torch.zeros(1, E + 2, dtype=torch.int32)
    layer.set_eplb_state(0, load, slots[None], (slots >= 0).sum(1)[None])
    layer.eplb_state.should_record_tensor = torch.tensor(is_recorded)
    hidden, logits, _ = inputs()
    found = call(layer, config, hidden, logits)
    torch.testing.assert_close(found.double(), dense_moe(hidden, logits, logical, ROUTING), rtol=1e-4, atol=1e-5)
    chosen = logits.topk(TOP_K, dim=1).indices
    for expert, copies in enumerate(slots.tolist()):
        recorded = sum(int(load[0, slot]) for slot in copies if slot >= 0)
        assert recorded == (int((chosen == expert).sum()) if is_recorded else 0)


def test_weights_can_be_updated(config: VllmConfig) -> None:
    """As reinforcement learning does: in the memory that compiled code knows."""
    layer = make_layer(config)
    pack(layer)
    experts = layer.routed_experts
    address = experts.w13_weight.data_ptr()
    new = make_layer(config, "new", seed=5)
    weights = plain_weights(new)
    experts.w13_weight.data.copy_(weights.w13)
    experts.w2_weight.data.copy_(weights.w2)
    pack(layer)
    assert experts.w13_weight.data_ptr() == address
    hidden, logits, _ = inputs()
    found = call(layer, config, hidden, logits)
    torch.testing.assert_close(found.double(), dense_moe(hidden, logits, weights, ROUTING), rtol=1e-4, atol=1e-5)


def test_weights_that_another_process_packed_are_refused(config: VllmConfig) -> None:
    """Or they would be packed twice."""
    layer = make_layer(config)
    model = SimpleNamespace(word_embeddings_untied_by_checkpoint=False, quantization=None)
    with weights_already_processed(), pytest.raises(RuntimeError, match="PlainExperts does not support pre-processed"):
        process_weights_after_loading(layer, model, torch.device("cpu"))


REASONS: dict[str, tuple[Callable[[Any, VllmConfig], Any], str]] = {
    "quantised": (
        lambda layer, _: setattr(layer.routed_experts, "quant_method", torch.nn.Module()),
        r"quantised \(Module\)",
    ),
    "dtype": (
        lambda layer, _: setattr(layer.routed_experts, "params_dtype", torch.float64),
        "weights are torch.float64",
    ),
    "limit": (lambda layer, _: setattr(layer.routed_experts, "swiglu_limit", 5.0), r"SwiGLU are \(5.0, None, None\)"),
    "uneven": (lambda layer, _: setattr(layer.moe_config.moe_parallel_config, "ep_size", 3), "8 experts .* by 3 ranks"),
    "dbo": (lambda layer, _: setattr(layer, "enable_dbo", True), "dual-batch overlap"),
    "lora": (lambda layer, _: setattr(layer.moe_config, "is_lora_enabled", True), "LoRA"),
    "config": (lambda _, config: setattr(config, "additional_config", object()), "no dict but object"),
}


@pytest.mark.parametrize(("change", "reason"), REASONS.values(), ids=REASONS)
def test_what_is_left_to_vllm(config: VllmConfig, change: Callable[[Any, VllmConfig], Any], reason: str) -> None:
    del op_registry_oot["MoERunner"]
    layer = make_layer(config)  # vLLM's own
    assert why_not(layer, config) is None
    change(layer, config)
    found = why_not(layer, config)
    assert found is not None and re.search(reason, found), found


def test_a_layer_that_is_left_to_vllm_runs_there(config: VllmConfig, caplog: pytest.LogCaptureFixture) -> None:
    """And the log says why, once."""
    with caplog.at_level(logging.WARNING, "vllm.moe_ops.integrations.vllm.runner"):
        layers = [make_layer(config, f"layer{index}", swiglu_limit=6.0) for index in range(2)]
    assert [layer.plan for layer in layers] == [None, None]
    lines = [record.message for record in caplog.records if "moe_ops" in record.name]
    assert lines == [
        "moe_ops: a layer is left to vLLM, because limit, alpha and beta of its SwiGLU are (6.0, None, None)."
    ]
    del op_registry_oot["MoERunner"]
    layers.append(make_layer(config, "stock", swiglu_limit=6.0))
    assert not isinstance(layers[2], MoeOpsRunner)
    for layer in layers:
        pack(layer)
    hidden, logits, _ = inputs()
    expected = call(layers[2], config, hidden, logits)
    for layer in layers[:2]:
        torch.testing.assert_close(call(layer, config, hidden, logits), expected)


def test_the_cache_key_tells_the_plugin_and_its_settings(config: VllmConfig) -> None:
    keys = {config.compute_hash()}
    make_layer(config)
    assert set(config.additional_config) == {KEY, f"{KEY}_version", f"{KEY}_forms"}
    keys.add(config.compute_hash())
    users = {KEY: {"packed_payload": False}}
    config.additional_config = users
    make_layer(config, "other")
    assert users == {KEY: {"packed_payload": False}}  # it may serve for another engine
    keys.add(config.compute_hash())
    config.additional_config = _with_key(config.additional_config, read_settings(config.additional_config), "MC2")
    keys.add(config.compute_hash())
    assert len(keys) == 4
