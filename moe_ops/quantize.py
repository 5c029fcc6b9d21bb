"""Quantisation of activations, so that fewer bytes travel: int8 with a scale per token, and the MX formats.

The MX formats follow the OCP Microscaling Formats (MX) Specification v1.0 (sections 5.2, 5.3 and 6.3): 32 elements of a row
share one power of two, ``2 ** (floor(log2(amax)) - emax)`` with emax of the element format's largest exponent; elements are
rounded to nearest, ties to even, and what is beyond the largest element is clamped to it. Where the specification leaves a
choice, and for int8, this is ours:

- *Ragged last block*: where 32 does not divide H the last block has fewer elements. Nothing is padded.
- *Zeros*: a row (int8) or block (MX) of zeros has the smallest scale, 0 or ``2 ** -127``, and dequantises to zeros.
- *Infinities and NaN*: the scale of a row or block that holds one is NaN (byte 0xFF in MX), its elements are 0, and all of it
  dequantises to NaN. int8 and e2m1 have no code for either, and to saturate one in silence would be worse.

T tokens, H hidden, B = ceil(H / 32) blocks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fake_impls import quantize as shapes
from fake_impls.checks import check_choice, check_dtype
from fake_impls.layout import ceil_div
from fake_impls.quantize import BLOCK
from moe_ops._library import cast, define, needs_gradient, no_gradient, refuse_forward_mode
from moe_ops.types import Quant

INT8_MAX = 127
E4M3_MAX, E4M3_EMAX = 448.0, 8
E2M1_MAX, E2M1_EMAX = 6.0, 2
E8M0_BIAS, E8M0_NAN = 127, 255
MANTISSA_BITS = 23  # of float32
FP4 = (torch.uint8, torch.float4_e2m1fn_x2)


def _quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x_TH = x.to(torch.float32)
    amax_T = x_TH.abs().amax(dim=1) if x.shape[1] else x_TH.new_zeros(x.shape[0])
    scale_T = torch.where(amax_T < torch.inf, amax_T / INT8_MAX, torch.nan)  # NaN is not below, either
    scale_T1 = scale_T.unsqueeze(1)
    elements_TH = (x_TH / scale_T1).round().clamp(-INT8_MAX, INT8_MAX)
    return cast(torch.where(scale_T1 > 0, elements_TH, 0.0), torch.int8), scale_T  # else the scale is 0, or NaN


def _dequantize_int8(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return cast(quantized.to(torch.float32) * scale.unsqueeze(1), dtype)


def _scale_blocks(x: torch.Tensor, emax: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``x / scale`` in float32 ``[T, H]``, zero where the scale is NaN, and the e8m0 scales."""
    num_tokens, hidden_size = x.shape
    blocks = ceil_div(hidden_size, BLOCK)
    x_TBK = F.pad(x.to(torch.float32), (0, blocks * BLOCK - hidden_size)).view(num_tokens, blocks, BLOCK)
    # The exponent bits of a float32 are floor(log2) + 127, the bias of e8m0, and 255 for infinity and NaN alike.
    biased_TB = x_TBK.abs().amax(dim=2).view(torch.int32) >> MANTISSA_BITS
    is_nan_TB = biased_TB == E8M0_NAN
    code_TB = torch.where(is_nan_TB, E8M0_NAN, (biased_TB - emax).clamp(min=0))
    # 2 ** (127 - code), exactly: the bits of a float32 whose exponent is 254 - code.
    inverse_TB = ((2 * E8M0_BIAS - code_TB).clamp(min=0) << MANTISSA_BITS).view(torch.float32)
    scaled_TBK = torch.where(is_nan_TB.unsqueeze(2), 0.0, x_TBK * inverse_TB.unsqueeze(2))
    scaled_TH = scaled_TBK.view(num_tokens, blocks * BLOCK)[:, :hidden_size]
    return scaled_TH, cast(code_TB, torch.uint8).view(torch.float8_e8m0fnu)


def _times_scales(elements_TH: torch.Tensor, scale_TB: torch.Tensor) -> torch.Tensor:
    scale_TB1 = scale_TB.view(torch.float8_e8m0fnu).to(torch.float32).unsqueeze(2)
    return elements_TH * scale_TB1.expand(-1, -1, BLOCK).flatten(1)[:, : elements_TH.shape[1]]


