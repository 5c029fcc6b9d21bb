"""Shapes of the experts through vLLM's CPU kernel. N rows, K top-k, H hidden, I intermediate, E experts of this rank."""

import torch

from fake_impls.checks import FLOATS, check_dim, check_dtype, check_equal, check_same_rows
from fake_impls.route import IDS


def vllm_cpu_experts(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    first_expert: int,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    activation: str,
    is_weighed: bool,
) -> torch.Tensor:
    """``[N, H], int [N, K], float32 [N, K], packed [E, 2 * I, H] and [E, H, I] -> [N, H]``."""
    check_dim("experts", "hidden_states", hidden_states, 2)
    check_dtype("experts", "hidden_states", hidden_states, FLOATS)
    check_dim("experts", "topk_ids", topk_ids, 2)
    check_dtype("experts", "topk_ids", topk_ids, IDS)
    check_dtype("experts", "topk_weights", topk_weights, (torch.float32,))
    check_same_rows("experts", "topk_ids", topk_ids, "hidden_states", hidden_states)
    check_same_rows("experts", "topk_weights", topk_weights, "hidden_states", hidden_states)
    for name, weight in (("w13", w13), ("w2", w2)):
        check_dim("experts", name, weight, 3)
        check_dtype("experts", name, weight, (hidden_states.dtype,))
    check_equal("experts", "inputs of w13", w13.shape[2], hidden_states.shape[1], "columns of hidden_states")
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
