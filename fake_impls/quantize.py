"""Shapes of activation quantisation. T tokens, H hidden, B = ceil(H / 32) blocks."""

import torch

from fake_impls.checks import FLOATS, check_dim, check_dtype, check_same_rows
from fake_impls.layout import ceil_div

BLOCK = 32
"""Elements that share one scale in the MX formats."""


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, H] -> int8 [T, H], float32 [T]``."""
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)


def quantize_mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, H] -> float8_e4m3fn [T, H], float8_e8m0fnu [T, B]``."""
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), _block_scales(x)


def quantize_mxfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, H] -> uint8 [T, ceil(H / 2)], float8_e8m0fnu [T, B]``: two e2m1 elements a byte."""
    return x.new_empty(x.shape[0], ceil_div(x.shape[1], 2), dtype=torch.uint8), _block_scales(x)


def check_quantize(x: torch.Tensor) -> None:
    check_dim("quantize", "hidden_states", x, 2)
    check_dtype("quantize", "hidden_states", x, FLOATS)


def dequantize_int8(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``int8 [T, H], float32 [T] -> dtype [T, H]``."""
    return quantized.new_empty(quantized.shape, dtype=dtype)


def check_dequantize_int8(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
    check_quantized(quantized, torch.int8, scale, torch.float32, dtype)
    check_dim("dequantize", "scale", scale, 1)


def dequantize_mxfp8(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``uint8 [T, H], uint8 [T, B] -> dtype [T, H]``: the bytes of e4m3 elements and e8m0 scales."""
    return quantized.new_empty(quantized.shape, dtype=dtype)


def check_dequantize_mxfp8(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
    check_quantized(quantized, torch.uint8, scale, torch.uint8, dtype)
    check_blocks(scale, quantized.shape[1])


def dequantize_mxfp4(
    quantized: torch.Tensor, scale: torch.Tensor, hidden_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """``uint8 [T, ceil(H / 2)], uint8 [T, B] -> dtype [T, H]``: the bytes of e2m1 pairs and e8m0 scales."""
    return quantized.new_empty(quantized.shape[0], hidden_size, dtype=dtype)


def check_dequantize_mxfp4(quantized: torch.Tensor, scale: torch.Tensor, hidden_size: int, dtype: torch.dtype) -> None:
    check_quantized(quantized, torch.uint8, scale, torch.uint8, dtype)
    if ceil_div(hidden_size, 2) != quantized.shape[1]:
        pairs = quantized.shape[1]
        raise ValueError(
            f"dequantize: hidden_size must be {2 * pairs} or {2 * pairs - 1} for {pairs} bytes, got {hidden_size}"
        )
    check_blocks(scale, hidden_size)


def check_quantized(
    quantized: torch.Tensor,
    dtype: torch.dtype,
    scale: torch.Tensor,
    scale_dtype: torch.dtype,
    result_dtype: torch.dtype,
) -> None:
    """Elements and scales of one format, for as many rows."""
    check_dim("dequantize", "quantized", quantized, 2)
    check_dtype("dequantize", "quantized", quantized, (dtype,))
    check_dtype("dequantize", "scale", scale, (scale_dtype,))
    check_same_rows("dequantize", "scale", scale, "quantized", quantized)
    if result_dtype not in FLOATS:
        raise TypeError(f"dequantize: dtype must be one of {', '.join(map(str, FLOATS))}, got {result_dtype}")


def check_blocks(scale: torch.Tensor, hidden_size: int) -> None:
    """One scale for each block of a row."""
    check_dim("dequantize", "scale", scale, 2)
    blocks = ceil_div(hidden_size, BLOCK)
    if scale.shape[1] != blocks:
        raise ValueError(f"dequantize: scale must have {blocks} columns for H = {hidden_size}, got {scale.shape[1]}")


def _block_scales(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], ceil_div(x.shape[1], BLOCK), dtype=torch.float8_e8m0fnu)
