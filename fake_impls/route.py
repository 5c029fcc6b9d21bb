"""Shapes of routing. T tokens, E experts, K top-k, V vocabulary, G groups of experts, R replicas."""

import torch

from fake_impls.checks import FLOATS, check_dim, check_dtype, check_same_rows

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
IDS = (torch.int32, torch.int64)


def route(
    router_logits: torch.Tensor,
    top_k: int,
    scoring: str,
    renormalize: bool,
    num_expert_group: int,
    topk_group: int,
    e_score_correction_bias: torch.Tensor | None,
    routed_scaling_factor: float,
    is_active: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    token_to_experts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, E] -> float32 [T, K], int32 [T, K]``."""
    check_logits(router_logits, top_k, scoring)
    check_groups(router_logits.shape[1], top_k, num_expert_group, topk_group)
    check_per_token(router_logits, is_active, input_ids)
    check_tables(router_logits.shape[1], top_k, e_score_correction_bias, input_ids, token_to_experts)
    num_tokens = router_logits.shape[0]
    return (
        router_logits.new_empty(num_tokens, top_k, dtype=torch.float32),
        router_logits.new_empty(num_tokens, top_k, dtype=torch.int32),
    )


def map_to_physical(topk_ids: torch.Tensor, logical_to_physical: torch.Tensor) -> torch.Tensor:
    """``int [T, K], int [E] or [E, R] -> int32 [T, K]``."""
    check_dim("route", "topk_ids", topk_ids, 2)
    check_dtype("route", "topk_ids", topk_ids, IDS)
    check_dtype("route", "logical_to_physical", logical_to_physical, IDS)
    if logical_to_physical.dim() not in (1, 2):
        raise ValueError(f"route: logical_to_physical must be 1-D or 2-D, got {logical_to_physical.dim()}-D")
    return topk_ids.new_empty(topk_ids.shape, dtype=torch.int32)


def count_expert_load(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """``int [T, K] -> int64 [num_experts]``."""
    check_dim("count_expert_load", "topk_ids", topk_ids, 2)
    check_dtype("count_expert_load", "topk_ids", topk_ids, IDS)
    return topk_ids.new_empty(num_experts, dtype=torch.int64)


def check_logits(router_logits: torch.Tensor, top_k: int, scoring: str) -> None:
    """Logits to choose `top_k` of."""
    check_dim("route", "router_logits", router_logits, 2)
    check_dtype("route", "router_logits", router_logits, FLOATS)
    if not 1 <= top_k <= router_logits.shape[1]:
        raise ValueError(f"route: top_k must be in [1, {router_logits.shape[1]}] (experts), got {top_k}")
    if scoring not in SCORINGS:
        raise ValueError(f"route: scoring must be one of {SCORINGS}, got {scoring!r}")


def check_selected(router_logits: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, top_k: int) -> None:
    """What a function of the caller's chose: `top_k` experts of each row and their weights."""
    check_dim("route", "router_logits", router_logits, 2)
    for name, chosen in {"topk_weights": topk_weights, "topk_ids": topk_ids}.items():
        check_dim("route", f"{name} of select_experts", chosen, 2)
        check_same_rows("route", f"{name} of select_experts", chosen, "router_logits", router_logits)
        if chosen.shape[1] != top_k:
            raise ValueError(f"route: {name} of select_experts must be [T, {top_k}], got {tuple(chosen.shape)}")
    check_dtype("route", "topk_weights of select_experts", topk_weights, FLOATS)
    check_dtype("route", "topk_ids of select_experts", topk_ids, IDS)


def check_groups(num_experts: int, top_k: int, num_expert_group: int, topk_group: int) -> None:
    """Equal groups, of which enough are chosen to hold `top_k` experts."""
    if num_expert_group < 1 or num_experts % num_expert_group:
        raise ValueError(f"route: num_expert_group must divide {num_experts} experts, got {num_expert_group}")
    if not 1 <= topk_group <= num_expert_group or topk_group * (num_experts // num_expert_group) < top_k:
        raise ValueError(
            f"route: topk_group must be in [1, {num_expert_group}] and its groups of {num_experts // num_expert_group} "
            f"must hold top_k = {top_k} experts, got {topk_group}"
        )


def check_per_token(
    router_logits: torch.Tensor, is_active: torch.Tensor | None, input_ids: torch.Tensor | None
) -> None:
    """One flag and one id for each row of logits."""
    if is_active is not None:
        check_dim("route", "is_active", is_active, 1)
        check_dtype("route", "is_active", is_active, (torch.bool,))
        check_same_rows("route", "is_active", is_active, "router_logits", router_logits)
    if input_ids is not None:
        check_dim("route", "input_ids", input_ids, 1)
        check_dtype("route", "input_ids", input_ids, IDS)
        check_same_rows("route", "input_ids", input_ids, "router_logits", router_logits)


def check_tables(
    num_experts: int,
    top_k: int,
    e_score_correction_bias: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    token_to_experts: torch.Tensor | None,
) -> None:
    """A bias for each expert; a table and ids to look up in it, or neither."""
    if e_score_correction_bias is not None and e_score_correction_bias.shape != (num_experts,):
        raise ValueError(
            f"route: e_score_correction_bias must be [{num_experts}], got {tuple(e_score_correction_bias.shape)}"
        )
    if (token_to_experts is None) != (input_ids is None):
        given, missing = ("token_to_experts", "input_ids") if input_ids is None else ("input_ids", "token_to_experts")
        raise ValueError(f"route: {missing} must be given with {given}, got None")
    if token_to_experts is not None:
        check_dim("route", "token_to_experts", token_to_experts, 2)
        check_dtype("route", "token_to_experts", token_to_experts, IDS)
        if token_to_experts.shape[1] != top_k:
            raise ValueError(f"route: token_to_experts must be [V, {top_k}], got {tuple(token_to_experts.shape)}")
