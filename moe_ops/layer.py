"""A call of a layer as a stream of work: what every call of it has in common, and the two ways through.

T tokens of this rank.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fake_impls.checks import check_at_most
from fake_impls.layout import expert_parallel_rank
from fake_impls.strategies.all2all import check_tokens
from moe_ops._library import needs_gradient
from moe_ops.backends import npu_mc2
from moe_ops.collectives import all_reduce, on_rank_zero, pad_rows
from moe_ops.dispatchers import start_combine, start_dispatch
from moe_ops.dispatchers.local import combine_local, dispatch_local, weigh_input
from moe_ops.experts import run_experts
from moe_ops.groups import ParallelGroups
from moe_ops.overlap import Finish, Result, Steps, Transfer
from moe_ops.packed_experts import run_packed_experts
from moe_ops.quantize import quantize_activations
from moe_ops.route import route
from moe_ops.shared_experts import add_shared_experts, run_local_part
from moe_ops.strategies import active_rows, allgather, lay_out_like_prepared, output_reduction, start_finalize
from moe_ops.types import (
    Dispatch,
    ExpertWeights,
    PrepareOutput,
    Quant,
    Reduction,
    Routing,
    SharedExperts,
    State,
    Strategy,
    WeightLayout,
)


class Layer(NamedTuple):
    """What is the same in every call of a layer."""

    experts: ExpertWeights
    routing: Routing
    strategy: Strategy
    groups: ParallelGroups
    dispatch: Dispatch
    quant: Quant

    @property
    def num_summed(self) -> int:
        """Ranks whose results the ALLGATHER DP form sums."""
        return self.groups.dp.size * self.groups.pcp.size * self.groups.tp.size

    @property
    def num_local_experts(self) -> int:
        """Experts of each rank."""
        return self.experts.w13.shape[0]

    @property
    def travels_quantized(self) -> bool:
        """Whether activations are quantised before they travel. Weights on the input come first, where the experts are."""
        return self.quant is not Quant.NONE and not self.is_weighed

    def needs_gradient(self, *tensors: torch.Tensor) -> bool:
        """Whether autograd records what is done to these tensors and the experts."""
        weights = [weight for weight in self.experts if isinstance(weight, torch.Tensor)]
        return needs_gradient([*tensors, *weights])

    @property
    def has_gaps(self) -> bool:
        """Whether a row may have choices of nothing beside others."""
        r = self.routing
        return r.token_to_experts is not None or r.logical_to_physical is not None or r.select_experts is not None

    @property
    def is_weighed(self) -> bool:
        """Whether the weights go into the experts' input."""
        return self.routing.apply_router_weight_on_input


class Ending(NamedTuple):
    """What comes after the routed experts, and what of it is computed while their rows travel."""

    hidden_states: torch.Tensor
    shared_experts: SharedExperts | None
    layer: Layer
    tokens_are_sharded: bool
    num_tokens_across_ep: Sequence[int] | None
    reduce_results: bool

    def begin(self) -> torch.Tensor | None:
        """The shared experts, as far as they need no collective."""
        if self.shared_experts is None:
            return None
        return run_local_part(
            self.hidden_states,
            self.shared_experts,
            groups=self.layer.groups,
            tokens_are_sharded=self.tokens_are_sharded,
        )

    def transfer(self, routed: torch.Tensor, local_part: torch.Tensor | None) -> Transfer[torch.Tensor, None]:
        """`end`, while nothing else is in flight: it may communicate, and waits for that at once."""
        return Transfer(partial(self._end_at_once, routed, local_part))

    def _end_at_once(self, routed: torch.Tensor, local_part: torch.Tensor | None) -> Finish[torch.Tensor]:
        output = self.end(routed, local_part)
        return lambda: output

    def end(self, routed: torch.Tensor, local_part: torch.Tensor | None) -> torch.Tensor:
        """Add the shared experts, and close the sum over TP if asked to."""
        groups, counts = self.layer.groups, self.num_tokens_across_ep
        reduction = output_reduction(
            strategy=self.layer.strategy, groups=groups, tokens_are_sharded=self.tokens_are_sharded
        )
        if self.shared_experts is None:
            if not self.reduce_results or reduction is Reduction.COMPLETE:
                return routed
            summed: torch.Tensor = all_reduce(routed, groups.tp.name, groups.tp.size)
            return summed
        across_tp = None
        if self.tokens_are_sharded and counts is not None and groups.ep.size > 1:
            first = groups.ep.rank - groups.tp.rank  # TP ranks follow one another in EP
            across_tp = counts[first : first + groups.tp.size]
        return add_shared_experts(
            routed,
            reduction,
            self.hidden_states,
            self.shared_experts,
            groups=groups,
            reduce_results=self.reduce_results,
            tokens_are_sharded=self.tokens_are_sharded,
            num_tokens_across_tp=across_tp,
            local_part=local_part,
        )


