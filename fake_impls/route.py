"""Shapes of routing. T tokens, E experts, K top-k."""

import torch

from fake_impls.checks import FLOATS, check_dim, check_dtype


def route(router_logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, E] -> float32 [T, K], int32 [T, K]``."""
    check_route(router_logits, top_k)
    num_tokens = router_logits.shape[0]
    return (
        router_logits.new_empty(num_tokens, top_k, dtype=torch.float32),
        router_logits.new_empty(num_tokens, top_k, dtype=torch.int32),
    )


def check_route(router_logits: torch.Tensor, top_k: int) -> None:
    """Logits to choose `top_k` of."""
    check_dim("route", "router_logits", router_logits, 2)
    check_dtype("route", "router_logits", router_logits, FLOATS)
    if not 1 <= top_k <= router_logits.shape[1]:
        raise ValueError(f"route: top_k must be in [1, {router_logits.shape[1]}] (experts), got {top_k}")
