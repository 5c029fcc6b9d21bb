"""The forms of prepare and finalize that the cases go through, and inputs for them.

T tokens of a rank, H hidden, E experts, W ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

import moe_ops as mo

HIDDEN = 1024
EXPERTS = 256


@dataclass(frozen=True)
class Form:
    """A strategy, over one axis that all ranks of the world span, and the field of `Lengths` that calls say."""

    name: str
    strategy: mo.Strategy
    axis: str
    said: str
    is_sharded: bool = False

    @property
    def is_ragged(self) -> bool:
        return self.said == "per_rank"

    def layout(self, group: mo.Group) -> mo.Layout:
        groups = mo.ParallelGroups()._replace(**{self.axis: group})
        return mo.Layout(self.strategy, groups, tokens_are_sharded=self.is_sharded)

    def lengths(self, *, longest: int, per_rank: Sequence[int], mask: torch.Tensor) -> mo.Lengths:
        known = {"longest": longest, "per_rank": per_rank, "mask": mask}
        return mo.Lengths(**{self.said: known[self.said]})

    def tokens(self, size: int, tokens: int) -> list[int]:
        """Tokens of each rank: as many on all, or a quarter fewer on every second rank where the form may be ragged."""
        return [tokens - (rank % 2) * (tokens // 4 if self.is_ragged else 0) for rank in range(size)]


ALL2ALL = Form("ALL2ALL", mo.Strategy.ALL2ALL, "tp", "longest")
MC2 = Form("MC2", mo.Strategy.MC2, "tp", "mask")
ALLGATHER_DP = Form("ALLGATHER DP", mo.Strategy.ALLGATHER, "dp", "longest")
ALLGATHER_EP = Form("ALLGATHER EP equal", mo.Strategy.ALLGATHER, "ep", "longest", is_sharded=True)
ALLGATHER_EP_RAGGED = Form("ALLGATHER EP ragged", mo.Strategy.ALLGATHER, "ep", "per_rank", is_sharded=True)
FORMS = (ALL2ALL, MC2, ALLGATHER_DP, ALLGATHER_EP, ALLGATHER_EP_RAGGED)


class Inputs(NamedTuple):
    """What one rank gives to prepare.

    Attributes:
        hidden_states: ``[T, H]`` bfloat16.
        router_logits: ``[T, E]`` float32.
        mask: bool ``[P]``, P the largest T padded to a multiple of W.
        counts: T of each rank.
    """

    hidden_states: torch.Tensor
    router_logits: torch.Tensor
    mask: torch.Tensor
    counts: list[int]


def make_inputs(group: mo.Group, counts: list[int], *, hidden: int = HIDDEN, experts: int = EXPERTS) -> Inputs:
    """Random tokens, those of `group.rank`."""
    generator = torch.Generator().manual_seed(group.rank)
    tokens, padded = counts[group.rank], -(-max(counts) // group.size) * group.size
    hidden_states = torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16)
    router_logits = torch.randn(tokens, experts, generator=generator)
    return Inputs(hidden_states, router_logits, torch.arange(padded) < tokens, counts)


def call_prepare(form: Form, layout: mo.Layout, inputs: Inputs) -> Callable[[], mo.PrepareOutput]:
    """The call of `moe_ops.prepare`."""
    hidden_states, router_logits, mask, counts = inputs
    lengths = form.lengths(longest=max(counts), per_rank=counts, mask=mask)
    return lambda: mo.prepare(hidden_states, router_logits, layout, lengths)


class Traced(NamedTuple):
    """What a compiled function is given; lengths travel as the rows of tensors, so that none is compiled in."""

    hidden_states: torch.Tensor
    router_logits: torch.Tensor
    mask: torch.Tensor
    longest: torch.Tensor
    counts: list[torch.Tensor]


def make_traced(inputs: Inputs) -> Traced:
    """The inputs with their token axes marked."""
    mo.mark_token_axes(inputs.hidden_states, inputs.router_logits, inputs.mask)
    counts = [mo.token_count(count) for count in inputs.counts]
    return Traced(*inputs[:3], mo.token_count(max(inputs.counts)), counts)


def make_round_trip(form: Form, layout: mo.Layout) -> Callable[[Traced], torch.Tensor]:
    """Prepare, then finalize with the prepared tokens in the place of what experts would make of them."""

    def round_trip(inputs: Traced) -> torch.Tensor:
        hidden_states, router_logits, mask, longest, counts = inputs
        per_rank = [count.shape[0] for count in counts]
        lengths = form.lengths(longest=longest.shape[0], per_rank=per_rank, mask=mask)
        prepared = mo.prepare(hidden_states, router_logits, layout, lengths)
        return mo.finalize(prepared.hidden_states, prepared.state, layout)

    return round_trip