def run_gathered(
    router_logits: torch.Tensor,
    layer: Layer,
    input_ids: torch.Tensor | None,
    lengths: dict[str, Any],
    ending: Ending,
    overlap_gate: bool,
) -> Steps[torch.Tensor]:
    """Route this rank's tokens, gather all, and compute this rank's share of each."""
    x, is_sharded = ending.hidden_states, ending.tokens_are_sharded
    check_tokens("prepare", x, router_logits)
    quantize = layer.travels_quantized and is_sharded
    payload = list(quantize_activations(x, quant=layer.quant)) if quantize else [x]
    fill = [0] * len(payload)
    gather = partial(_start_gather, layer.groups, lengths)
    if overlap_gate:
        hidden_transfer = Transfer(
            lambda: gather(payload, fill),
            partial(route, router_logits, layer.routing, input_ids=input_ids, hidden_states=x),
        )
        yield hidden_transfer
        topk_weights, topk_ids = hidden_transfer.computed
        transfer = Transfer(lambda: gather([topk_ids, topk_weights], [-1, 0]), ending.begin)
        yield transfer
        rows, state = hidden_transfer.arrived[0] + transfer.arrived[0], transfer.arrived[1]
    else:
        topk_weights, topk_ids = route(router_logits, layer.routing, input_ids=input_ids, hidden_states=x)
        transfer = Transfer(lambda: gather([*payload, topk_ids, topk_weights], [*fill, -1, 0]), ending.begin)
        yield transfer
        rows, state = transfer.arrived
    if not is_sharded and layer.groups.ep.size == 1:
        layer = _with_bias_once(layer)
    output = _run_experts(rows[0], rows[-2], rows[-1], rows[1] if quantize else None, layer, x.dtype)
    returned: Transfer[torch.Tensor, None] = Transfer(
        partial(start_finalize, output, state, strategy=layer.strategy, groups=layer.groups)
    )
    yield returned
    ended = ending.transfer(returned.arrived, transfer.computed)
    yield ended
    yield Result(ended.arrived)


def run_exchanged(
    prepared: PrepareOutput, layer: Layer, input_ids: torch.Tensor | None, common: int, ending: Ending
) -> Steps[torch.Tensor]:
    """Route the prepared rows, send them to their experts and the results back."""
    x, state, groups = prepared.hidden_states, prepared.state, layer.groups
    if input_ids is not None:
        input_ids = lay_out_like_prepared(input_ids, state, strategy=layer.strategy, groups=groups)
    is_active = active_rows(prepared, groups=groups)
    topk_weights, topk_ids = route(
        prepared.router_logits, layer.routing, is_active=is_active, input_ids=input_ids, hidden_states=x
    )
    if layer.dispatch is Dispatch.FIXED_CAPACITY:  # as many as any rank has: nothing is dropped
        check_at_most("moe_stage", "rows of a rank", x.shape[0], common, "those common to the EP group")
        has_gradient = layer.needs_gradient(x, topk_weights)
        if (
            not layer.is_weighed
            and not has_gradient
            and npu_mc2.can_exchange(x, common, topk_ids.shape[1], layer.quant)
        ):
            fused = Transfer(partial(_exchange_by_mc2, x, topk_ids, topk_weights, layer, common), ending.begin)
            yield fused
            yield from _finish_exchanged(fused.arrived, state, layer, ending, fused.computed)
            return
    payload, scale = quantize_activations(x, quant=layer.quant) if layer.travels_quantized else (x, None)
    sent = Transfer(
        partial(
            start_dispatch,
            [payload, topk_ids, topk_weights, *([] if scale is None else [scale])],
            kind=layer.dispatch,
            num_local_experts=layer.num_local_experts,
            ep=groups.ep,
            capacity=common,
        ),
        ending.begin,
    )
    yield sent
    rows, exchange = sent.arrived
    shares = _run_experts(rows[0], rows[1], rows[2], rows[3] if len(rows) == 4 else None, layer, x.dtype)
    returned: Transfer[torch.Tensor, None] = Transfer(partial(start_combine, shares, exchange, ep=groups.ep))
    yield returned
    yield from _finish_exchanged(returned.arrived, state, layer, ending, sent.computed)


