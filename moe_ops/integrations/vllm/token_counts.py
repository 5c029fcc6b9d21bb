"""How many tokens each DP rank brings to a step: the one thing that is read from vLLM's forward context, by one op, whose
result goes into the stage as an argument like any other."""

import torch
from vllm.forward_context import get_forward_context

from fake_impls.integrations import vllm as shapes
from moe_ops._library import define


def _read_token_counts(hidden_states: torch.Tensor, dp_size: int) -> torch.Tensor:
    metadata = get_forward_context().dp_metadata
    if metadata is None:
        raise RuntimeError(
            f"moe_ops: vLLM's forward context must hold the token counts of {dp_size} DP ranks, got None"
        )
    counts = metadata.num_tokens_across_dp_cpu.to(torch.int64, copy=True)
    if counts.shape[0] != dp_size:
        raise ValueError(f"moe_ops: vLLM's token counts must be of {dp_size} DP ranks, got {counts.shape[0]}")
    return counts


def _token_counts(hidden_states: torch.Tensor, dp_size: int) -> list[int]:
    """A host read that waits for nothing: the engine keeps the counts on the host."""
    counts: list[int] = read_token_counts(hidden_states, dp_size).tolist()
    for count in counts:
        torch._check(count >= 0)
    return counts


read_token_counts = define(
    "vllm_read_token_counts(Tensor hidden_states, int dp_size) -> Tensor",
    kernel=_read_token_counts,
    fake=shapes.read_token_counts,
)
"""``[T, H] -> int64 [dp_size]``, a copy, on the host."""

token_counts = define("vllm_token_counts(Tensor hidden_states, int dp_size) -> SymInt[]", composite=_token_counts)
"""``[T, H] -> dp_size`` ints: tokens of each DP rank in this step. The tensor ties the call to its place in the step.

Raises:
    RuntimeError: vLLM's forward context holds no counts.
    ValueError: it holds those of another number of ranks.
"""
