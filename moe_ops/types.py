"""The enums and named tuples that cross from one step of the stage to the next."""

import enum
from typing import NamedTuple, TypeAlias

import torch


class Strategy(enum.Enum):
    """How tokens reach the ranks of their experts."""

    ALL2ALL = "all2all"
    MC2 = "mc2"
    ALLGATHER = "allgather"
    """Takes its EP form when the tokens are sharded (sequence parallelism), its DP form otherwise."""


class Quant(enum.Enum):
    """What prepare or dispatch does to activations before they travel."""

    NONE = "none"
    W8A8 = "w8a8"
    """int8 per token."""
    W4A8 = "w4a8"
    """int8 per token: W8A8 and W4A8 differ in the weights alone."""
    MXFP8 = "mxfp8"
    """e4m3 elements with one e8m0 scale per 32."""
    MXFP4 = "mxfp4"
    """e2m1 elements, two a byte, with one e8m0 scale per 32."""


class Reduction(enum.Enum):
    """Whether what finalize returns (without ``reduce_results``) is finished."""

    COMPLETE = "complete"
    PARTIAL_OVER_TP = "partial_over_tp"
    """Each TP rank holds one summand; the caller adds them up, once."""


class UnchangedState(NamedTuple):
    """Prepare returned its tokens as they came, so finalize does too."""

    num_tokens: int
    padded_num_tokens: int


class ShardState(NamedTuple):
    """All2All and MC2: tokens were padded to ``padded_num_tokens`` rows and cut into ``num_chunks`` equal chunks."""

    num_tokens: int
    padded_num_tokens: int
    num_chunks: int


class DataParallelState(NamedTuple):
    """AllGather, DP form: tokens were padded to ``padded_num_tokens`` and gathered over DP; the ``num_tokens_before_pcp``
    rows that this made were padded to ``padded_num_tokens_before_pcp`` and gathered over PCP."""

    num_tokens: int
    padded_num_tokens: int
    num_tokens_before_pcp: int
    padded_num_tokens_before_pcp: int


class ExpertParallelState(NamedTuple):
    """AllGather, EP form: EP rank `r` brought ``num_tokens_across_ep[r]`` rows, or all ranks brought as many if empty."""

    num_tokens: int
    padded_num_tokens: int
    num_tokens_across_ep: tuple[int, ...]


State: TypeAlias = UnchangedState | ShardState | DataParallelState | ExpertParallelState


class PrepareOutput(NamedTuple):
    """What ``prepare`` returns.

    Attributes:
        hidden_states: ``[rows, H]``; quantised in the AllGather EP form if asked for.
        router_logits: ``[rows, E]``.
        mc2_mask: bool ``[rows]``, or None where none was passed (always, outside MC2).
        pertoken_scale: scales of quantised hidden states, or None.
        state: ints and tuples of ints that ``finalize`` and ``lay_out_like_prepared`` take.
    """

    hidden_states: torch.Tensor
    router_logits: torch.Tensor
    mc2_mask: torch.Tensor | None
    pertoken_scale: torch.Tensor | None
    state: State


class Routing(NamedTuple):
    """How router logits become expert choices.

    Attributes:
        top_k: experts per token, at most ``num_experts``.
        num_experts: experts of the whole layer; EP rank `r` holds the `r`-th equal run of them.
        scoring: ``"softmax"`` over all experts, in float32.
        renormalize: whether the chosen weights are divided by their sum.
    """

    top_k: int
    num_experts: int
    scoring: str = "softmax"
    renormalize: bool = True


class ExpertWeights(NamedTuple):
    """Weights of the experts of one rank, in the layout that vLLM and Transformers hold.

    Attributes:
        w13: gate and up projections, ``[E_local, 2 * I, H]``: the gate in the first ``I`` rows.
        w2: down projections, ``[E_local, H, I]``.
    """

    w13: torch.Tensor
    w2: torch.Tensor
