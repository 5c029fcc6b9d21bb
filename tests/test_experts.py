"""The grouped experts against the oracle's MLP, one group at a time; quantised weights against their own values."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import moe_ops as mo
from moe_ops.activations import ACTIVATIONS
from moe_ops.experts import activate, grouped_linear, run_experts
from moe_ops.quantized_weights import dequantize_weights, quantize_weights
from moe_ops.shared_experts import run_shared_experts

from .oracle import mlp

FORMATS = [quant for quant in mo.Quant if quant is not mo.Quant.NONE]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def draw_experts(num_experts: int, hidden: int, inner: int, activation: str, has_bias: bool) -> mo.ExpertWeights:
    generator = torch.Generator().manual_seed(hidden * 100 + inner)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    biases = (draw(num_experts, 2 * inner), draw(num_experts, hidden)) if has_bias else (None, None)
    return mo.ExpertWeights(
        draw(num_experts, 2 * inner, hidden), draw(num_experts, hidden, inner), *biases, activation=activation
    )


def in_dtype(experts: mo.ExpertWeights, dtype: torch.dtype) -> mo.ExpertWeights:
    return mo.ExpertWeights(*(x.to(dtype) if isinstance(x, torch.Tensor) else x for x in experts))


def expected_of(rows: torch.Tensor, counts: list[int], experts: mo.ExpertWeights) -> torch.Tensor:
    outputs = []
    for expert, group in enumerate(rows[: sum(counts)].split(counts)):
        b13 = 0.0 if experts.w13_bias is None else experts.w13_bias[expert].double()
        b2 = 0.0 if experts.w2_bias is None else experts.w2_bias[expert].double()
        outputs.append(mlp(group, experts.w13[expert], experts.w2[expert], experts.activation, b13) + b2)
    return torch.cat(outputs)


@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    more=st.integers(0, 4),
    hidden=st.sampled_from([1, 5, 8, 24]),
    inner=st.sampled_from([1, 4, 9]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=150)
def test_each_group_meets_its_expert(
    counts: list[int], more: int, hidden: int, inner: int, activation: str, has_bias: bool, dtype: torch.dtype
) -> None:
    experts = in_dtype(draw_experts(len(counts), hidden, inner, activation, has_bias), dtype)
    rows = torch.randn(sum(counts) + more, hidden, generator=torch.Generator().manual_seed(sum(counts))).to(dtype)
    rows[sum(counts) :] = torch.nan
    output = run_experts(rows, torch.tensor(counts), experts)
    assert (output.dtype, output.shape) == (dtype, rows.shape)
    assert not output[sum(counts) :].any()
    if sum(counts):
        expected = expected_of(rows, counts, experts)
        error = (output[: sum(counts)].double() - expected).abs().max()
        assert error <= 32 * ROUNDING[dtype] * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
def test_weights_of_any_strides(dtype: torch.dtype, layout: str) -> None:
    experts = in_dtype(draw_experts(3, 8, 4, "silu", False), dtype)
    rows, counts = torch.randn(6, 8).to(dtype), torch.tensor([1, 0, 5])
    expected = run_experts(rows, counts, experts)
    if layout == "transposed":
        experts = experts._replace(w13=experts.w13.transpose(1, 2).contiguous().transpose(1, 2))
        rows = rows.t().contiguous().t()
    if layout == "sliced":
        experts = experts._replace(w13=torch.cat([experts.w13, experts.w13[:, :, :1]], dim=2)[:, :, :8])
    # The order of a product's sum is that of the library for the strides.
    torch.testing.assert_close(
        run_experts(rows, counts, experts),
        expected,
        rtol=2e-2 if dtype != torch.float32 else 1e-5,
        atol=1e-6 if dtype is torch.float32 else 1e-2,
    )


@pytest.mark.parametrize("quant", FORMATS, ids=lambda q: q.value)
@pytest.mark.parametrize("inputs", [64, 35])
def test_weights_are_rounded_by_half_a_step(quant: mo.Quant, inputs: int) -> None:
    weight = torch.randn(2, 6, inputs, generator=torch.Generator().manual_seed(0))
    quantized, scale = quantize_weights(weight, quant=quant)
    values = dequantize_weights(quantized, scale, num_inputs=inputs)
    error = (values - weight).abs()
    if quant is mo.Quant.W8A8:
        assert quantized.dtype == torch.int8
        assert (error <= weight.abs().amax(2, keepdim=True) / 254 * 1.0001).all()
    elif quant is mo.Quant.W4A8:
        assert quantized.shape == (2, 6, -(-inputs // 2))
        assert (error <= weight.abs().amax(2, keepdim=True) / 14 * 1.0001).all()
    else:
        flat, flat_scale = mo.quantize_activations(weight.flatten(0, 1), quant=quant)
        expected = mo.dequantize_activations(flat, flat_scale, quant=quant, hidden_size=inputs)
        assert torch.equal(values, expected.view(weight.shape))


def test_int4_pairs_are_twos_complement_low_bits_first() -> None:
    pairs = torch.tensor([[[0x8F, 0x70]]], dtype=torch.uint8)
    values = dequantize_weights(pairs, torch.tensor([[2.0]]), num_inputs=4)
    assert values.tolist() == [[[-2.0, -16.0, 0.0, 14.0]]]


@pytest.mark.parametrize("quant", [mo.Quant.NONE, *FORMATS], ids=lambda q: q.value)
@pytest.mark.parametrize("weight_quant", FORMATS, ids=lambda q: q.value)
def test_quantised_experts_multiply_the_values_that_they_stand_for(quant: mo.Quant, weight_quant: mo.Quant) -> None:
    """The oracle gets the rounded weights, and rounds activations before each product: what is left is float32 rounding."""
    hidden, inner, counts = 40, 33, [3, 1, 3]
    plain = draw_experts(3, hidden, inner, "silu", True)
    w13, w13_scale = quantize_weights(plain.w13, quant=weight_quant)
    w2, w2_scale = quantize_weights(plain.w2, quant=weight_quant)
    experts = plain._replace(w13=w13, w2=w2, w13_scale=w13_scale, w2_scale=w2_scale)
    rounded = plain._replace(
        w13=dequantize_weights(w13, w13_scale, num_inputs=hidden), w2=dequantize_weights(w2, w2_scale, num_inputs=inner)
    )
    rows = torch.randn(7, hidden, generator=torch.Generator().manual_seed(1))
    output = run_experts(rows, torch.tensor(counts), experts, quant=quant)
    first = rows if quant is mo.Quant.NONE else round_to(rows, quant)
    for expert, (group, found) in enumerate(zip(first.split(counts), output.split(counts), strict=True)):
        gated = group.double() @ rounded.w13[expert].double().T + plain.w13_bias[expert].double()
        gate, up = gated.chunk(2, dim=1)
        between = (gate / (1 + torch.exp(-gate)) * up).float()
        between = between if quant is mo.Quant.NONE else round_to(between, quant)
        expected = between.double() @ rounded.w2[expert].double().T + plain.w2_bias[expert].double()
        # Where float32 rounding moves a value over the border between two codes, that code is one step off.
        differs = (found.double() - expected).abs() > 1e-5
        assert differs.double().mean() < (0.01 if quant is mo.Quant.NONE else 0.2)
    if quant is not mo.Quant.NONE:  # with scales that they came with, the same
        quantized, scale = mo.quantize_activations(rows, quant=quant)
        given_scale = run_experts(
            quantized, torch.tensor(counts), experts, scale=scale, quant=quant, dtype=torch.float32
        )
        assert torch.equal(given_scale, output)


def round_to(x: torch.Tensor, quant: mo.Quant) -> torch.Tensor:
    quantized, scale = mo.quantize_activations(x, quant=quant)
    return mo.dequantize_activations(quantized, scale, quant=quant, hidden_size=x.shape[1])


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        (
            {"w2": torch.zeros(3, 4, 4)},
            ValueError,
            r"w13, w2 and counts must be of as many experts, got \(2, 8, 4\), \(3, 4",
        ),
        (
            {"w13": torch.zeros(2, 7, 4)},
            ValueError,
            "w13 must have a gate and an up row for each input of w2, got 7 rows",
        ),
        (
            {"w2": torch.zeros(2, 4, 4).char()},
            TypeError,
            "w2 without w2_scale must have one of the dtypes torch.float32",
        ),
        ({"w13": torch.zeros(2, 8, 5)}, ValueError, r"weight must be \[E, N, 4\] and counts \[E\], got \(2, 8, 5\)"),
        ({"w13": torch.zeros(3, 8, 4)}, ValueError, r"of as many experts, got \(3, 8, 4\), \(2, 4, 4\) and \(2,\)"),
        (
            {"w2": torch.zeros(2, 4, 4).half()},
            TypeError,
            r"w2 without w2_scale must have one of the dtypes torch\.float32, got torch\.float16",
        ),
        (
            {"w13": torch.zeros(2, 8, 4).half()},
            TypeError,
            r"w13 without w13_scale must have one of the dtypes torch\.float32, torch\.float32",
        ),
        (
            {"w2_bias": torch.zeros(2, 3)},
            ValueError,
            r"bias must be torch\.float32 \[2, 4\], got torch\.float32 \(2, 3\)",
        ),
        ({"activation": "relu"}, ValueError, r"activation must be one of .*, got 'relu'"),
        ({"w13_scale": torch.zeros(2, 8)}, TypeError, "weight must have one of the dtypes torch.float8_e4m3fn"),
    ],
)
def test_bad_input_names_the_argument(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    experts = mo.ExpertWeights(torch.zeros(2, 8, 4), torch.zeros(2, 4, 4))._replace(**changed)
    with pytest.raises(kind, match=message):
        run_experts(torch.zeros(3, 4), torch.tensor([1, 2]), experts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_take_rows_of_any_dtype(dtype: torch.dtype) -> None:
    experts = draw_experts(3, 8, 4, "silu", True)
    rows, counts = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype), torch.tensor([1, 0, 4])
    found = run_experts(rows, counts, experts)
    assert found.dtype == dtype
    assert torch.equal(found, run_experts(rows.float(), counts, experts).to(dtype))


def test_shared_experts_must_fit_the_tokens() -> None:
    shared = mo.SharedExperts(torch.zeros(6, 4), torch.zeros(4, 3), is_tp_sharded=False)
    x, layout = torch.zeros(2, 4), mo.Layout(mo.Strategy.ALL2ALL, mo.ParallelGroups())
    assert run_shared_experts(x, shared, layout)[1] is mo.Reduction.COMPLETE
    with pytest.raises(
        TypeError, match=r"shared_experts: w2 must have one of the dtypes torch.float32, got torch.float16"
    ):
        run_shared_experts(x, shared._replace(w2=shared.w2.half()), layout)
    for changed in ({"w13": torch.zeros(5, 4)}, {"w2": torch.zeros(5, 3)}, {"gate": torch.zeros(2, 4)}):
        with pytest.raises(
            ValueError, match=r"w13 must be \[2 \* I, H\], w2 \[H, I\] and gate \[1, H\] for H = 4, got"
        ):
            run_shared_experts(x, shared._replace(**changed), layout)


def test_quantised_rows_need_a_dtype_and_a_format() -> None:
    experts = mo.ExpertWeights(torch.zeros(2, 8, 4), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"dtype and quant must be given for quantised rows, got None and Quant.NONE"):
        run_experts(torch.zeros(3, 4, dtype=torch.int8), torch.tensor([1, 2]), experts, scale=torch.ones(3))
    with pytest.raises(TypeError, match="rows must have one of the dtypes"):
        grouped_linear(torch.zeros(3, 4, dtype=torch.int8), torch.tensor([3]), torch.zeros(1, 2, 4), None)


@pytest.mark.parametrize("weights", [torch.float16, torch.float32], ids=str)
def test_a_float16_result_is_finite_where_its_summands_are_not(weights: torch.dtype) -> None:
    """Two experts whose raw outputs are 98304 and -98304, beyond float16, with a sum of 6144."""
    w13 = torch.tensor([[[32.0], [32.0]], [[32.0], [32.0]]], dtype=weights)
    w2 = torch.tensor([[[96.0]], [[-96.0]]], dtype=weights)
    experts, x = mo.ExpertWeights(w13, w2), torch.ones(1, 1, dtype=torch.float16)
    raw = run_experts(x.expand(2, 1), torch.tensor([1, 1]), experts, is_summand=True)
    assert raw.dtype is torch.float32
    assert raw.flatten().tolist() == [98304.0, -98304.0]
    output = mo.moe_stage(
        x,
        None,
        experts,
        mo.Routing(top_k=2, num_experts=2),
        mo.Layout(mo.Strategy.ALLGATHER, mo.ParallelGroups()),
        topk_ids=torch.tensor([[0, 1]]),
        topk_weights=torch.tensor([[0.53125, 0.46875]]),
    )
    assert output.dtype is torch.float16
    assert output.item() == 6144


@given(
    rows=st.integers(1, 70),
    width=st.sampled_from([1, 3, 8, 17, 40]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=100)
def test_no_value_of_an_activation_depends_on_where_it_stands(
    rows: int, width: int, activation: str, dtype: torch.dtype
) -> None:
    """torch's vector loops round the last elements of a tensor in another way than those before."""
    row = torch.randn(1, 2 * width, generator=torch.Generator().manual_seed(rows)).to(dtype)
    alone = activate(row, activation)
    assert torch.equal(activate(row.expand(rows, -1).contiguous(), activation), alone.expand(rows, -1))


@given(rows=st.integers(1, 70), seed=st.integers(0, 100))
def test_the_gate_of_shared_experts_does_not_depend_on_the_batch(rows: int, seed: int) -> None:
    """With matrices of small integers, whose products are exact: those of libraries may depend on the number of rows."""
    generator = torch.Generator().manual_seed(seed)
    x, w13, w2, gate = (
        torch.randint(-3, 4, shape, generator=generator).float() for shape in ((1, 8), (2, 8), (8, 1), (1, 8))
    )
    shared, layout = (
        mo.SharedExperts(w13, w2, gate=gate, is_tp_sharded=False),
        mo.Layout(mo.Strategy.ALL2ALL, mo.ParallelGroups()),
    )
    together, _ = run_shared_experts(x.expand(rows, -1).contiguous(), shared, layout)
    assert torch.equal(together, together[:1].expand(rows, -1))
