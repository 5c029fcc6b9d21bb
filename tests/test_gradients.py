"""Gradients through the whole stage on real ranks, against torch's through the dense oracle in float64.

Every rank differentiates the sum of its results times random numbers. What comes back is the gradient of the sum of that over
all ranks, so for tokens or weights that several ranks hold, their gradients add up to the oracle's.
"""

from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch._dynamo.testing import CompileCounterWithBackend

import moe_ops as mo
from moe_ops.traffic import count_traffic

from .oracle import dense_moe
from .problems import (
    FORMS,
    E,
    Problem,
    compiles,
    groups_for,
    make_inputs,
    make_stage,
    own_experts,
    own_shared,
    problems,
)
from .ranks import RankPool

WEIGHTS = ("w13", "w2", "w13_bias", "w2_bias")


ALONE = mo.Layout(mo.Strategy.ALL2ALL, mo.ParallelGroups())


class Gradients(NamedTuple):
    """Of one rank, or of the oracle; None where there is no such tensor."""

    hidden: torch.Tensor
    logits: torch.Tensor
    weights: torch.Tensor
    experts: dict[str, torch.Tensor | None]
    shared: dict[str, torch.Tensor | None]


def cotangent(problem: Problem, rank: int) -> torch.Tensor:
    """What a rank multiplies its results with: of real tokens alone."""
    rows = problem.counts[problem.owner(rank)]
    return torch.randn(rows, problem.hidden_size, generator=torch.Generator().manual_seed(rank))


def leaves(weights: Any) -> Any:
    """The named tuple with its floating-point tensors as leaves that require gradients."""
    fields = {name: value for name, value in weights._asdict().items() if isinstance(value, torch.Tensor)}
    return weights._replace(**{name: value.detach().clone().requires_grad_() for name, value in fields.items()})


def grads_of(weights: Any) -> dict[str, torch.Tensor | None]:
    tensors = {name: value for name, value in weights._asdict().items() if isinstance(value, torch.Tensor)}
    return {name: tensor.grad for name, tensor in tensors.items()}


def differentiate(rank: int, problem: Problem, stage: Any, experts: Any, shared: Any) -> Gradients:
    inputs = make_inputs(rank, problem)
    inputs.hidden.requires_grad_()
    inputs.logits.requires_grad_()
    inputs.topk_weights.requires_grad_()
    for weights in (experts, shared):
        for tensor in weights or ():
            if isinstance(tensor, torch.Tensor):
                tensor.grad = None
    (stage(inputs) * cotangent(problem, rank)).sum().backward()
    shared_grads = {} if shared is None else grads_of(shared)
    return Gradients(
        *(x.grad for x in (inputs.hidden, inputs.logits, inputs.topk_weights)), grads_of(experts), shared_grads
    )


def own_leaves(rank: int, problem: Problem) -> tuple[mo.ExpertWeights, mo.SharedExperts | None]:
    shared = own_shared(problem, groups_for(problem))
    return leaves(own_experts(problem, rank)), None if shared is None else leaves(shared)


def run_backward(rank: int, problem: Problem, **keywords: Any) -> Gradients:
    experts, shared = own_leaves(rank, problem)
    return differentiate(rank, problem, make_stage(rank, problem, experts, shared, **keywords), experts, shared)


def is_compiled(rank: int, problem: Problem) -> bool:
    """One rank. With shared experts all: their backward's collectives do not depend on those of the routed experts, and torch
    orders them otherwise in a graph than in eager mode."""
    return compiles(rank, problem) or problem.shared != "none"


def run_compiled_backward(rank: int, problem: Problem, all_counts: list[tuple[int, ...]], backend: str) -> Any:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    experts, shared = own_leaves(rank, problem)
    stage: Any = make_stage(rank, problem, experts, shared)
    if is_compiled(rank, problem):
        stage = torch.compile(stage, backend=counter, fullgraph=True)
    results = [differentiate(rank, problem._replace(counts=counts), stage, experts, shared) for counts in all_counts]
    return results, counter.frame_count


