"""Quantisation against the formats written out in float64, element by element, and against torchao."""

import math
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import moe_ops as mo
from moe_ops import Quant

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FORMATS = [quant for quant in Quant if quant is not Quant.NONE]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = sorted(
    {mantissa / 8 * 2.0**-6 for mantissa in range(8)}
    | {(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)} - {480.0}
)


@st.composite
def rows(draw: Any, specials: bool = False) -> torch.Tensor:
    """Up to 5 rows of up to 70 values of every magnitude, a few of them zero (or infinite, or NaN)."""
    shape = draw(st.integers(0, 5)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(DTYPES)
    spread = draw(st.sampled_from([0, 3, 30, 120]))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x *= 2.0 ** ((torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5) * spread)
    x[torch.rand(shape, generator=generator) < 0.1] = 0
    limit = torch.finfo(dtype).max
    x = x.clamp(-limit, limit)
    if specials:
        x[torch.rand(shape, generator=generator) < 0.02] = draw(st.sampled_from([math.inf, -math.inf, math.nan]))
    return x.to(dtype)


def nearest(value: float, grid: list[float]) -> float:
    """Round a magnitude to the grid, ties to the even code, clamped to the last."""
    exact = Fraction(value)
    code = min(range(len(grid)), key=lambda c: (abs(Fraction(grid[c]) - exact), c % 2))
    return grid[code]


def expected_block(block: list[float], grid: list[float], emax: int) -> tuple[list[float], float]:
    """Elements and scale of one MX block, by section 6.3 of the specification."""
    amax = max(abs(value) for value in block)
    if not all(math.isfinite(value) for value in block):
        return [0.0] * len(block), math.nan
    exponent = -127 if amax == 0 else max(math.frexp(amax)[1] - 1 - emax, -127)
    scale = 2.0**exponent
    return [math.copysign(nearest(abs(value) / scale, grid), value) for value in block], scale


@pytest.mark.parametrize(("quant", "grid", "emax"), [(Quant.MXFP8, E4M3, 8), (Quant.MXFP4, E2M1, 2)], ids=["8", "4"])
@given(x=rows(specials=True))
@settings(max_examples=60)
def test_mx_follows_the_specification(quant: Quant, grid: list[float], emax: int, x: torch.Tensor) -> None:
    quantized, scale = mo.quantize_activations(x, quant=quant)
    values = mo.dequantize_activations(quantized, scale, quant=quant, hidden_size=x.shape[1])
    assert scale.shape == (x.shape[0], -(-x.shape[1] // 32))
    for row, row_values, row_scales in zip(x.tolist(), values.tolist(), scale.to(torch.float64).tolist(), strict=True):
        for index, found_scale in enumerate(row_scales):
            elements, wanted_scale = expected_block(row[index * 32 : index * 32 + 32], grid, emax)
            found = row_values[index * 32 : index * 32 + 32]
            if math.isnan(wanted_scale):
                assert math.isnan(found_scale)
                assert all(math.isnan(value) for value in found)
            else:
                assert found_scale == wanted_scale
                assert found == [element * wanted_scale for element in elements]


@given(x=rows(specials=True))
@settings(max_examples=100)
def test_int8_rounds_to_the_nearest_step(x: torch.Tensor) -> None:
    quantized, scale = mo.quantize_activations(x, quant=Quant.W8A8)
    assert quantized.dtype == torch.int8
    assert scale.dtype == torch.float32
    for row, elements, step in zip(x.double(), quantized.double(), scale.double(), strict=True):
        amax = row.abs().max()
        if not amax.isfinite():
            assert step.isnan()
            assert (elements == 0).all()
        else:
            torch.testing.assert_close(step, amax / 127, rtol=1e-6, atol=2.0**-149)
            slack = amax * 2.0**-22 + 2.0**-126  # float32 arithmetic, and steps that are subnormal
            assert ((elements * step - row).abs() <= step / 2 + slack).all()


@pytest.mark.parametrize("quant", FORMATS, ids=lambda q: q.value)
@given(x=rows())
@settings(max_examples=40)
def test_no_row_changes_another(quant: Quant, x: torch.Tensor) -> None:
    whole = mo.quantize_activations(x, quant=quant)
    for index in range(x.shape[0]):
        alone = mo.quantize_activations(x[index : index + 1], quant=quant)
        for tensor, row in zip(whole, alone, strict=True):
            assert torch.equal(tensor[index : index + 1].view(torch.uint8), row.contiguous().view(torch.uint8))


@pytest.mark.parametrize("quant", FORMATS, ids=lambda q: q.value)
def test_zeros_stay_zeros(quant: Quant) -> None:
    quantized, scale = mo.quantize_activations(torch.zeros(2, 40), quant=quant)
    assert not quantized.view(torch.uint8).any()
    assert not scale.view(torch.uint8).any()  # as the rows that a gather pads with
    assert torch.equal(mo.dequantize_activations(quantized, scale, quant=quant), torch.zeros(2, 40))


@pytest.mark.parametrize("quant", FORMATS, ids=lambda q: q.value)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bytes_of_a_row(quant: Quant, dtype: torch.dtype) -> None:
    quantized, scale = mo.quantize_activations(torch.ones(3, 64, dtype=dtype), quant=quant)
    row = (quantized.nbytes + scale.nbytes) // 3
    assert row == {Quant.W8A8: 64 + 4, Quant.W4A8: 64 + 4, Quant.MXFP8: 64 + 2, Quant.MXFP4: 32 + 2}[quant]
    values = mo.dequantize_activations(quantized, scale, quant=quant, dtype=dtype)
    torch.testing.assert_close(values, torch.ones(3, 64, dtype=dtype))


@pytest.mark.parametrize("quant", [Quant.MXFP8, Quant.MXFP4], ids=lambda q: q.value)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e5, 1e30]))
@settings(max_examples=30)
def test_mx_agrees_with_torchao(quant: Quant, seed: int, scale: float) -> None:
    """Finite values and whole blocks: torchao saturates infinities, where ours are NaN, and takes no ragged block."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(seed)) * scale
    x[1, 3], x[2, :32] = 0, 0
    element = torch.float8_e4m3fn if quant is Quant.MXFP8 else torch.float4_e2m1fn_x2
    scales, elements = to_mx(x, element, 32, ScaleCalculationMode.FLOOR)
    quantized, ours = mo.quantize_activations(x, quant=quant)
    assert torch.equal(ours.view(torch.uint8), scales.view(torch.uint8).view(ours.shape))
    assert torch.equal(quantized.view(torch.uint8), elements.view(torch.uint8).view(quantized.shape))


@given(seed=st.integers(0, 2**32))
@settings(max_examples=30)
def test_int8_agrees_with_torchao(seed: int) -> None:
    from torchao.quantization import MappingType, quantize_affine
    from torchao.quantization.quant_primitives import choose_qparams_affine

    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed))
    scale, zero = choose_qparams_affine(
        x, MappingType.SYMMETRIC, (1, 40), torch.int8, -127, 127, eps=1e-30, scale_dtype=torch.float32
    )
    elements = quantize_affine(x, (1, 40), scale, zero, torch.int8, -127, 127)
    quantized, ours = mo.quantize_activations(x, quant=Quant.W8A8)
    torch.testing.assert_close(ours, scale.flatten(), rtol=1e-6, atol=0)
    assert ((quantized.int() - elements.int()).abs() <= 1).all()  # where rounding of the scale moves a tie
    assert (quantized == elements).float().mean() > 0.99


def test_odd_width_needs_its_length() -> None:
    x = torch.randn(2, 5)
    quantized, scale = mo.quantize_activations(x, quant=Quant.MXFP4)
    assert mo.dequantize_activations(quantized, scale, quant=Quant.MXFP4, hidden_size=5).shape == (2, 5)
    with pytest.raises(ValueError, match="hidden_size must be 6 or 5 for 3 bytes, got 7"):
        mo.dequantize_activations(quantized, scale, quant=Quant.MXFP4, hidden_size=7)


def test_bad_input_names_the_argument() -> None:
    quantized, scale = mo.quantize_activations(torch.ones(2, 40), quant=Quant.MXFP8)
    with pytest.raises(
        TypeError, match=r"quantize: hidden_states must have one of the dtypes torch.float32.*got torch.int32"
    ):
        mo.quantize_activations(torch.ones(2, 4, dtype=torch.int32), quant=Quant.W8A8)
    with pytest.raises(ValueError, match="quantize: hidden_states must be 2-D, got 1-D"):
        mo.quantize_activations(torch.ones(4), quant=Quant.MXFP4)
    with pytest.raises(ValueError, match=r"quant must name a format, got Quant.NONE"):
        mo.quantize_activations(torch.ones(2, 4), quant=Quant.NONE)
    with pytest.raises(TypeError, match="quant must be a Quant, got 'w8a8'"):
        mo.quantize_activations(torch.ones(2, 4), quant="w8a8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"quantized must have one of the dtypes torch.uint8, torch.float4_e2m1fn_x2"):
        mo.dequantize_activations(quantized, scale, quant=Quant.MXFP4)
    with pytest.raises(ValueError, match="scale must have 2 columns for H = 40, got 1"):
        mo.dequantize_activations(quantized, scale[:, :1], quant=Quant.MXFP8)
    with pytest.raises(ValueError, match="rows of scale must be those of quantized = 2, got 1"):
        mo.dequantize_activations(quantized, scale[:1], quant=Quant.MXFP8)
    with pytest.raises(TypeError, match=r"dtype must be one of .*, got torch.int8"):
        mo.dequantize_activations(quantized, scale, quant=Quant.MXFP8, dtype=torch.int8)
