"""MoE layers as vLLM's models make them, on one rank: every way to route, and weights of every kind."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from vllm.config import VllmConfig
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.utils import weights_already_processed

import moe_ops as mo
from moe_ops.integrations.vllm.runner import MoeOpsRunner

from ..oracle import dense_moe
from .layers import TOP_K, VOCABULARY, E, H, call, inputs, make_layer, pack, plain_weights


def second_best(
    hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A routing function as a model may have it."""
    values, ids = gating_output.topk(topk + 1, dim=1)
    return values[:, 1:].sigmoid(), ids[:, 1:].to(torch.int32)


Choice = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


def choose_second_best(
    logits: torch.Tensor, input_ids: torch.Tensor, top_k: int = TOP_K
) -> tuple[torch.Tensor, torch.Tensor]:
    order = logits.argsort(dim=1, descending=True)[:, 1 : top_k + 1]
    return order, 1 / (1 + (-logits.gather(1, order).double()).exp())


def look_up(logits: torch.Tensor, input_ids: torch.Tensor) -> tuple[torch.Tensor, None]:
    rows = [TABLE[token] if token >= 0 else torch.full((TOP_K,), -1) for token in input_ids.tolist()]
    return torch.stack(rows) if rows else TABLE[:0], None


BIAS = torch.randn(E, generator=torch.Generator().manual_seed(2))
TABLE = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(i))[:TOP_K] for i in range(VOCABULARY)])
ROUTING = mo.Routing(TOP_K, E)
GROUPS = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}


class Case(NamedTuple):
    """Arguments of a layer, and what the oracle is told; whether vLLM itself runs it, with so few experts, on a CPU; and the
    choice of experts, of logits and token ids, where `routing` does not say it."""

    arguments: dict[str, Any]
    routing: mo.Routing = ROUTING
    runs_in_stock: bool = True
    choice: Choice | None = None


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
        ROUTING._replace(scoring="sqrtsoftplus"),
        False,
        look_up,
    ),
    "custom": Case({"custom_routing_function": second_best}, choice=choose_second_best),
    "weighed-input": Case(
        {"top_k": 1, "renormalize": False, "apply_router_weight_on_input": True},
        mo.Routing(1, E, renormalize=False, apply_router_weight_on_input=True),
    ),
    "custom-weighed-input": Case(  # as Llama 4
        {"top_k": 1, "custom_routing_function": second_best, "apply_router_weight_on_input": True},
        mo.Routing(1, E, apply_router_weight_on_input=True),
        choice=partial(choose_second_best, top_k=1),
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
        expected = expected_of(case, hidden, logits, ids, weights)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    if case.runs_in_stock:
        del op_registry_oot["MoERunner"]
        stock = make_layer(config, "stock", **case.arguments)
        assert not isinstance(stock, MoeOpsRunner)
        pack(stock)
        torch.testing.assert_close(found, call(stock, config, hidden, logits, ids), rtol=1e-4, atol=1e-5)


def expected_of(
    case: Case, hidden: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, weights: mo.ExpertWeights
) -> torch.Tensor:
    topk_ids, topk_weights = (None, None) if case.choice is None else case.choice(logits, ids)
    return dense_moe(hidden, logits, weights, case.routing, topk_ids=topk_ids, topk_weights=topk_weights)


def compile_with_counts(layer: Any) -> tuple[Any, CompileCounterWithBackend]:
    """A layer that asks for token counts, as one on several ranks does."""
    plan, *routing = layer._forward_entry.args
    layer._forward_entry = partial(layer._run_stage, plan._replace(needs_token_counts=True), *routing)
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(layer.forward, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("name", ["softmax", "hash", "custom"])
def test_layers_are_traced_whole(config: VllmConfig, name: str) -> None:
    """Whatever makes the choice: one graph for all counts."""
    case = CASES[name]
    layer = make_layer(config, **case.arguments)
    weights = plain_weights(layer)
    pack(layer)
    compiled, counter = compile_with_counts(layer)
    for count in (4, 7, 3):
        hidden, logits, ids = inputs(count)
        with torch.no_grad():
            found = call(compiled, config, hidden, logits, ids)
        torch.testing.assert_close(
            found.double(), expected_of(case, hidden, logits, ids, weights), rtol=1e-4, atol=1e-5
        )
    assert counter.frame_count == 1
    nodes = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert any("vllm_token_counts" in node for node in nodes)


def test_a_router_that_looks_token_ids_up_needs_them(config: VllmConfig) -> None:
    layer = make_layer(config, **CASES["hash"].arguments)
    hidden, logits, _ = inputs()
    with pytest.raises(ValueError, match="input_ids must be given for a router that looks them up, got None"):
        call(layer, config, hidden, logits)


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


@pytest.mark.parametrize(("is_recorded", "is_compiled"), [(True, False), (False, False), (True, True)])
def test_copies_of_experts_by_the_maps_of_the_engine(config: VllmConfig, is_recorded: bool, is_compiled: bool) -> None:
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
    with torch.no_grad():
        found = call(compile_with_counts(layer)[0] if is_compiled else layer, config, hidden, logits)
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
