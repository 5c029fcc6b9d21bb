"""Shapes of the experts through vLLM's CPU kernel. N rows, K top-k, H hidden, I intermediate, E experts of this rank."""

import torch

from fake_impls.checks import FLOATS, check_dim, check_dtype, check_equal, check_same_rows
from fake_impls.experts import sum_dtype
from fake_impls.route import check_ids


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
    weights_on_input: bool,
) -> torch.Tensor:
    """``[N, H], int [N, K], float32 [N, K], packed [E, 2 * I, H] and [E, H, I] -> [N, H]``, float32 of float16."""
    return hidden_states.new_empty(hidden_states.shape, dtype=sum_dtype(hidden_states.dtype))


def check_vllm_cpu_experts(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    first_expert: int,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    *_: object,
) -> None:
    check_dim("experts", "hidden_states", hidden_states, 2)
    check_dtype("experts", "hidden_states", hidden_states, FLOATS)
    check_ids("experts", topk_ids)
    check_dtype("experts", "topk_weights", topk_weights, (torch.float32,))
    check_same_rows("experts", "topk_ids", topk_ids, "hidden_states", hidden_states)
    check_same_rows("experts", "topk_weights", topk_weights, "hidden_states", hidden_states)
    check_equal("experts", "columns of topk_weights", topk_weights.shape[1], topk_ids.shape[1], "those of topk_ids")
    check_dtype("experts", "w13", w13, (hidden_states.dtype,))
    check_weights(w13, w2, w13_bias, w2_bias)
    check_equal("experts", "inputs of w13", w13.shape[2], hidden_states.shape[1], "columns of hidden_states")


def check_weights(
    w13: torch.Tensor, w2: torch.Tensor, w13_bias: torch.Tensor | None, w2_bias: torch.Tensor | None
) -> None:
    """Weights and biases that fit each other: the kernel trusts them."""
    check_dim("experts", "w13", w13, 3)
    check_dim("experts", "w2", w2, 3)
    check_dtype("experts", "w2", w2, (w13.dtype,))
    num_experts, hidden_size, intermediate = w2.shape
    if tuple(w13.shape) != (num_experts, 2 * intermediate, hidden_size):
        raise ValueError(
            f"experts: w13 must be [E, 2 * I, H] for w2 [E, H, I] of {tuple(w2.shape)}, got {tuple(w13.shape)}"
        )
    for name, bias, width in (("w13_bias", w13_bias, 2 * intermediate), ("w2_bias", w2_bias, hidden_size)):
        if bias is None:
            continue
        check_dtype("experts", name, bias, (w13.dtype,))
        if tuple(bias.shape) != (num_experts, width):
            raise ValueError(f"experts: {name} must be {(num_experts, width)}, got {tuple(bias.shape)}")
