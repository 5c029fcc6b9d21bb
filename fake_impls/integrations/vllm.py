"""Shapes of what is read from vLLM."""

import torch


def read_token_counts(hidden_states: torch.Tensor, dp_size: int, dp_rank: int, num_shards: int) -> torch.Tensor:
    """``-> int64 [dp_size]``, on the host."""
    return torch.empty(dp_size, dtype=torch.int64, device="cpu")
