"""Shapes of chunks and of collectives. T rows, W ranks."""

import torch

from fake_impls.checks import check_at_most, check_multiple


def chunk_tokens(x: torch.Tensor, padded_rows: int, num_chunks: int, rank: int, fill: int = 0) -> torch.Tensor:
    """``[T, ...] -> [padded_rows / num_chunks, ...]``."""
    return x.new_empty(padded_rows // num_chunks, *x.shape[1:])


def check_chunk_tokens(x: torch.Tensor, padded_rows: int, num_chunks: int, rank: int, fill: int = 0) -> None:
    if x.dim() < 1:
        raise ValueError("chunk_tokens: x must have at least 1 dimension, got 0-D")
    check_multiple("chunk_tokens", "padded_rows", padded_rows, num_chunks, "num_chunks")
    check_at_most("chunk_tokens", "rows of x", x.shape[0], padded_rows, "padded_rows")


def all_reduce(x: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """``x -> the same shape, contiguous``."""
    return x.new_empty(x.shape)
