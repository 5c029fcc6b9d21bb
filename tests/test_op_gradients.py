"""Gradients of single ops, against finite differences; and what has none says so."""

import pytest
import torch
from torch.autograd import forward_ad

import moe_ops as mo
from moe_ops.collectives import gather_rows
from moe_ops.dispatchers.copies import send_copies
from moe_ops.dispatchers.local import combine_local, dispatch_local, weigh_input
from moe_ops.experts import run_experts
from moe_ops.route import route

from .oracle import dense_moe
from .problems import E, Problem
from .ranks import RankPool, groups_of

OPS = torch.ops.moe_ops
ALONE = mo.Layout(mo.Strategy.ALL2ALL, mo.ParallelGroups())


def positions(rows: int, k: int) -> torch.Tensor:
    return torch.arange(rows * k).view(rows, k) - 1  # the first choice goes nowhere


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


COUNTS = torch.tensor([2, 0, 3])
LEAVES = {
    "permute_by_expert": lambda x: OPS.permute_by_expert([x], torch.tensor([[0, 2], [-1, 1], [1, 1]]), 1, 2)[0],
    "unpermute": lambda x, w: OPS.unpermute(x, w, positions(3, 2)),
    "unpermute unweighted": lambda x: OPS.unpermute(x, None, positions(3, 2)),
    "weigh_rows": lambda x, w: OPS.weigh_rows(x, w, positions(3, 2)),
    "grouped_linear": lambda x, w, b: OPS.grouped_linear(x, COUNTS, w, b),
    "compact_rows": lambda x: OPS.compact_rows(x, [1, 3]),
    "expand_rows": lambda x: OPS.expand_rows(x, [4, 2]),
}
INPUTS = {
    "permute_by_expert": [draw(3, 4)],
    "unpermute": [draw(6, 4), draw(3, 2)],
    "unpermute unweighted": [draw(6, 4)],
    "weigh_rows": [draw(6, 4), draw(3, 2)],
    "grouped_linear": [draw(6, 4), draw(3, 5, 4), draw(3, 5)],
    "compact_rows": [draw(6, 4)],
    "expand_rows": [draw(6, 4)],
}


@pytest.mark.filterwarnings("ignore:Input .* is not a double precision:UserWarning")
@pytest.mark.parametrize("op", LEAVES)
def test_gradcheck(op: str) -> None:
    """In float32, the widest dtype that they have. All are linear in each argument: a wide step costs no accuracy."""
    assert torch.autograd.gradcheck(LEAVES[op], INPUTS[op], eps=0.25, atol=1e-4, rtol=1e-4, nondet_tol=0.0)


@pytest.mark.filterwarnings("ignore:Input .* is not a double precision:UserWarning")
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_gradcheck_of_route(scoring: str, renormalize: bool) -> None:
    routing = mo.Routing(2, 5, scoring=scoring, renormalize=renormalize, routed_scaling_factor=2.5)
    is_active = torch.tensor([True, False, True])
    logits = torch.tensor([[0.0, 3, 1, -2, -1], [4, 0, 1, 2, 3], [-2, -1, 2, 0, 1]]).requires_grad_()

    def weights_of(logits: torch.Tensor) -> torch.Tensor:
        return route(logits, routing, is_active=is_active)[0]

    assert torch.autograd.gradcheck(weights_of, [logits], eps=1e-2, atol=2e-3, rtol=2e-3)


def test_rows_that_are_not_used_may_hold_nan() -> None:
    x, w = draw(6, 4), draw(3, 5, 4)
    with torch.no_grad():
        x[5] = torch.nan  # past the last group
    OPS.grouped_linear(x, COUNTS, w, None).sum().backward()
    assert w.grad.isfinite().all()
    assert torch.equal(x.grad[5], torch.zeros(4))


@pytest.mark.parametrize("quant", [mo.Quant.W8A8, mo.Quant.MXFP8, mo.Quant.MXFP4], ids=lambda quant: quant.value)
def test_quantised_activations_have_no_gradient_and_say_so(quant: mo.Quant) -> None:
    x, logits = draw(3, 8), draw(3, E)
    experts = Problem("all2all").experts()
    with pytest.raises(RuntimeError, match="hidden_states must not require a gradient, for quantised values have none"):
        mo.moe_stage(x, logits, experts, mo.Routing(2, E), ALONE, quant=quant)
    with torch.no_grad():
        assert mo.moe_stage(x, logits, experts, mo.Routing(2, E), ALONE, quant=quant).shape == x.shape