def _finish_exchanged(
    routed: torch.Tensor, state: State, layer: Layer, ending: Ending, local_part: torch.Tensor | None
) -> Steps[torch.Tensor]:
    """Bring the rows, which are complete, back to where their tokens came from, and add what comes after."""
    gathered: Transfer[torch.Tensor, None] = Transfer(
        partial(start_finalize, routed, state, strategy=layer.strategy, groups=layer.groups)
    )
    yield gathered
    ended = ending.transfer(gathered.arrived, local_part)
    yield ended
    yield Result(ended.arrived)


def _exchange_by_mc2(
    x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, layer: Layer, common: int
) -> Finish[torch.Tensor]:
    """Dispatch, experts and combine by the fused ops of an NPU, which leave nothing in flight: to be started as a transfer,
    so that nothing else of another stream is, either."""
    num_rows, num_local, ep = x.shape[0], layer.num_local_experts, layer.groups.ep
    topk_ids, topk_weights = pad_rows(topk_ids, common, -1), pad_rows(topk_weights, common)
    rows, scale, counts, sent = npu_mc2.dispatch(
        pad_rows(x, common),
        topk_ids,
        topk_weights,
        num_local_experts=num_local,
        ep=ep,
        quant=layer.quant,
        has_gaps=layer.has_gaps,
    )
    y = run_experts(rows, counts, layer.experts, scale=scale, quant=layer.quant, dtype=x.dtype)
    combined = npu_mc2.combine(y, sent, num_local_experts=num_local, ep=ep)
    if not statically_known_true(num_rows == common):
        combined = combined.narrow(0, 0, num_rows)
    return lambda: combined


def _start_gather(
    groups: ParallelGroups, lengths: dict[str, Any], tensors: Sequence[torch.Tensor], fill: Sequence[int]
) -> Finish[tuple[list[torch.Tensor], State]]:
    return allgather.start_gather(tensors, fill=fill, groups=groups, **lengths)


def _run_experts(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    scale: torch.Tensor | None,
    layer: Layer,
    dtype: torch.dtype,
) -> torch.Tensor:
    """This rank's share of each row that is here: the weighted sum of its own experts' results."""
    first_expert = layer.groups.ep.rank * layer.num_local_experts
    if layer.experts.layout is WeightLayout.VLLM_CPU:
        rows = hidden_states, topk_ids, topk_weights
        return run_packed_experts(*rows, layer.experts, first_expert=first_expert, is_weighed=layer.is_weighed)
    local = dispatch_local(
        hidden_states,
        topk_ids,
        topk_weights,
        first_expert=first_expert,
        num_local_experts=layer.num_local_experts,
        scale=scale,
    )
    x = weigh_input(local.rows, local.state) if layer.is_weighed else local.rows
    y = run_experts(x, local.counts, layer.experts, scale=local.scale, quant=layer.quant, dtype=dtype)
    return combine_local(y, local.state, is_weighed=layer.is_weighed)


def _with_bias_once(layer: Layer) -> Layer:
    """Keep the output's bias on one of the ranks whose results are summed, where they share the intermediate axis."""
    experts, groups = layer.experts, layer.groups
    if experts.w2_bias is None or layer.num_summed == 1:
        return layer
    rank = expert_parallel_rank(
        groups.dp.rank, groups.pcp.rank, groups.tp.rank, pcp_size=groups.pcp.size, tp_size=groups.tp.size
    )
    return layer._replace(experts=experts._replace(w2_bias=on_rank_zero(experts.w2_bias, rank)))
