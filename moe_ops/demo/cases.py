"""What the demo runs: sizes, forms of the stage, tokens and expected results. The ranks import this, so torch alone."""

from typing import NamedTuple

import torch

import moe_ops as mo
from moe_ops import Strategy

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 256, 128, 16, 4
DP, TP = 2, 2
EP = DP * TP
COUNTS = ((0, 3), (1, 64), (3, 257), (64, 0), (257, 1))
"""Tokens of each DP rank, one pair a call: each DP rank meets every count, and never that of the other."""


class Form(NamedTuple):
    """One way to run the stage; each is compiled once."""

    strategy: Strategy
    name: str
    dispatch: mo.Dispatch
    is_sharded: bool = False

    @property
    def label(self) -> str:
        """Strategy and form, for a line of text."""
        return f"{self.strategy.name} ({self.name})"


FORMS = (
    Form(Strategy.ALL2ALL, "ragged", mo.Dispatch.ALL_TO_ALL),
    Form(Strategy.ALL2ALL, "fixed", mo.Dispatch.FIXED_CAPACITY),
    Form(Strategy.MC2, "fixed", mo.Dispatch.FIXED_CAPACITY),
    Form(Strategy.ALLGATHER, "DP", mo.Dispatch.LOCAL),
    Form(Strategy.ALLGATHER, "EP", mo.Dispatch.LOCAL, is_sharded=True),
)


class Case(NamedTuple):
    """One call of the stage, on all ranks.

    Attributes:
        tokens: ``[T, H]`` of each EP rank.
        expected: ``[T, H]`` float64 of each EP rank: what the reference makes of these tokens.
    """

    tokens: list[torch.Tensor]
    expected: list[torch.Tensor]

    @property
    def counts(self) -> list[int]:
        """T of each EP rank."""
        return [len(tokens) for tokens in self.tokens]


class Family(NamedTuple):
    """The MoE block of a model family.

    Attributes:
        name: of the family.
        routing: how the block routes.
        gate: ``[E, H]``, the weight of its router.
        experts: all of its experts.
        shared: all of its shared experts, or None.
        replicated: cases in which the ranks of a TP group hold the same tokens.
        sharded: the same tokens, each TP group's spread over its ranks (sequence parallelism).
    """

    name: str
    routing: mo.Routing
    gate: torch.Tensor
    experts: mo.ExpertWeights
    shared: mo.SharedExperts | None
    replicated: list[Case]
    sharded: list[Case]

    def cases(self, form: Form) -> list[Case]:
        """The calls of a form."""
        return self.sharded if form.is_sharded else self.replicated


def tolerance(dtype: torch.dtype) -> float:
    """The largest error that rounding explains, as a share of the largest value expected.

    Products are summed in float32, whatever the dtype. The error of such a sum grows as the root of its terms: H for
    the router, H and I for the experts, K for the sum over choices. What passes from step to step is rounded to the
    dtype: logits, gate, up, their product and down, each rank's share and the sum. Four times either leaves room for
    unlucky signs.
    """
    summed_terms = 2 * HIDDEN + INTERMEDIATE + TOP_K
    stored_values = 7
    of_sums = torch.finfo(torch.float32).eps / 2 * summed_terms**0.5
    of_stores = torch.finfo(dtype).eps / 2 * stored_values**0.5
    return float(4 * (of_sums + of_stores))
