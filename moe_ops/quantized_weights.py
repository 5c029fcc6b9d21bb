"""Quantised weights of experts: int8 and int4 with a scale per channel, and the MX formats of activations.

E experts, N outputs, K inputs.
"""

import torch
import torch.nn.functional as F

from fake_impls.checks import FLOATS, check_dim, check_dtype
from moe_ops.quantize import FP4, check_format, dequantize_activations, quantize_activations
from moe_ops.types import Quant

INT4_MAX = 7


def quantize_weights(weight: torch.Tensor, *, quant: Quant) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise the weights of experts along their inputs, for `ExpertWeights` and their scales.

    | quant | elements | scale |
    |---|---|---|
    | W8A8 | int8 ``[E, N, K]`` | float32 ``[E, N]``, one a channel: amax / 127 |
    | W4A8 | uint8 ``[E, N, ceil(K / 2)]``: two int4 (two's complement), the first in the low bits | likewise: amax / 7 |
    | MXFP8, MXFP4 | as those of activations | as those of activations: a block of 32 inputs |

    Args:
        weight: ``[E, N, K]`` float32, bfloat16 or float16: N outputs, K inputs.
        quant: the format; not ``Quant.NONE``.

    Raises:
        ValueError: `weight` is not 3-D, or `quant` is ``Quant.NONE``.
        TypeError: its dtype is another.

    Example::

        w13, w13_scale = mo.quantize_weights(w13, quant=mo.Quant.W8A8)
    """
    check_format("quantize_weights", quant)
    check_dim("quantize_weights", "weight", weight, 3)
    check_dtype("quantize_weights", "weight", weight, FLOATS)
    flat = weight.flatten(0, 1)
    if quant is Quant.W4A8:
        step = flat.to(torch.float32).abs().amax(dim=1, keepdim=True) / INT4_MAX
        rounded = torch.where(step > 0, (flat / step).round().clamp(-INT4_MAX, INT4_MAX), 0.0).to(torch.int8)
        low, high = F.pad(rounded, (0, flat.shape[1] % 2)).view(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
        quantized, scale = (low & 0xF) | (high << 4), step.squeeze(1)
    else:
        quantized, scale = quantize_activations(flat.detach(), quant=quant)
    leading = weight.shape[:2]
    return quantized.view(*leading, quantized.shape[1]), scale.view(*leading, *scale.shape[1:])


def dequantize_weights(
    weight: torch.Tensor, scale: torch.Tensor, *, num_inputs: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The values of `quantize_weights`, ``[E, N, num_inputs]``; the dtypes of `weight` and `scale` say the format.

    Example::

        quantized, scale = mo.quantize_weights(w13, quant=mo.Quant.MXFP8)
        values = mo.dequantize_weights(quantized, scale, num_inputs=w13.shape[2])
    """
    check_dim("dequantize_weights", "weight", weight, 3)
    is_integer = weight.dtype in (torch.int8, torch.uint8)
    if is_integer and scale.dtype is not torch.float8_e8m0fnu:  # bytes with such scales are MXFP4
        check_dtype("dequantize_weights", "scale", scale, (torch.float32,))
        if scale.shape != weight.shape[:2]:
            raise ValueError(f"dequantize_weights: scale must be {tuple(weight.shape[:2])}, got {tuple(scale.shape)}")
        values = weight if weight.dtype is torch.int8 else _unpack_int4(weight)[..., :num_inputs]
        return (values.to(torch.float32) * scale.unsqueeze(2)).to(dtype)
    check_dtype("dequantize_weights", "weight", weight, (torch.float8_e4m3fn, *FP4))
    quant = Quant.MXFP8 if weight.dtype is torch.float8_e4m3fn else Quant.MXFP4
    flat = dequantize_activations(
        weight.flatten(0, 1), scale.flatten(0, 1), quant=quant, dtype=dtype, hidden_size=num_inputs
    )
    return flat.view(*weight.shape[:2], num_inputs)


def _unpack_int4(pairs: torch.Tensor) -> torch.Tensor:
    """``uint8 [..., P] -> int8 [..., 2 * P]``: sign-extended, the low bits first."""
    codes = torch.stack((pairs & 0xF, pairs >> 4), dim=-1).flatten(-2).to(torch.int8)
    return torch.where(codes > INT4_MAX, codes - 16, codes)
