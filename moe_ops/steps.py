"""One call of the stage, and what the streams of all strategies have in common.

A row that travels is hidden states, ids, weights and, if it is quantised, scales, in this order.

T tokens of this rank, N rows that are here, E experts, K top-k, H hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe_ops._library import Wait, needs_gradient
from moe_ops.backends import row_experts_for
from moe_ops.collectives import sum_over_ranks
from moe_ops.dispatchers.local import combine_local, dispatch_local, weigh_input
from moe_ops.experts import run_experts
from moe_ops.lengths import active_tokens
from moe_ops.overlap import Result
from moe_ops.quantize import quantize_activations
from moe_ops.route import route
from moe_ops.shared_experts import add_shared_experts, run_local_part
from moe_ops.types import ExpertWeights, Layout, Lengths, Quant, Reduction, Routing, SharedExperts, StageOutput


class StageCall(NamedTuple):
    """The arguments of `moe_stage`, checked: `layout` has a dispatch, and `lengths` the longest, where it is known.

    `returns_choice`: whether the stream ends with a `StageOutput`, or with its hidden states alone.
    """

    hidden_states: torch.Tensor
    router_logits: torch.Tensor | None
    experts: ExpertWeights
    routing: Routing
    layout: Layout
    lengths: Lengths
    quant: Quant
    topk_ids: torch.Tensor | None
    topk_weights: torch.Tensor | None
    shared_experts: SharedExperts | None
    reduce_results: bool
    overlap_gate: bool
    returns_choice: bool


def choose(call: StageCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids ``[T, K]`` of this rank's tokens, -1 where the mask leaves a token out."""
    return route(
        call.router_logits,
        call.routing,
        is_active=active_tokens(call.hidden_states.shape[0], call.lengths, call.layout),
        topk_ids=call.topk_ids,
        topk_weights=call.topk_weights,
    )


def travels_quantized(call: StageCall) -> bool:
    """Whether activations are quantised before they travel. Weights on the input come first, where the experts are."""
    return call.quant is not Quant.NONE and not call.routing.apply_router_weight_on_input


def run_own_experts(call: StageCall, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[N, H]``: this rank's share of each row that is here, the weighted sum of its own experts' results."""
    hidden_states, topk_ids, topk_weights, *scale = rows
    experts, weights_on_input = call.experts, call.routing.apply_router_weight_on_input
    num_local, dtype = experts.w13.shape[0], call.hidden_states.dtype
    first_expert = call.layout.groups.ep.rank * num_local
    run_rows = row_experts_for(experts)
    if run_rows is not None:
        return run_rows(hidden_states, topk_ids, topk_weights, first_expert, experts, weights_on_input)
    local = dispatch_local(
        hidden_states,
        topk_ids,
        topk_weights,
        first_expert=first_expert,
        num_local_experts=num_local,
        scale=scale[0] if scale else None,
    )
    x = weigh_input(local.rows, local.state) if weights_on_input else local.rows
    y = run_experts(x, local.counts, experts, scale=local.scale, quant=call.quant, dtype=dtype, is_summand=True)
    return combine_local(y, local.state, weights_on_input=weights_on_input)


def trains(call: StageCall, *tensors: torch.Tensor) -> bool:
    """Whether autograd records what is done to these tensors and the experts."""
    return needs_gradient([*tensors, *(weight for weight in call.experts if isinstance(weight, torch.Tensor))])


def quantize_rows(call: StageCall, x: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states as they travel, and their scales if they are quantised."""
    return list(quantize_activations(x, quant=call.quant)) if travels_quantized(call) else [x]


def begin_shared_experts(call: StageCall) -> torch.Tensor | None:
    """What of the shared experts needs no collective, so that it can be computed while rows travel."""
    if call.shared_experts is None:
        return None
    return run_local_part(call.hidden_states, call.shared_experts, call.layout)


def is_finished(call: StageCall, reduction: Reduction) -> bool:
    """Whether nothing is left to do with what finalize returned."""
    is_summed = reduction is Reduction.COMPLETE or not call.reduce_results
    return call.shared_experts is None and is_summed


def finish(
    call: StageCall, reduction: Reduction, routed: torch.Tensor, local_part: torch.Tensor | None
) -> Wait[torch.Tensor]:
    """Add the shared experts, and close the sum over TP if asked to. (Of several collectives only the last is in flight.)"""
    if call.shared_experts is None:
        return sum_over_ranks(routed, *call.layout.groups.tp[:2])
    return add_shared_experts(
        routed,
        reduction,
        call.hidden_states,
        call.shared_experts,
        call.layout,
        call.lengths,
        reduce_results=call.reduce_results,
        local_part=local_part,
    )


def result_of(
    call: StageCall,
    hidden_states: torch.Tensor,
    choice: tuple[torch.Tensor, torch.Tensor],
    num_dropped: torch.Tensor | None,
) -> Result[torch.Tensor | StageOutput]:
    """The last thing that a stream yields."""
    hidden_states = hidden_states.to(call.hidden_states.dtype)
    if not call.returns_choice:
        return Result(hidden_states)
    topk_weights, topk_ids = choice
    if num_dropped is None:
        num_dropped = torch.zeros((), dtype=torch.int64, device=hidden_states.device)
    return Result(StageOutput(hidden_states, topk_ids, topk_weights, num_dropped))
