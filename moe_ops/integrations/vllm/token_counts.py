"""How many tokens each DP rank brings to a step: the one thing that is read from vLLM's forward context, by one op, whose
result goes into the stage as an argument like any other."""

import torch
from vllm.forward_context import get_forward_context

from fake_impls.integrations import vllm as shapes
from fake_impls.layout import ceil_div
from moe_ops._library import define


def _read_token_counts(hidden_states: torch.Tensor, dp_size: int, dp_rank: int, num_shards: int) -> torch.Tensor:
    rows = hidden_states.shape[0]
    if dp_size == 1:  # for which vLLM keeps none
        return torch.tensor([rows * num_shards])
    metadata = get_forward_context().dp_metadata
    if metadata is None:
        raise RuntimeError(
            f"moe_ops: vLLM's forward context must hold the token counts of {dp_size} DP ranks, got None"
        )
    counts = metadata.num_tokens_across_dp_cpu.to(torch.int64, copy=True)
    if counts.shape[0] != dp_size:
        raise ValueError(f"moe_ops: vLLM's token counts must be of {dp_size} DP ranks, got {counts.shape[0]}")
    if ceil_div(int(counts[dp_rank]), num_shards) != rows:
        raise ValueError(
            f"moe_ops: vLLM's token counts {counts.tolist()} must be {rows} * {num_shards} for DP rank {dp_rank}, "
            "perhaps less what pads"
        )
    return counts


def _token_counts(hidden_states: torch.Tensor, dp_size: int, dp_rank: int, num_shards: int) -> list[int]:
    """A host read that waits for nothing: the engine keeps the counts on the host."""
    counts: list[int] = read_token_counts(hidden_states, dp_size, dp_rank, num_shards).tolist()
    for count in counts:
        torch._check(count >= 0)
    return counts


read_token_counts = define(
    "vllm_read_token_counts(Tensor hidden_states, int dp_size, int dp_rank, int num_shards) -> Tensor",
    kernel=_read_token_counts,
    fake=shapes.read_token_counts,
)
"""``[T, H] -> int64 [dp_size]``, a copy, on the host. Its check reads one number there, which waits for nothing."""

token_counts = define(
    "vllm_token_counts(Tensor hidden_states, int dp_size, int dp_rank, int num_shards) -> SymInt[]",
    composite=_token_counts,
)
"""``[T, H] -> dp_size`` ints: tokens of each DP rank in this step. The tensor ties the call to its place in the step, and is a
share of the tokens of `dp_rank`: one of `num_shards`, rounded up. The counts are on the host, so that reading them waits for
nothing; a compiler knows nothing about them.

Raises:
    RuntimeError: vLLM's forward context holds no counts.
    ValueError: it holds those of another number of ranks, or another count for this one.
"""
