"""The whole stage under compilers: one graph for all counts, static sizes, layer after layer, export."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import moe_ops as mo
from moe_ops import Strategy

from .oracle import dense_moe
from .problems import FORMS, E, Problem, by_softmax, expected_of, make_inputs, own_experts, run_compiled
from .ranks import RankPool, groups_of

RICH = mo.Routing(
    3,
    E,
    scoring="sigmoid",
    num_expert_group=4,
    topk_group=2,
    e_score_correction_bias=torch.linspace(-1, 1, E),
    routed_scaling_factor=2.5,
)
COMPILED = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "rich": {"routing": RICH, "has_bias": True, "activation": "swigluoai", "shared": "sharded"},
    "replicated": {"shared": "replicated", "reduce_results": False},
    "hash": {
        "routing": mo.Routing(2, E, scoring="sqrtsoftplus", token_to_experts=torch.arange(22).view(11, 2) % E),
        "activation": "gelu",
    },
    "by-caller": {"routing": mo.Routing(2, E, select_experts=by_softmax)},
    "on-input": {"routing": mo.Routing(2, E, apply_router_weight_on_input=True), "activation": "gelu_tanh"},
    "w8a8": {"quant": mo.Quant.W8A8},
    "mxfp8": {"quant": mo.Quant.MXFP8},
    "mxfp4": {"quant": mo.Quant.MXFP4},
    "int8-weights": {"weight_quant": mo.Quant.W8A8, "has_bias": True},
    "int4-weights": {"weight_quant": mo.Quant.W4A8, "hidden_size": 5},
    "mxfp8-weights": {"weight_quant": mo.Quant.MXFP8, "hidden_size": 40},
    "mxfp4-weights": {"weight_quant": mo.Quant.MXFP4, "hidden_size": 33},
}


KINDS = [(kind, "aot_eager") for kind in COMPILED]
KINDS += [(kind, "inductor") for kind in ("plain", "rich", "mxfp8", "mxfp4-weights")]  # which takes seconds a case


@pytest.mark.parametrize(("kind", "backend"), KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_one_graph_for_all_counts(ranks4: RankPool, form: str, kind: str, backend: str) -> None:
    problem = Problem(form, seed=7)._replace(**COMPILED[kind])
    all_counts = [(3, 64, 0, 7), (0, 0, 0, 0), (1, 0, 57, 1), (2, 3, 1, 0), (64, 1, 2, 2)]
    answers = ranks4.run(run_compiled, problem, all_counts, backend)
    assert [graphs for _, graphs in answers] == [0, 1, 1, 0]
    exact = problem._replace(quant=mo.Quant.NONE)
    tolerance = 2e-5 if problem.dtype is torch.float32 else 8 * 2.0**-8
    for index, counts in enumerate(all_counts):
        for rank, (results, _) in enumerate(answers):
            expected = expected_of(exact._replace(counts=counts), rank)
            assert results[index].shape == expected.shape
            if expected.numel() and problem.quant is mo.Quant.NONE:
                error = (results[index].double() - expected).abs().max() / expected.abs().max().clamp(min=0.5)
                assert error <= tolerance


def run_layers(rank: int, problem: Problem, layers: int) -> tuple[list[torch.Tensor], int]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    groups = groups_of(*problem.layout)

    @torch.compile(backend=counter, fullgraph=True)
    def layer(x: torch.Tensor, logits: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        experts = mo.ExpertWeights(w13, w2)
        return mo.moe_stage(x, logits, experts, routing=problem.routing, strategy=Strategy.ALL2ALL, groups=groups)

    results = []
    with torch.no_grad():
        for seed in range(layers):
            inputs, experts = make_inputs(rank, problem), own_experts(problem._replace(seed=seed), rank)
            results.append(layer(inputs.hidden, inputs.logits, experts.w13, experts.w2))
    return results, counter.frame_count


def test_48_layers_of_the_same_shape_compile_once(ranks4: RankPool) -> None:
    problem = Problem("all2all", layout=(4, 1, 1))
    for rank, (results, graphs) in enumerate(ranks4.run(run_layers, problem, 48)):
        assert graphs == 1
        hidden, logits, _ = problem.tokens(rank)
        for seed in (0, 47):
            expected = dense_moe(hidden, logits, problem._replace(seed=seed).experts(), problem.routing)
            torch.testing.assert_close(results[seed].double(), expected, rtol=1e-4, atol=1e-5)


class Layer(torch.nn.Module):
    """The whole stage with weights of its own, on rank 1 of 4."""

    def __init__(self, group: str, form: str, **keywords: Any) -> None:
        super().__init__()
        self.w13 = torch.nn.Parameter(torch.randn(2, 8, 16), requires_grad=False)
        self.w2 = torch.nn.Parameter(torch.randn(2, 16, 4), requires_grad=False)
        axis = mo.Group(group, 4, 1)
        self.groups, self.keywords = mo.ParallelGroups(dp=axis, ep=axis), keywords
        self.strategy, self.sharded, self.dispatch = FORMS[form]

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mo.moe_stage(
            hidden_states,
            logits,
            mo.ExpertWeights(self.w13, self.w2),
            routing=mo.Routing(2, 8),
            strategy=self.strategy,
            groups=self.groups,
            dispatch=self.dispatch,
            mc2_mask=mask if self.strategy is mo.Strategy.MC2 else None,
            tokens_are_sharded=self.sharded,
            **self.keywords,
        )


@pytest.mark.parametrize("overlap_gate", [False, True], ids=["", "overlap_gate"])
@pytest.mark.parametrize("form", ["mc2", "all2all", "allgather-dp", "allgather-ep"])
def test_export_of_the_whole_stage(fake_group4: str, form: str, overlap_gate: bool) -> None:
    def tokens(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.randn(count, 16), torch.randn(count, 8), torch.ones(count, dtype=torch.bool)

    example = tokens(5)
    mo.mark_token_axes(*example)
    program = torch.export.export(Layer(fake_group4, form, overlap_gate=overlap_gate), example, strict=True)
    if form != "all2all":  # a fake group makes up the counts of a ragged exchange
        for count in (0, 1, 7):
            assert program.module()(*tokens(count)).shape == (count, 16)


def run_unmarked(rank: int, problem: Problem, dynamic: bool) -> tuple[torch.Tensor, int]:
    """No size is marked, counts are numbers: compiled for the sizes of the inputs alone, as for a graph of the device, or with
    symbols for all numbers, of which groups and weights are not to be one."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    groups, (strategy, sharded, dispatch) = groups_of(*problem.layout), FORMS[problem.form]
    experts, (hidden, logits, _) = own_experts(problem, rank), problem.tokens(rank)

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    def stage(hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return mo.moe_stage(
            hidden,
            logits,
            experts,
            routing=problem.routing,
            strategy=strategy,
            groups=groups,
            dispatch=dispatch,
            padded_num_tokens=max(problem.counts),
            max_tokens_across_dp=max(problem.counts),
            num_tokens_across_ep=problem.counts if sharded else None,
            tokens_are_sharded=sharded,
        )

    with torch.no_grad():
        result = stage(hidden, logits)
    # Not how often the backend was called: torch begins anew when a number like routed_scaling_factor turns out to be constant.
    return result, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", FORMS)
def test_unmarked_sizes_compile_too(ranks4: RankPool, form: str, dynamic: bool) -> None:
    problem = Problem(form, layout=(4, 1, 1))
    for rank, (found, graphs) in enumerate(ranks4.run(run_unmarked, problem, dynamic)):
        assert graphs == 1
        torch.testing.assert_close(found.double(), expected_of(problem, rank), rtol=2e-5, atol=2e-5)
