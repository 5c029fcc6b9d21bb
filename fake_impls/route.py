"""Shapes of routing. T tokens, E experts, K top-k, G groups of experts."""

from typing import NamedTuple

import torch

from fake_impls.checks import FLOATS, check_dim, check_dtype, check_same_rows

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
IDS = (torch.int32, torch.int64)


class RouteSettings(NamedTuple):
    """The arguments of the op ``route`` that are no tensors of tokens, in the order of its schema; see `moe_ops.Routing`."""

    top_k: int
    scoring: str = "softmax"
    renormalize: bool = True
    num_expert_group: int = 1
    topk_group: int = 1
    e_score_correction_bias: torch.Tensor | None = None
    routed_scaling_factor: float = 1.0


def route(
    router_logits: torch.Tensor, is_active: torch.Tensor | None, top_k: int, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[T, E], bool [T]?, then RouteSettings -> float32 [T, K], int32 [T, K]``."""
    shape = router_logits.shape[0], top_k
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)


def check_route(router_logits: torch.Tensor, is_active: torch.Tensor | None, *arguments: object) -> None:
    settings = RouteSettings(*arguments)  # type: ignore[arg-type]  # by position, as the schema has them
    check_logits(router_logits, settings.scoring)
    num_experts, top_k = router_logits.shape[1], settings.top_k
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"route: top_k must be in [1, {num_experts}] (experts), got {top_k}")
    check_groups(num_experts, top_k, settings.num_expert_group, settings.topk_group)
    if is_active is not None:
        check_dim("route", "is_active", is_active, 1)
        check_dtype("route", "is_active", is_active, (torch.bool,))
        check_same_rows("route", "is_active", is_active, "router_logits", router_logits)
    bias = settings.e_score_correction_bias
    if bias is not None and bias.shape != (num_experts,):
        raise ValueError(f"route: e_score_correction_bias must be [{num_experts}], got {tuple(bias.shape)}")


def weigh_choices(
    router_logits: torch.Tensor,
    topk_ids: torch.Tensor,
    scoring: str,
    renormalize: bool,
    routed_scaling_factor: float,
) -> torch.Tensor:
    """``[T, E], int [T, K] -> float32 [T, K]``."""
    return router_logits.new_empty(topk_ids.shape, dtype=torch.float32)


def check_weigh_choices(router_logits: torch.Tensor, topk_ids: torch.Tensor, scoring: str, *_: object) -> None:
    check_logits(router_logits, scoring)
    check_ids("route", topk_ids)
    check_same_rows("route", "topk_ids", topk_ids, "router_logits", router_logits)


def count_expert_load(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """``int [T, K] -> int64 [num_experts]``."""
    return topk_ids.new_empty(num_experts, dtype=torch.int64)


def check_count_expert_load(topk_ids: torch.Tensor, num_experts: int) -> None:
    check_ids("count_expert_load", topk_ids)


def check_ids(op: str, topk_ids: torch.Tensor) -> None:
    check_dim(op, "topk_ids", topk_ids, 2)
    check_dtype(op, "topk_ids", topk_ids, IDS)


def check_logits(router_logits: torch.Tensor, scoring: str) -> None:
    check_dim("route", "router_logits", router_logits, 2)
    check_dtype("route", "router_logits", router_logits, FLOATS)
    if scoring not in SCORINGS:
        raise ValueError(f"route: scoring must be one of {SCORINGS}, got {scoring!r}")


def check_groups(num_experts: int, top_k: int, num_expert_group: int, topk_group: int) -> None:
    """Equal groups, of which enough are chosen to hold `top_k` experts."""
    if num_expert_group < 1 or num_experts % num_expert_group:
        raise ValueError(f"route: num_expert_group must divide {num_experts} experts, got {num_expert_group}")
    if not 1 <= topk_group <= num_expert_group or topk_group * (num_experts // num_expert_group) < top_k:
        raise ValueError(
            f"route: topk_group must be in [1, {num_expert_group}] and its groups of {num_experts // num_expert_group} "
            f"must hold top_k = {top_k} experts, got {topk_group}"
        )
