"""The enums and named tuples that cross from one step of the stage to the next."""

import enum
from collections.abc import Callable
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


class Dispatch(enum.Enum):
    """How rows reach the experts of other ranks."""

    LOCAL = "local"
    """Not at all: every row is here already, after an all-gather."""
    ALL_TO_ALL = "all_to_all"
    """An exchange of just the rows that are needed. Reads their number on the host, so it cannot be captured."""
    FIXED_CAPACITY = "fixed_capacity"
    """An even exchange of a fixed number of rows: static shapes, no host read, can be captured."""


SelectExperts: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]
]


class Routing(NamedTuple):
    """How router logits become expert choices.

    Attributes:
        top_k: experts per token, at most ``num_experts``.
        num_experts: experts of the whole layer, the E of the logits.
        scoring: ``"softmax"`` over all experts, ``"sigmoid"`` or ``"sqrtsoftplus"`` of each; in float32.
        renormalize: whether the chosen weights are divided by their sum.
        num_expert_group: equal groups of consecutive experts, of which each token chooses `topk_group`; None: one group.
        topk_group: groups that a token chooses from.
        e_score_correction_bias: float ``[E]``, added to the scores for the choice, not for the weights.
        routed_scaling_factor: factor of the weights, after they are renormalised.
        token_to_experts: int ``[vocabulary, top_k]`` (-1 for no choice): hash routing, where a token's id chooses its experts
            and its scores only weigh them. Needs `input_ids`.
        logical_to_physical: int ``[E]`` or ``[E, replicas]`` (-1 where an expert has fewer): slots of each expert, where
            experts have redundant copies. Of several, token `i` of the call takes number `i` modulo how many there are.
        num_redundant_experts: slots beyond E. EP rank `r` holds the `r`-th equal run of ``E + num_redundant_experts`` slots.
        apply_router_weight_on_input: weigh what goes into an expert, and not again what comes out.
        select_experts: a function of the caller's that routes instead: of ``hidden_states [T, H]``, ``router_logits`` and
            `input_ids` (or None) it makes ``topk_weights [T, K]`` and ``topk_ids [T, K]``, or slots if there is no
            `logical_to_physical`. Rows that pad go in, too, and are routed nowhere whatever it says. Of the fields above, those
            that choose and weigh are then ignored.
    """

    top_k: int
    num_experts: int
    scoring: str = "softmax"
    renormalize: bool = True
    num_expert_group: int | None = None
    topk_group: int | None = None
    e_score_correction_bias: torch.Tensor | None = None
    routed_scaling_factor: float = 1.0
    token_to_experts: torch.Tensor | None = None
    logical_to_physical: torch.Tensor | None = None
    num_redundant_experts: int = 0
    apply_router_weight_on_input: bool = False
    select_experts: SelectExperts | None = None


class WeightLayout(enum.Enum):
    """In which order a weight's values lie in memory."""

    PLAIN = "plain"
    VLLM_CPU = "vllm_cpu"
    """As vLLM's CPU kernel has packed them: a tensor of the same shape that no other kernel can read."""
    NPU = "npu"
    """As Ascend's kernels read them: `w13` ``[E, H, 2 * I]``, `w2` ``[E, I, H]``; int8 in the FRACTAL_NZ format."""


class ExpertWeights(NamedTuple):
    """Weights of the experts of one rank, in the layout that vLLM and Transformers hold.

    Attributes:
        w13: gate and up projections, ``[E_local, 2 * I, H]``: the gate in the first ``I`` rows; for ``"swigluoai"`` gate and up
            in turn, row by row, as GPT-OSS has them.
        w2: down projections, ``[E_local, H, I]``.
        w13_bias: ``[E_local, 2 * I]``, or None.
        w2_bias: ``[E_local, H]``, or None.
        w13_scale: scales of quantised `w13`, as `quantize_weights` makes them, or None.
        w2_scale: likewise, of `w2`.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` of the gate, times up; or ``"swigluoai"``.
        layout: of `w13` and `w2`; `prepack_experts` sets it.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    activation: str = "silu"
    layout: WeightLayout = WeightLayout.PLAIN


class SharedExperts(NamedTuple):
    """An MLP that every token goes through, beside the routed experts.

    Attributes:
        w13: ``[2 * I, H]``, in the layout of `ExpertWeights`; of the dtype of the tokens.
        w2: ``[H, I]``.
        is_tp_sharded: whether each TP rank holds its part of the intermediate axis, or all hold all of it.
        gate: ``[1, H]``: the output is multiplied by ``sigmoid(x @ gate.T)``, as Qwen2-MoE does; or None.
        activation: as in `ExpertWeights`.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    is_tp_sharded: bool
    gate: torch.Tensor | None = None
    activation: str = "silu"
