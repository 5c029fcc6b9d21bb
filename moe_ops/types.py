"""The enums and named tuples that cross from one step of the stage to the next."""

import enum
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch

from moe_ops.groups import ParallelGroups


class Strategy(enum.Enum):
    """How tokens reach the ranks of their experts."""

    ALL2ALL = "all2all"
    MC2 = "mc2"
    ALLGATHER = "allgather"
    """Takes its EP form when the tokens are sharded (sequence parallelism), its DP form otherwise."""


class Dispatch(enum.Enum):
    """How rows reach the experts of other ranks."""

    LOCAL = "local"
    """Not at all: every row is here already, after an all-gather."""
    ALL_TO_ALL = "all_to_all"
    """An exchange of just the rows that are needed. Reads their number on the host, so it cannot be captured."""
    FIXED_CAPACITY = "fixed_capacity"
    """An even exchange of a fixed number of rows: static shapes, no host read, can be captured."""


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


class Layout(NamedTuple):
    """How the stage is laid over ranks: the same for every step and every call of a layer.

    Attributes:
        strategy: how tokens reach the ranks of their experts.
        groups: the process groups.
        dispatch: LOCAL goes with ALLGATHER, the others with ALL2ALL and MC2. None: ALLGATHER LOCAL, ALL2ALL ALL_TO_ALL, MC2
            FIXED_CAPACITY. Without an EP group nothing is exchanged.
        tokens_are_sharded: the tokens are a sequence-parallel shard already: they are not chunked over TP, and finalize
            returns the shard.
        shared_expert_dp: ALL2ALL and MC2 leave each TP rank all tokens of its TP group instead of a chunk, for shared experts
            that are replicated. With ALLGATHER each has them anyway.

    Example::

        layout = mo.Layout(mo.Strategy.ALL2ALL, mo.ParallelGroups.from_device_mesh(mesh))
    """

    strategy: Strategy
    groups: ParallelGroups
    dispatch: Dispatch | None = None
    tokens_are_sharded: bool = False
    shared_expert_dp: bool = False


class Lengths(NamedTuple):
    """What a call knows of token counts. Say what you know: every strategy takes every field, and any of them that agree.

    A strategy derives from them what it pads to. Where it has to know what other ranks have and nothing is said, or where what
    is said contradicts itself or the tokens, it raises a ValueError before anything is sent.

    Attributes:
        longest: rows of the EP rank that has most.
        equal: all ranks have as many as this one.
        per_rank: rows of each EP rank, in EP order. TP ranks that hold the same tokens repeat the number.
        mask: bool ``[P]``, a prefix of True: which rows of this TP group's padded tokens are real; the others are routed
            nowhere. P is a multiple of TP and the same on all ranks. For sharded tokens each rank has at most P / TP rows; all
            shards of the TP group have as many, unless `per_rank` says otherwise.

    Example: 3 tokens here, 5 on the other rank::

        lengths = mo.Lengths(per_rank=[3, 5])  # or mo.Lengths(longest=5)
    """

    longest: int | None = None
    equal: bool = False
    per_rank: Sequence[int] | None = None
    mask: torch.Tensor | None = None


class ShardState(NamedTuple):
    """ALL2ALL and MC2: tokens were padded to ``padded_num_tokens`` rows and cut into ``num_chunks`` equal chunks."""

    num_tokens: int
    padded_num_tokens: int
    num_chunks: int


class DataParallelState(NamedTuple):
    """ALLGATHER, DP form: every rank padded its tokens to ``padded_num_tokens``; they were gathered over DP, then over PCP."""

    num_tokens: int
    padded_num_tokens: int


class ExpertParallelState(NamedTuple):
    """ALLGATHER, EP form: EP rank `r` brought ``num_tokens_across_ep[r]`` rows; if that is empty, each brought
    ``padded_num_tokens``, rows that pad included."""

    num_tokens: int
    padded_num_tokens: int
    num_tokens_across_ep: tuple[int, ...]


State: TypeAlias = ShardState | DataParallelState | ExpertParallelState


class PrepareOutput(NamedTuple):
    """What ``prepare`` returns.

    Attributes:
        hidden_states: ``[rows, H]``; quantised in the ALLGATHER EP form if asked for.
        router_logits: ``[rows, E]``.
        mask: bool ``[rows]``, which rows are real tokens that ``Lengths.mask`` keeps; None if no mask was passed.
        pertoken_scale: scales of quantised hidden states, or None.
        state: ints and tuples of ints that ``finalize`` and ``lay_out_like_prepared`` take.
    """

    hidden_states: torch.Tensor
    router_logits: torch.Tensor
    mask: torch.Tensor | None
    pertoken_scale: torch.Tensor | None
    state: State


class StageOutput(NamedTuple):
    """What ``run_stage`` returns.

    Attributes:
        hidden_states: ``[T, H]``, what ``moe_stage`` returns.
        topk_ids: int32 ``[T, K]``, the experts of this rank's tokens (not the slots of copies); -1 for none.
        topk_weights: float32 ``[T, K]``, their weights; 0 where there is none.
        num_dropped: int64 ``[]``: copies of rows that found no place in a fixed capacity. Always 0: the stage makes room for
            all.
    """

    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    num_dropped: torch.Tensor


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
        logical_to_physical: int ``[E]`` or ``[E, copies]`` (-1 where an expert has fewer): slots of each expert, where experts
            have redundant copies; made by `moe_ops.slots.place_copies`. Of n copies, row `i` goes to the one at ``i % n``.
        num_redundant_experts: slots beyond E. EP rank `r` holds the `r`-th equal run of ``E + num_redundant_experts`` slots.
        apply_router_weight_on_input: weigh what goes into an expert, and not again what comes out.

    Example: Mixtral, and DeepSeek-V3::

        mo.Routing(top_k=2, num_experts=8)
        mo.Routing(8, 256, "sigmoid", num_expert_group=8, topk_group=4, e_score_correction_bias=bias, routed_scaling_factor=2.5)
    """

    top_k: int
    num_experts: int
    scoring: str = "softmax"
    renormalize: bool = True
    num_expert_group: int | None = None
    topk_group: int | None = None
    e_score_correction_bias: torch.Tensor | None = None
    routed_scaling_factor: float = 1.0
    logical_to_physical: torch.Tensor | None = None
    num_redundant_experts: int = 0
    apply_router_weight_on_input: bool = False


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
