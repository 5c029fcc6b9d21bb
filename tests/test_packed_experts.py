"""Experts through vLLM's CPU kernel: the real one where vLLM is installed, else a stand-in with its schema."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import moe_ops as mo
from moe_ops.backends.vllm_cpu import pack_experts, run_rows, why_not

from .oracle import dense_moe
from .problems import E, Problem, expected_of, make_inputs, make_stage, own_experts, own_part
from .ranks import RankPool
from .vllm_stand_in import load_kernels

SIZES = {"hidden_size": 64, "intermediate": 32}
LENGTHS = [32, 1, 24, 40]  # of the intermediate axis, which the kernel takes in multiples of 32


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    load_kernels()


def draw_experts(
    dtype: torch.dtype, activation: str, has_bias: bool, intermediate: int = SIZES["intermediate"]
) -> mo.ExpertWeights:
    sizes = SIZES | {"intermediate": intermediate}
    return Problem("all2all", dtype=dtype, activation=activation, has_bias=has_bias, **sizes).experts()


@given(
    rows=st.sampled_from([0, 1, 2, 7, 33]),
    top_k=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    activation=st.sampled_from(["silu", "gelu", "gelu_tanh", "swigluoai"]),
    has_bias=st.booleans(),
    intermediate=st.sampled_from(LENGTHS),
    choices=st.sampled_from(["all", "some", "none", "one"]),
    weights_on_input=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150)
def test_they_agree_with_the_oracle(
    rows: int,
    top_k: int,
    dtype: torch.dtype,
    activation: str,
    has_bias: bool,
    intermediate: int,
    choices: str,
    weights_on_input: bool,
    seed: int,
) -> None:
    """Experts of this rank are 3 to 10 of the layer; what goes elsewhere, or nowhere, counts nothing."""
    generator = torch.Generator().manual_seed(seed)
    experts = draw_experts(dtype, activation, has_bias, intermediate)
    x = torch.randn(rows, 64, generator=generator).to(dtype)
    low, high = {"all": (3, 11), "some": (-1, 15), "none": (-1, 3), "one": (5, 6)}[choices]
    ids = torch.stack(
        [torch.randperm(max(high - low, top_k), generator=generator)[:top_k] + low for _ in range(rows)]
        or [torch.empty(top_k, dtype=torch.int64)]
    )[:rows]
    if choices == "one":
        ids = torch.where(ids == 5, 5, -1)
    if choices == "none":
        ids = torch.where(ids < 3, ids, -1)
    weights = torch.rand(rows, top_k, generator=generator)
    routed_nowhere = ~((ids >= 3) & (ids < 11)).any(1)
    x[routed_nowhere] = torch.nan
    found = run_rows(x, ids.int(), weights, 3, pack_experts(experts), weights_on_input)
    expected = torch.zeros(rows, 64, dtype=torch.float64)
    for row in range(rows):
        for choice in range(top_k):
            expert, weight = int(ids[row, choice]) - 3, weights[row, choice]
            if 0 <= expert < E:
                one = experts._replace(
                    **{
                        name: None if getattr(experts, name) is None else getattr(experts, name)[expert : expert + 1]
                        for name in ("w13", "w2", "w13_bias", "w2_bias")
                    }
                )
                row_in = (x[row] * weight).to(dtype) if weights_on_input else x[row]
                y = dense_moe(row_in[None], torch.zeros(1, 1), one, mo.Routing(1, 1))[0]
                expected[row] += y if weights_on_input else y * weight
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
    assert found.dtype == (torch.float32 if dtype is torch.float16 else dtype)
    assert not rows or (found.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


def run_packed(rank: int, problem: Problem, is_compiled: bool) -> torch.Tensor:
    load_kernels()
    stage: Any = make_stage(rank, problem, pack_experts(own_experts(problem, rank)))
    if is_compiled:
        torch._dynamo.reset()
        stage = torch.compile(stage, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        return stage(make_inputs(rank, problem))


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("form", ["all2all", "mc2", "allgather-dp", "allgather-ep"])
def test_the_whole_stage_on_packed_weights(ranks4: RankPool, form: str, is_compiled: bool) -> None:
    problem = Problem(form, counts=(3, 0, 5, 2), has_bias=True, **SIZES)
    for rank, found in enumerate(ranks4.run(run_packed, problem, is_compiled)):
        torch.testing.assert_close(found.double(), expected_of(problem, rank), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_packed_is_left_as_it_is() -> None:
    plain = draw_experts(torch.float32, "silu", False)
    packed = mo.prepack_experts(plain)
    assert packed.layout is mo.WeightLayout.VLLM_CPU
    assert mo.prepack_experts(packed) is packed
    quantised = plain._replace(w13=plain.w13.to(torch.int8), w2=plain.w2.to(torch.int8))
    odd = plain._replace(w2=plain.w2[:, :31])
    for experts, reason in ((quantised, "torch.int8"), (odd, "H must be a multiple of 32")):
        assert mo.prepack_experts(experts) is experts
        assert reason in str(why_not(experts))
        with pytest.raises(ValueError, match=reason):
            pack_experts(experts)


def test_packed_weights_are_refused_where_nothing_can_read_them() -> None:
    packed = pack_experts(draw_experts(torch.float32, "silu", False))
    x, logits = torch.randn(3, 64), torch.randn(3, E)
    routing, layout = mo.Routing(2, E), mo.Layout(mo.Strategy.ALL2ALL, mo.ParallelGroups())
    with pytest.raises(ValueError, match=r"quant must be NONE with packed experts"):
        mo.moe_stage(x, logits, packed, routing, layout, quant=mo.Quant.W8A8)
    with pytest.raises(ValueError, match=r"experts must have WeightLayout\.PLAIN"):
        mo.reference.moe_stage(x, logits, packed, routing)
    with pytest.raises(RuntimeError, match="have no gradient"):
        mo.moe_stage(x.requires_grad_(), logits, packed, routing, layout).sum().backward()


def test_weights_that_do_not_fit_each_other_never_reach_the_kernel() -> None:
    plain = draw_experts(torch.float32, "silu", True)
    for changed, kind, message in (
        ({"w2": plain.w2[:3]}, ValueError, r"w13 must be \[E, 2 \* I, H\] for w2"),
        ({"w13": plain.w13[:, :32]}, ValueError, r"w13 must be \[E, 2 \* I, H\] for w2"),
        ({"w13_bias": plain.w13_bias[:, :5]}, ValueError, r"w13_bias must be \(8, 64\), got \(8, 5\)"),
        ({"w2_bias": plain.w2_bias.bfloat16()}, TypeError, r"w2_bias must have one of the dtypes torch\.float32"),
    ):
        with pytest.raises(kind, match=message):
            pack_experts(plain._replace(**changed))
    packed, x, ids = pack_experts(plain), torch.randn(3, 64), torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="columns of topk_weights must be those of topk_ids = 2, got 1"):
        run_rows(x, ids, torch.ones(3, 1), 0, packed, False)
    with pytest.raises(ValueError, match=r"w13 must be \[E, 2 \* I, H\] for w2"):
        run_rows(x, ids, torch.ones(3, 2), 0, packed._replace(w2=packed.w2[:3]), False)


def test_biases_of_any_strides() -> None:
    plain = draw_experts(torch.float32, "silu", True)
    strided = plain._replace(w13_bias=torch.cat([plain.w13_bias, plain.w13_bias + 9], 1)[:, : plain.w13_bias.shape[1]])
    x, ids, weights = torch.randn(3, 64), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    found, wanted = (run_rows(x, ids, weights, 0, pack_experts(experts), False) for experts in (strided, plain))
    assert torch.equal(found, wanted)


def opposed_experts() -> mo.ExpertWeights:
    """Experts in float16 whose results are beyond it; those of the second half take 7 / 8 of the first half's back."""
    plain = draw_experts(torch.float16, "silu", False)
    w2 = plain.w2[: E // 2] * 2.0**11
    return plain._replace(w13=plain.w13[: E // 2].repeat(2, 1, 1), w2=torch.cat((w2, w2 * -0.875)))


def opposed_choices(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Large hidden states, an expert and the one that opposes it, of equal weight; and a choice of nothing."""
    generator = torch.Generator().manual_seed(rows)
    x = (8 * torch.randn(rows, 64, generator=generator)).half()
    first = torch.randint(E // 2, (rows,), generator=generator, dtype=torch.int32)
    ids = torch.stack((first, first + E // 2, torch.full_like(first, -1)), dim=1)
    return x, ids, torch.rand(rows, 1, generator=generator).repeat(1, 3) / 2 + 0.5


def check_opposed(found: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, **how: Any) -> None:
    """The sum, which float16 holds though it does not hold the summands. Each of these, 8 and 7 times the sum, may be
    off by 2 ** -11 of itself, and what goes into the second product by as much."""
    routing = mo.Routing(ids.shape[1], E, **how)
    one, both = (
        dense_moe(
            x,
            torch.zeros(len(x), E),
            opposed_experts(),
            routing._replace(top_k=n),
            topk_ids=ids[:, :n],
            topk_weights=weights[:, :n],
        )
        for n in (1, ids.shape[1])
    )
    assert one.abs().max() > 65504 and both.abs().max() < 65504
    assert (found.double() - both).abs().max() <= (8 + 7 + 1) * 2.0**-11 * both.abs().max()


@pytest.mark.parametrize("weights_on_input", [False, True], ids=["output", "input"])
@pytest.mark.parametrize(("rows", "num_choices"), [(5, 2), (2, 3), (33, 3)], ids=["all-here", "few", "some-here"])
def test_summands_beyond_float16(rows: int, num_choices: int, weights_on_input: bool) -> None:
    x, ids, weights = opposed_choices(rows)
    ids, weights = ids[:, :num_choices], weights[:, :num_choices]
    found = run_rows(x, ids, weights, 0, pack_experts(opposed_experts()), weights_on_input)
    check_opposed(found, x, ids, weights, apply_router_weight_on_input=weights_on_input)


def run_opposed(rank: int, problem: Problem, is_compiled: bool) -> torch.Tensor:
    """Experts that oppose each other are on different ranks."""
    load_kernels()
    whole = opposed_experts()
    own = whole._replace(w13=own_part(whole.w13, rank), w2=own_part(whole.w2, rank))
    stage: Any = make_stage(rank, problem, pack_experts(own))
    x, ids, weights = opposed_choices(problem.counts[problem.owner(rank)])
    if is_compiled:
        torch._dynamo.reset()
        stage = torch.compile(stage, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        return stage(make_inputs(rank, problem)._replace(hidden=x, topk_ids=ids, topk_weights=weights))


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("form", ["all2all", "mc2", "allgather-dp", "allgather-ep"])
def test_summands_of_ranks_beyond_float16(ranks4: RankPool, form: str, is_compiled: bool) -> None:
    problem = Problem(
        form, counts=(3, 7, 5, 2), dtype=torch.float16, routing=mo.Routing(3, E), chosen="ids-and-weights", **SIZES
    )
    for rank, found in enumerate(ranks4.run(run_opposed, problem, is_compiled)):
        assert found.dtype is torch.float16
        check_opposed(found, *opposed_choices(problem.counts[problem.owner(rank)]))