def expected_gradients(problem: Problem) -> tuple[dict[int, list[torch.Tensor | None]], Gradients]:
    """Of each owner's tokens, logits and weights of its choice, and of all experts and shared experts."""
    plain = problem.experts()
    experts = leaves(plain._replace(**{name: to_double(getattr(plain, name)) for name in WEIGHTS}))
    shared = problem.shared_experts()
    if shared is not None:
        shared = leaves(shared._replace(w13=shared.w13.double(), w2=shared.w2.double(), gate=to_double(shared.gate)))
    tokens: dict[int, tuple[torch.Tensor, ...]] = {}
    total = torch.zeros((), dtype=torch.float64)
    nothing = problem.routing._replace(routed_scaling_factor=0.0)
    for rank in range(4):
        owner, num_real = problem.owner(rank), problem.num_real(rank)
        ids, weights = problem.choice(owner)
        if owner not in tokens:
            tokens[owner] = tuple(x.double().requires_grad_() for x in (*problem.tokens(owner), weights))
        hidden, logits, weights = tokens[owner]
        real = dense_moe(
            hidden[:num_real],
            logits[:num_real],
            experts,
            problem.routing,
            topk_ids=None if problem.chosen == "by-logits" else ids[:num_real],
            topk_weights=weights[:num_real] if problem.chosen == "ids-and-weights" else None,
            shared=shared,
        )
        rest = dense_moe(hidden[num_real:], logits[num_real:], experts, nothing, shared=shared)
        total = total + (torch.cat([real, rest]) * cotangent(problem, rank)).sum()
    total.backward()
    shared_grads = {} if shared is None else grads_of(shared)
    nothing = torch.empty(0)
    return {owner: [x.grad for x in inputs] for owner, inputs in tokens.items()}, Gradients(
        nothing, nothing, nothing, grads_of(experts), shared_grads
    )


def to_double(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.double()


def assert_close(found: torch.Tensor | None, wanted: torch.Tensor | None, tolerance: float) -> None:
    if wanted is None or not wanted.numel():
        return
    found = torch.zeros_like(wanted) if found is None else found.double()
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=0.5)