def test_tokens_have_a_gradient_through_quantised_weights() -> None:
    problem = Problem("all2all", weight_quant=mo.Quant.W8A8)
    x, logits = draw(3, 8), draw(3, E)
    mo.moe_stage(x, logits, problem.quantized_experts(), mo.Routing(2, E), ALONE).sum().backward()
    wanted = x.detach().double().requires_grad_()
    dense_moe(wanted, logits.detach(), problem.rounded_experts(), mo.Routing(2, E)).sum().backward()
    torch.testing.assert_close(x.grad.double(), wanted.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_logits_that_underflow_have_no_gradient(scoring: str) -> None:
    logits = torch.tensor([[0.0, 1, -200, 2, -torch.inf]]).requires_grad_()
    route(logits, mo.Routing(2, 5, scoring=scoring))[0].sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[0, [2, 4]].any()


def run_second_order_of_a_transport(rank: int, send: bool) -> str:
    """Nothing but the transport, so that no other op raises first."""
    group, x = groups_of(4, 1, 1).ep, torch.randn(4, 2).requires_grad_()
    if send:
        wait = send_copies([x], torch.arange(16).view(4, 4), 16, 4, group.name)
    else:
        wait = gather_rows([x], rows=4, fill=[0], size=4, group=group.name)
    (grad,) = torch.autograd.grad(wait()[0].square().sum(), x, create_graph=True)
    try:
        grad.square().sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("send", [False, True], ids=["gather", "send"])
def test_second_order_gradients_of_a_transport_are_an_error(ranks4: RankPool, send: bool) -> None:
    for error in ranks4.run(run_second_order_of_a_transport, send):
        assert "once_differentiable" in error


CHOICE = torch.tensor([[0], [3], [-1]]), torch.ones(3, 1)
DISPATCHED = dispatch_local(torch.zeros(3, 8), *CHOICE, first_expert=0, num_local_experts=E)
TANGENTS = {
    "moe_stage": lambda x: mo.moe_stage(x, torch.zeros(3, E), Problem("all2all").experts(), mo.Routing(2, E), ALONE),
    "prepare": lambda x: mo.prepare(x, torch.zeros(3, E), ALONE).hidden_states,
    "finalize": lambda x: mo.finalize(x, mo.prepare(torch.zeros(3, 8), torch.zeros(3, E), ALONE).state, ALONE),
    "route": lambda x: route(x, mo.Routing(2, E))[0],
    "dispatch": lambda x: dispatch_local(x, *CHOICE, first_expert=0, num_local_experts=E).rows,
    "weigh_input": lambda x: weigh_input(x, DISPATCHED.state),
    "combine": lambda x: combine_local(x, DISPATCHED.state),
    "experts": lambda x: run_experts(x, DISPATCHED.counts, Problem("all2all").experts()),
    "quantize_activations": lambda x: mo.quantize_activations(x, quant=mo.Quant.W8A8)[1],
    "pack_rows": lambda x: OPS.pack_rows([x], 4, [0]),
    "chunk_tokens": lambda x: OPS.chunk_tokens(x, 4, 2, 0),
    "quantize_int8": lambda x: OPS.quantize_int8(x)[1],
}
LEAF_OPS = {"pack_rows", "quantize_int8"}
"""Called by themselves: torch.func.jvp shows them no tangents."""


@pytest.mark.parametrize("what", TANGENTS)
def test_forward_mode_is_an_error(what: str) -> None:
    """No op has a formula for it: what came would be zeros."""
    x = torch.randn(3, 8)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="arguments must have no tangents"):
        TANGENTS[what](forward_ad.make_dual(x, torch.ones_like(x)))
    with forward_ad.dual_level():
        TANGENTS[what](x)  # another computation's tangents do not matter


@pytest.mark.parametrize("what", [what for what in TANGENTS if what not in LEAF_OPS])
def test_forward_mode_is_an_error_of_functions_under_jvp(what: str) -> None:
    x = torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="arguments must have no tangents"):
        torch.func.jvp(TANGENTS[what], (x,), (torch.ones_like(x),))
