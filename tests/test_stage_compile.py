"""The whole stage under compilers: one graph for all counts, static sizes, layer after layer, export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import moe_ops as mo

from .oracle import dense_moe
from .problems import FORMS, E, Problem, compiles, expected_of, layout_for, make_inputs, own_experts, run_compiled
from .ranks import RankPool

pytestmark = pytest.mark.slow

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
    "plain": {"said": ("longest",)},
    "bfloat16": {"dtype": torch.bfloat16, "said": ("per_rank",)},
    "float16": {"dtype": torch.float16, "said": ("mask",)},
    "rich": {"routing": RICH, "has_bias": True, "activation": "swigluoai", "shared": "sharded"},
    "replicated": {"shared": "replicated", "reduce_results": False, "said": ("mask",)},
    "ids": {"chosen": "ids", "routing": mo.Routing(2, E, scoring="sqrtsoftplus"), "activation": "gelu"},
    "ids-and-weights": {"chosen": "ids-and-weights", "said": ("per_rank", "mask")},
    "on-input": {"routing": mo.Routing(2, E, apply_router_weight_on_input=True), "activation": "gelu_tanh"},
    "w8a8": {"quant": mo.Quant.W8A8, "said": ("longest", "mask")},
    "mxfp8": {"quant": mo.Quant.MXFP8},
    "mxfp4": {"quant": mo.Quant.MXFP4, "said": ("per_rank",)},
    "int8-weights": {"weight_quant": mo.Quant.W8A8, "has_bias": True, "said": ("longest",)},
    "int4-weights": {"weight_quant": mo.Quant.W4A8, "hidden_size": 5},
    "mxfp8-weights": {"weight_quant": mo.Quant.MXFP8, "hidden_size": 40},
    "mxfp4-weights": {"weight_quant": mo.Quant.MXFP4, "hidden_size": 33, "said": ("per_rank",)},
}
FAMILIES = (
    ("all2all", "all2all-sharded", "mc2-ragged"),
    ("all2all-fixed", "mc2", "all2all-sharded-fixed", "mc2-sharded"),
    ("allgather-dp", "allgather-ep"),
)
"""Forms that send alike. What a kind does to rows does not depend on the form, nor on what is sent: so each kind meets one form
of each family, and each form several kinds, instead of all meeting all."""

CASES = [(family[i % len(family)], kind, "aot_eager") for i, kind in enumerate(COMPILED) for family in FAMILIES]
CASES += [  # Inductor takes seconds a case
    (family[i % len(family)], kind, "inductor")
    for i, kind in enumerate(("plain", "rich", "mxfp8", "mxfp4-weights"))
    for family in FAMILIES
]


def test_the_cases_cover() -> None:
    """Each kind meets three forms, each form three kinds, and each form Inductor."""
    for form in FORMS:
        assert len({kind for other, kind, _ in CASES if other == form}) >= 3
        assert any(backend == "inductor" for other, _, backend in CASES if other == form)
    for kind in COMPILED:
        assert len({form for form, other, _ in CASES if other == kind}) >= 3


@pytest.mark.parametrize(("seed", "form", "kind", "backend"), [(seed, *case) for seed, case in enumerate(CASES)])
def test_one_graph_for_all_counts(ranks4: RankPool, seed: int, form: str, kind: str, backend: str) -> None:
    problem = Problem(form, seed=seed)._replace(**COMPILED[kind])
    if problem.sharded and problem.said == ("mask",):  # which takes all shards to have as many rows
        problem = problem._replace(layout=(4, 1, 1))
    all_counts = [(3, 64, 0, 7), (0, 0, 0, 0), (1, 0, 57, 1), (2, 3, 1, 0), (64, 1, 2, 2)]
    answers = ranks4.run(run_compiled, problem, all_counts, backend)
    assert [graphs for _, graphs in answers] == [int(compiles(rank, problem)) for rank in range(4)]
    exact = problem._replace(quant=mo.Quant.NONE)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 8 * 2.0**-8, torch.float16: 8 * 2.0**-11}[problem.dtype]
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
    layout = layout_for(problem)

    @torch.compile(backend=counter, fullgraph=True)
    def layer(x: torch.Tensor, logits: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return mo.moe_stage(x, logits, mo.ExpertWeights(w13, w2), problem.routing, layout)

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
        hidden, logits = problem.tokens(rank)
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
        strategy, sharded, dispatch = FORMS[form]
        groups = mo.ParallelGroups(dp=axis, ep=axis)
        self.layout, self.keywords = mo.Layout(strategy, groups, dispatch, tokens_are_sharded=sharded), keywords

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        experts, lengths = mo.ExpertWeights(self.w13, self.w2), mo.Lengths(mask=mask)
        return mo.moe_stage(
            hidden_states, logits, experts, mo.Routing(2, 8), self.layout, lengths=lengths, **self.keywords
        )


def tokens(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(count, 16), torch.randn(count, 8), torch.ones(count, dtype=torch.bool)


@pytest.mark.parametrize(
    ("form", "keywords"),
    [
        *((form, {}) for form in ("mc2", "all2all", "allgather-dp", "allgather-ep")),
        *((form, {"overlap_gate": True}) for form in ("allgather-dp", "allgather-ep")),
        *((form, {"quant": quant}) for form in ("mc2", "allgather-ep") for quant in (mo.Quant.MXFP4, mo.Quant.MXFP8)),
    ],
    ids=str,
)
def test_export_of_the_whole_stage(fake_group4: str, form: str, keywords: dict[str, Any], tmp_path: Path) -> None:
    """And, but for a ragged exchange, to a file and back, whatever travels. (torch 2.13 cannot serialise ops that return
    lists of sizes; and a fake group makes up the counts that would be exchanged.)"""
    example = tokens(5)
    mo.mark_token_axes(*example)
    program = torch.export.export(Layer(fake_group4, form, **keywords), example, strict=True)
    if form != "all2all":
        torch.export.save(program, tmp_path / "stage.pt2")
        loaded = torch.export.load(tmp_path / "stage.pt2")
        for count in (0, 1, 7):
            assert loaded.module()(*tokens(count)).shape == (count, 16)


def run_unmarked(rank: int, problem: Problem, dynamic: bool) -> tuple[torch.Tensor, int]:
    """No size is marked, counts are numbers: compiled for the sizes of the inputs alone, as for a graph of the device, or with
    symbols for all numbers, of which groups and weights are not to be one."""
    layout, lengths = layout_for(problem), mo.Lengths(longest=max(problem.counts), per_rank=problem.counts)
    experts, (hidden, logits) = own_experts(problem, rank), problem.tokens(rank)

    def stage(hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return mo.moe_stage(hidden, logits, experts, problem.routing, layout, lengths=lengths)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    is_compiled = compiles(rank, problem)
    run = torch.compile(stage, backend="aot_eager", fullgraph=True, dynamic=dynamic) if is_compiled else stage
    with torch.no_grad():
        result = run(hidden, logits)
    # Not how often the backend was called: torch begins anew when a number like routed_scaling_factor turns out to be constant.
    return result, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", FORMS)
def test_unmarked_sizes_compile_too(ranks4: RankPool, form: str, dynamic: bool) -> None:
    problem = Problem(form, layout=(4, 1, 1), seed=len(form))
    for rank, (found, graphs) in enumerate(ranks4.run(run_unmarked, problem, dynamic)):
        assert graphs == int(compiles(rank, problem))
        torch.testing.assert_close(found.double(), expected_of(problem, rank), rtol=2e-5, atol=2e-5)