def sum_of(grads: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    there = [grad.double() for grad in grads if grad is not None]
    return sum(there) if there else None


def check(problem: Problem, found: list[Gradients], tolerance: float) -> None:
    tokens, whole = expected_gradients(problem)
    for owner, wanted in tokens.items():
        mine = [found[rank] for rank in range(4) if problem.owner(rank) == owner]
        for of_input, expected in zip(zip(*(grads[:3] for grads in mine), strict=True), wanted, strict=True):
            assert_close(sum_of(of_input), expected, tolerance)
    as_weights = problem.experts()._replace(**whole.experts)
    for rank in range(4):
        wanted_experts = own_experts_of(problem, as_weights, rank)
        for name in ("w13", "w2", "w13_bias"):
            assert_close(found[rank].experts.get(name), getattr(wanted_experts, name), tolerance)
    if problem.has_bias:
        of_ranks = [grads.experts["w2_bias"].double() for grads in found]
        w2_bias = torch.cat(of_ranks) if problem.has_ep else sum(of_ranks)
        assert_close(w2_bias, whole.experts["w2_bias"], tolerance)
    shared, tp = problem.shared_experts(), problem.layout[2]
    for tp_rank in range(tp) if shared is not None else ():
        held = [found[rank].shared for rank in range(4) if not shared.is_tp_sharded or rank % tp == tp_rank]
        parts = shared_part(problem, whole.shared, tp_rank)
        for name, wanted in parts.items():
            is_once = name != "gate" or not shared.is_tp_sharded  # the gate is whole on every TP rank
            of_ranks = held if is_once else [grads.shared for grads in found]
            assert_close(sum(grads[name].double() for grads in of_ranks), wanted, tolerance)


def own_experts_of(problem: Problem, weights: mo.ExpertWeights, rank: int) -> mo.ExpertWeights:
    class Given(Problem):
        def quantized_experts(self) -> mo.ExpertWeights:
            return weights

    return own_experts(Given(*problem), rank)


def shared_part(problem: Problem, grads: dict[str, Any], tp_rank: int) -> dict[str, torch.Tensor]:
    shared, i = problem.shared_experts(), problem.intermediate // problem.layout[2]
    if shared is None or not shared.is_tp_sharded:
        return grads
    mine = torch.arange(tp_rank * i, tp_rank * i + i)
    return grads | {"w13": grads["w13"][torch.cat((mine, mine + problem.intermediate))], "w2": grads["w2"][:, mine]}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(max_examples=40)
def test_every_form_agrees_with_the_oracle(ranks4: RankPool, form: str, data: st.DataObject) -> None:
    problem = data.draw(problems(form))
    if problem.dtype is not torch.float32 and problem.activation == "swigluoai":
        problem = problem._replace(
            activation="gelu"
        )  # its clamp has no gradient at 7, where rounding moves values across
    tolerance = 1e-4 if problem.dtype is torch.float32 else 32 * 2.0**-8  # some sums of halves cancel
    check(problem, ranks4.run(run_backward, problem), tolerance)


RICH = mo.Routing(3, E, scoring="sigmoid", e_score_correction_bias=torch.linspace(-1, 1, E), routed_scaling_factor=2.5)
COMPILED = {
    "plain": {},
    "rich": {"routing": RICH, "has_bias": True, "activation": "swigluoai"},
    "on-input": {"routing": mo.Routing(2, E, apply_router_weight_on_input=True)},
    "chosen": {"chosen": "ids-and-weights", "said": ("per_rank",)},
    "shared": {"shared": "sharded"},
}
COVERING = [  # each form meets two kinds, and Inductor each family of forms (see test_stage_compile.py)
    *((form, kind, "aot_eager") for form, kind in zip(FORMS, [*COMPILED] * 2, strict=False)),
    *((form, kind, "aot_eager") for form, kind in zip(FORMS, [*reversed(COMPILED)] * 2, strict=False)),
    ("all2all", "chosen", "inductor"),
    ("mc2", "on-input", "inductor"),
    ("allgather-ep", "rich", "inductor"),
    ("allgather-dp", "shared", "inductor"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "form", "kind", "backend"), [(seed, *case) for seed, case in enumerate(COVERING)])
def test_forward_and_backward_are_one_graph_for_all_counts(
    ranks4: RankPool, seed: int, form: str, kind: str, backend: str
) -> None:
    problem = Problem(form, seed=seed)._replace(**COMPILED[kind])
    all_counts = [(3, 64, 0, 7), (0, 0, 0, 0), (1, 0, 57, 1), (2, 3, 1, 0)]
    answers = ranks4.run(run_compiled_backward, problem, all_counts, backend)
    assert [graphs for _, graphs in answers] == [int(is_compiled(rank, problem)) for rank in range(4)]
    for index, counts in enumerate(all_counts):
        check(problem._replace(counts=counts), [results[index] for results, _ in answers], 1e-4)


def run_gather_backward(rank: int, problem: Problem) -> tuple[Any, Any]:
    """Collectives of the forward and the backward."""
    experts, _ = own_leaves(rank, problem)
    inputs = make_inputs(rank, problem)
    inputs.hidden.requires_grad_()
    outputs: list[torch.Tensor] = []
    forward = count_traffic(lambda: outputs.append(make_stage(rank, problem, experts)(inputs)))
    return forward, count_traffic(lambda: outputs[0].sum().backward())


@pytest.mark.parametrize(
    ("form", "collectives"), [("allgather-dp", 2), ("allgather-ep", 2), ("all2all", 2), ("mc2", 2)]
)
def test_the_backward_sends_one_collective_for_each_of_the_forward(
    ranks4: RankPool, form: str, collectives: int
) -> None:
    """But for the counts of the ragged exchange, which are known by then."""
    for forward, backward in ranks4.run(run_gather_backward, Problem(form, layout=(4, 1, 1))):
        assert backward.collectives == collectives
        assert forward.collectives == collectives + (form == "all2all")


def run_logits_alone(rank: int, problem: Problem) -> torch.Tensor:
    inputs = make_inputs(rank, problem)
    inputs.logits.requires_grad_()
    make_stage(rank, problem)(inputs).sum().backward()
    return inputs.logits.grad


@pytest.mark.parametrize("form", ["allgather-dp", "allgather-ep", "all2all", "mc2"])
def test_the_router_alone_may_be_trained_with_quantised_activations(ranks4: RankPool, form: str) -> None:
    for grad in ranks4.run(run_logits_alone, Problem(form, layout=(4, 1, 1), quant=mo.Quant.W8A8)):
        assert grad.abs().max() > 0


def run_second_order(rank: int, problem: Problem) -> str:
    inputs = make_inputs(rank, problem)
    inputs.hidden.requires_grad_()
    output = make_stage(rank, problem)(inputs)
    (grad,) = torch.autograd.grad(output.square().sum(), inputs.hidden, create_graph=True)
    try:
        grad.square().sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("form", ["allgather-dp", "allgather-ep", "all2all", "mc2"])
def test_second_order_gradients_are_an_error(ranks4: RankPool, form: str) -> None:
    for error in ranks4.run(run_second_order, Problem(form, layout=(4, 1, 1))):
        assert "once_differentiable" in error or "have no gradient" in error


def test_the_reference_has_the_gradients_of_the_oracle() -> None:
    """The router's, too."""
    problem = Problem("all2all", counts=(5, 0, 0, 0), shared="replicated", has_bias=True, seed=3)
    hidden, logits = problem.tokens(0)
    experts = leaves(problem.experts())
    found = hidden.clone().requires_grad_(), logits.clone().requires_grad_()
    mo.reference.moe_stage(*found, experts, problem.routing, shared_experts=problem.shared_experts()).sum().backward()
    wanted = hidden.double().requires_grad_(), logits.double().requires_grad_()
    whole = leaves(problem.experts())
    dense_moe(*wanted, whole, problem.routing, shared=problem.shared_experts()).sum().backward()
    for one, other in zip(found, wanted, strict=True):
        assert one.grad.abs().max() > 0
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-6)
    for name in WEIGHTS:
        torch.testing.assert_close(grads_of(experts)[name], grads_of(whole)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_half_precision(ranks4: RankPool, dtype: torch.dtype) -> None:
    for form in ("all2all", "mc2", "allgather-dp", "allgather-ep"):
        problem = Problem(form, dtype=dtype, has_bias=True, seed=5)
        check(problem, ranks4.run(run_backward, problem), 32 * 2.0**-8)
