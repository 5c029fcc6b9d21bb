"""The forms of prepare and finalize that the cases go through, and inputs for them.

T tokens of a rank, H hidden, E experts, W ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import moe_ops as mo

HIDDEN = 1024
EXPERTS = 256


@dataclass(frozen=True)
class Form:
    """A strategy, over one axis that all ranks of the world span."""

    name: str
    strategy: mo.Strategy
    axis: str
    is_sharded: bool = False
    is_ragged: bool = False

    def groups(self, group: mo.Group) -> mo.ParallelGroups:
        return mo.ParallelGroups()._replace(**{self.axis: group})

    def tokens(self, size: int, tokens: int) -> list[int]:
        """Tokens of each rank: as many on all, or a quarter fewer on every second rank where the form may be ragged."""
        return [tokens - (rank % 2) * (tokens // 4 if self.is_ragged else 0) for rank in range(size)]


ALL2ALL = Form("ALL2ALL", mo.Strategy.ALL2ALL, "tp")
MC2 = Form("MC2", mo.Strategy.MC2, "tp")
ALLGATHER_DP = Form("ALLGATHER DP", mo.Strategy.ALLGATHER, "dp")
ALLGATHER_EP = Form("ALLGATHER EP equal", mo.Strategy.ALLGATHER, "ep", is_sharded=True)
ALLGATHER_EP_RAGGED = Form("ALLGATHER EP ragged", mo.Strategy.ALLGATHER, "ep", is_sharded=True, is_ragged=True)
FORMS = (ALL2ALL, MC2, ALLGATHER_DP, ALLGATHER_EP, ALLGATHER_EP_RAGGED)


class Inputs(NamedTuple):
    """What one rank gives to prepare.

    Attributes:
        hidden_states: ``[T, H]`` bfloat16.
        router_logits: ``[T, E]`` float32.
        mc2_mask: bool ``[P]``, P the largest T padded to a multiple of W.
        counts: T of each rank.
    """

    hidden_states: torch.Tensor
    router_logits: torch.Tensor
    mc2_mask: torch.Tensor
    counts: list[int]


def make_inputs(group: mo.Group, counts: list[int], *, hidden: int = HIDDEN, experts: int = EXPERTS) -> Inputs:
    """Random tokens, those of `group.rank`."""
    generator = torch.Generator().manual_seed(group.rank)
    tokens, padded = counts[group.rank], -(-max(counts) // group.size) * group.size
    hidden_states = torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16)
    router_logits = torch.randn(tokens, experts, generator=generator)
    return Inputs(hidden_states, router_logits, torch.arange(padded) < tokens, counts)


def call_prepare(form: Form, groups: mo.ParallelGroups, inputs: Inputs) -> Callable[[], mo.PrepareOutput]:
    """The call of `moe_ops.prepare` that this form makes."""
    strategy, counts = form.strategy, inputs.counts
    keywords: dict[str, Any] = {}
    if form.strategy is mo.Strategy.MC2:
        keywords = {"mc2_mask": inputs.mc2_mask}
    elif form.is_sharded:
        keywords = {"tokens_are_sharded": True, "num_tokens_across_ep": counts if form.is_ragged else None}
    elif form.strategy is mo.Strategy.ALLGATHER:
        keywords = {"max_tokens_across_dp": max(counts)}
    return lambda: mo.prepare(inputs.hidden_states, inputs.router_logits, strategy=strategy, groups=groups, **keywords)


class Traced(NamedTuple):
    """What a compiled function is given; lengths travel as the rows of tensors, so that none is compiled in."""

    hidden_states: torch.Tensor
    router_logits: torch.Tensor
    mc2_mask: torch.Tensor
    longest: torch.Tensor
    counts: list[torch.Tensor]


def make_traced(inputs: Inputs) -> Traced:
    """The inputs with their token axes marked."""
    mo.mark_token_axes(inputs.hidden_states, inputs.router_logits, inputs.mc2_mask)
    counts = [mo.token_count(count) for count in inputs.counts]
    return Traced(*inputs[:3], mo.token_count(max(inputs.counts)), counts)


def make_round_trip(form: Form, groups: mo.ParallelGroups) -> Callable[[Traced], torch.Tensor]:
    """Prepare, then finalize with the prepared tokens in the place of what experts would make of them."""

    def round_trip(inputs: Traced) -> torch.Tensor:
        prepared = mo.prepare(
            inputs.hidden_states,
            inputs.router_logits,
            strategy=form.strategy,
            groups=groups,
            mc2_mask=inputs.mc2_mask,
            max_tokens_across_dp=inputs.longest.shape[0],
            num_tokens_across_ep=[count.shape[0] for count in inputs.counts] if form.is_ragged else None,
            tokens_are_sharded=form.is_sharded,
        )
        return mo.finalize(prepared.hidden_states, prepared.state, strategy=form.strategy, groups=groups)

    return round_trip
