"""Routing: from router logits to the experts of each token and their weights. T tokens, E experts, K top-k."""

import torch

from fake_impls import route as shapes
from moe_ops._library import define
from moe_ops.types import Routing


def _route(router_logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, ...]:
    shapes.check_route(router_logits, top_k)
    scores_TE = torch.softmax(router_logits, dim=-1, dtype=torch.float32)
    # A stable sort, because topk breaks ties in any order: equal scores go to the lowest id.
    weights_TE, ids_TE = torch.sort(scores_TE, dim=-1, descending=True, stable=True)
    weights_TK, ids_TK = weights_TE[:, :top_k], ids_TE[:, :top_k].to(torch.int32)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    # A plain clone keeps the strides of the slice where it has no rows or one.
    return tuple(chosen.clone(memory_format=torch.contiguous_format) for chosen in (weights_TK, ids_TK))


_route_op = define(
    "route(Tensor router_logits, int top_k, bool renormalize) -> (Tensor, Tensor)", kernel=_route, fake=shapes.route
)


def route(router_logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `top_k` experts of each token by softmax score, ties to the lowest id.

    Args:
        router_logits: ``[T, E]``, any floating dtype; the arithmetic is float32.
        routing: `top_k`, `num_experts` and `renormalize`.

    Returns:
        ``topk_weights`` float32 ``[T, K]``, in descending order, whatever the dtype of the activations, and ``topk_ids``
        int32 ``[T, K]``. No tokens give no rows.

    Raises:
        ValueError: `router_logits` has not `num_experts` columns, or `top_k` is not in [1, num_experts].

    Source: the routers of Mixtral (`arXiv:2401.04088 <https://arxiv.org/abs/2401.04088>`_, section 2.1: the softmax over
    the chosen logits is the softmax over all, renormalised) and Qwen3-MoE (`norm_topk_prob`).
    """
    if routing.scoring != "softmax":
        raise ValueError(f"route: routing.scoring must be 'softmax', got {routing.scoring!r}")
    if router_logits.dim() == 2 and router_logits.shape[1] != routing.num_experts:
        raise ValueError(f"route: router_logits must be [T, {routing.num_experts}], got {tuple(router_logits.shape)}")
    topk_weights, topk_ids = _route_op(router_logits, routing.top_k, routing.renormalize)
    return topk_weights, topk_ids