def _quantize_mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scaled_TH, scale_TB = _scale_blocks(x, E4M3_EMAX)
    # To nearest even; not every device saturates.
    return cast(scaled_TH.clamp(-E4M3_MAX, E4M3_MAX), torch.float8_e4m3fn), scale_TB


def _dequantize_mxfp8(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return cast(_times_scales(quantized.view(torch.float8_e4m3fn).to(torch.float32), scale), dtype)


def _quantize_mxfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scaled_TH, scale_TB = _scale_blocks(x, E2M1_EMAX)
    magnitude_TH = scaled_TH.abs().clamp(max=E2M1_MAX)
    # Codes 0 to 7 go in steps of 0.5 below 2, of 1 below 4 and of 2 from there; round() takes ties to even codes.
    coarse_TH = torch.where(magnitude_TH < 4, magnitude_TH.round() + 2, (magnitude_TH / 2).round() + 4)
    code_TH = torch.where(magnitude_TH < 2, (magnitude_TH * 2).round(), coarse_TH).to(torch.uint8)
    code_TH = code_TH | (scaled_TH.signbit().to(torch.uint8) << 3)
    low_TP, high_TP = F.pad(code_TH, (0, x.shape[1] % 2)).unflatten(1, (ceil_div(x.shape[1], 2), 2)).unbind(2)
    return cast(low_TP | (high_TP << 4), torch.uint8), scale_TB


def _dequantize_mxfp4(
    quantized: torch.Tensor, scale: torch.Tensor, hidden_size: int, dtype: torch.dtype
) -> torch.Tensor:
    code_TH = torch.stack((quantized & 0xF, quantized >> 4), dim=2).flatten(1)[:, :hidden_size]
    step_TH = code_TH & 7
    # 0, 0.5, 1, 1.5, 2, then 3, 4, 6: computed, since a table would have to be sent to the device.
    beyond_TH = step_TH.to(torch.float32) - 2 + (step_TH == 7)
    magnitude_TH = torch.where(step_TH < 5, step_TH.to(torch.float32) * 0.5, beyond_TH)
    return cast(_times_scales(torch.where(code_TH > 7, -magnitude_TH, magnitude_TH), scale), dtype)


quantize_int8 = define(
    "quantize_int8(Tensor x) -> (Tensor, Tensor)",
    kernel=_quantize_int8,
    fake=shapes.quantize_int8,
    check=shapes.check_quantize,
    backward=no_gradient,
)
dequantize_int8 = define(
    "dequantize_int8(Tensor quantized, Tensor scale, ScalarType dtype) -> Tensor",
    kernel=_dequantize_int8,
    fake=shapes.dequantize_int8,
    check=shapes.check_dequantize_int8,
    backward=no_gradient,
)
quantize_mxfp8 = define(
    "quantize_mxfp8(Tensor x) -> (Tensor, Tensor)",
    kernel=_quantize_mxfp8,
    fake=shapes.quantize_mxfp8,
    check=shapes.check_quantize,
    backward=no_gradient,
)
dequantize_mxfp8 = define(
    "dequantize_mxfp8(Tensor quantized, Tensor scale, ScalarType dtype) -> Tensor",
    kernel=_dequantize_mxfp8,
    fake=shapes.dequantize_mxfp8,
    check=shapes.check_dequantize_mxfp8,
)
quantize_mxfp4 = define(
    "quantize_mxfp4(Tensor x) -> (Tensor, Tensor)",
    kernel=_quantize_mxfp4,
    fake=shapes.quantize_mxfp4,
    check=shapes.check_quantize,
    backward=no_gradient,
)
dequantize_mxfp4 = define(
    "dequantize_mxfp4(Tensor quantized, Tensor scale, int hidden_size, ScalarType dtype) -> Tensor",
    kernel=_dequantize_mxfp4,
    fake=shapes.dequantize_mxfp4,
    check=shapes.check_dequantize_mxfp4,
)

_QUANTIZE: dict[Quant, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    Quant.W8A8: quantize_int8,
    Quant.W4A8: quantize_int8,
    Quant.MXFP8: quantize_mxfp8,
    Quant.MXFP4: quantize_mxfp4,
}


def quantize_activations(hidden_states: torch.Tensor, *, quant: Quant) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row by itself: no row changes another, and no tokens give no rows.

    | quant | elements | scale | bytes a row |
    |---|---|---|---|
    | W8A8, W4A8 | int8 ``[T, H]`` | float32 ``[T]``: amax / 127 | H + 4 |
    | MXFP8 | float8_e4m3fn ``[T, H]`` | float8_e8m0fnu ``[T, ceil(H / 32)]`` | H + H / 32 |
    | MXFP4 | uint8 ``[T, ceil(H / 2)]``: two e2m1 elements, the first in the low bits | likewise | H / 2 + H / 32 |

    (MXFP4 is uint8 because ``torch.export`` cannot serialise float4_e2m1fn_x2; ``.view(torch.float4_e2m1fn_x2)`` gives that.)

    Args:
        hidden_states: ``[T, H]`` float32, bfloat16 or float16; the arithmetic is float32.
        quant: the format; not ``Quant.NONE``.

    Raises:
        ValueError: `hidden_states` is not 2-D, or `quant` is ``Quant.NONE``.
        TypeError: its dtype is another.
        RuntimeError: autograd records what is done to `hidden_states`: quantised values have no gradient.

    Source: OCP Microscaling Formats (MX) Specification v1.0; the module's docstring says how blocks that hold zeros, infinities
    or NaN are quantised.

    Example::

        quantized, scale = mo.quantize_activations(x, quant=mo.Quant.W8A8)
    """
    refuse_forward_mode("quantize_activations", (hidden_states,))
    if needs_gradient([hidden_states]):
        raise RuntimeError(
            "quantize_activations: hidden_states must not require a gradient, for quantised values have none: "
            "use torch.no_grad(), or Quant.NONE"
        )
    quantized, scale = _QUANTIZE[check_format("quantize_activations", quant)](hidden_states)
    return quantized, scale


def dequantize_activations(
    quantized: torch.Tensor,
    scale: torch.Tensor,
    *,
    quant: Quant,
    dtype: torch.dtype = torch.float32,
    hidden_size: int | None = None,
) -> torch.Tensor:
    """The values that `quantize_activations` has made of each row, ``[T, H]`` of `dtype`.

    Args:
        quantized: the elements; of MXFP4 also as float4_e2m1fn_x2.
        scale: their scales.
        quant: their format; not ``Quant.NONE``.
        dtype: float32, bfloat16 or float16.
        hidden_size: H. MXFP4 needs it where H is odd; the other formats hold it in their shape.

    Raises:
        ValueError: shapes do not fit each other, or `quant` is ``Quant.NONE``.
        TypeError: a dtype is not that of the format.

    Example::

        quantized, scale = mo.quantize_activations(x, quant=mo.Quant.W8A8)
        values = mo.dequantize_activations(quantized, scale, quant=mo.Quant.W8A8)  # x, to 1 part in 254 of a row's largest
    """
    check_format("dequantize_activations", quant)
    values: torch.Tensor
    if quant in (Quant.W8A8, Quant.W4A8):
        values = dequantize_int8(quantized, scale, dtype)
    else:
        element_dtypes = (torch.float8_e4m3fn,) if quant is Quant.MXFP8 else FP4
        check_dtype("dequantize_activations", "quantized", quantized, element_dtypes)
        check_dtype("dequantize_activations", "scale", scale, (torch.float8_e8m0fnu,))
        # The ops take bytes: torch's checks of an op cannot compare arguments of these dtypes.
        as_bytes = quantized.view(torch.uint8), scale.view(torch.uint8)
        if quant is Quant.MXFP4:
            width = 2 * quantized.shape[-1] if hidden_size is None else hidden_size
            values = dequantize_mxfp4(*as_bytes, width, dtype)
        else:
            values = dequantize_mxfp8(*as_bytes, dtype)
    if hidden_size is not None and hidden_size != values.shape[1]:
        raise ValueError(f"dequantize_activations: hidden_size must be {values.shape[1]}, got {hidden_size}")
    return values


def check_format(op: str, quant: Quant) -> Quant:
    """Raise unless `quant` names a format; return it."""
    check_choice(op, "quant", quant, Quant)
    if quant is Quant.NONE:
        raise ValueError(f"{op}: quant must name a format, got {quant}")
    return quant
