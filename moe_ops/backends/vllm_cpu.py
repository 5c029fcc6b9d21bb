"""The experts through the CPU kernel of vLLM (``cpu_fused_moe``), on weights that it has packed.

One kernel groups the rows by expert, streams each expert's weights once and sums the results; at decode memory is its limit.
Source: ``vllm/_custom_ops.py`` (``cpu_prepack_moe_weight``, ``cpu_fused_moe``) of vLLM 0.32,
https://github.com/vllm-project/vllm.

N rows, K top-k, H hidden, I intermediate, E experts of this rank, P pairs of a row and one of its experts.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F

from fake_impls.backends import vllm_cpu as shapes
from fake_impls.checks import FLOATS
from fake_impls.experts import sum_dtype
from moe_ops._library import define, no_gradient
from moe_ops.activations import ACTIVATIONS
from moe_ops.types import ExpertWeights, WeightLayout

ISA = "vec"
"""The portable form of the kernel, which vLLM has for every x86 processor and all three dtypes."""

FEW = 8
"""Pairs of a row and an expert: up to so many it is faster to compute all of them than to pick some."""

ALIGNMENT = 32
"""H and I, as packed, are multiples of it."""

PART = 2.0**-16
"""Of a sum that is beyond float16: the part that float16 can hold, to its full precision."""

Weights: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def _experts(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    first_expert: int,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    activation: str,
    weights_on_input: bool,
) -> torch.Tensor:
    """On CPU tensors alone, so that reading ids waits for nothing: the kernel takes all rows at once where all choices are of
    this rank, else the pairs that are, whose number has to be read."""
    weights = w13, w2, w13_bias, w2_bias
    num_local, dtype = w13.shape[0], sum_dtype(hidden_states.dtype)
    local_NK = topk_ids - first_expert if first_expert else topk_ids
    if not topk_ids.numel():
        return hidden_states.new_zeros(hidden_states.shape, dtype=dtype)
    low, high = local_NK.aminmax()
    if not weights_on_input and int(low) >= 0 and int(high) < num_local:
        return _sum(hidden_states, weights, topk_weights, local_NK, activation)
    # The kernel takes no id that is not an expert's, and weighs no input.
    is_local_NK = (local_NK >= 0) & (local_NK < num_local)
    if not weights_on_input and topk_ids.numel() <= FEW:
        return _run_few(hidden_states, weights, topk_weights, local_NK, is_local_NK, activation)
    # One row for each pair that is of this rank.
    row_P, choice_P = is_local_NK.nonzero(as_tuple=True)
    weights_P1 = topk_weights[row_P, choice_P].unsqueeze(1)
    rows_PH = hidden_states.index_select(0, row_P)
    if weights_on_input:
        rows_PH = (rows_PH.to(torch.float32) * weights_P1).to(rows_PH.dtype)
        weights_P1 = torch.ones_like(weights_P1)
    results_PH = _sum(rows_PH, weights, weights_P1, local_NK[row_P, choice_P].unsqueeze(1), activation)
    total_NH = torch.zeros(hidden_states.shape, dtype=torch.float32)
    return total_NH.index_add_(0, row_P, results_PH.to(torch.float32)).to(dtype)


def _run_few(
    hidden_states: torch.Tensor,
    weights: Weights,
    topk_weights: torch.Tensor,
    local_NK: torch.Tensor,
    is_local_NK: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """All rows at once, so that little is done around the kernel: a choice of another rank's becomes, with a weight of 0, one
    that the row makes here anyway. So no weights of other experts are read."""
    here_N1 = torch.where(is_local_NK, local_NK, -1).amax(dim=1, keepdim=True)
    low, high = here_N1.aminmax()
    if int(high) < 0:
        return hidden_states.new_zeros(hidden_states.shape, dtype=sum_dtype(hidden_states.dtype))
    is_complete = int(low) >= 0
    instead_N1 = here_N1 if is_complete else torch.where(here_N1 < 0, high, here_N1)
    ids_NK, weights_NK = torch.where(is_local_NK, local_NK, instead_N1), torch.where(is_local_NK, topk_weights, 0.0)
    output_NH = _sum(hidden_states, weights, weights_NK, ids_NK, activation)
    return output_NH if is_complete else output_NH.masked_fill_(here_N1 < 0, 0.0)


def _sum(
    rows: torch.Tensor,
    weights: Weights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """Sums of the kernel, as summands. It sums in float32 and rounds at the end; what is beyond float16 then is infinite, and
    the kernel is asked again, for a part of it."""
    sums = _call(rows, weights, topk_weights, topk_ids, activation)
    if sums.dtype is not torch.float16:
        return sums
    is_finite = sums.isfinite()
    if bool(is_finite.all()):
        return sums.to(torch.float32)
    parts = _call(rows, weights, topk_weights * PART, topk_ids, activation)
    return torch.where(is_finite, sums, parts.to(torch.float32) / PART)


def _call(
    rows: torch.Tensor,
    weights: Weights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    if not hasattr(torch.ops._C, "cpu_fused_moe") and not load():  # packed in another process
        raise RuntimeError("experts: packed weights need vLLM's CPU kernels, which are not installed")
    output = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if rows.shape[0]:
        w13, w2, *biases = weights
        biases = [None if bias is None else bias.contiguous() for bias in biases]
        routed = topk_weights.contiguous(), topk_ids.to(torch.int32).contiguous()
        torch.ops._C.cpu_fused_moe(output, rows.contiguous(), w13, w2, *biases, *routed, False, activation, ISA)
    return output


vllm_cpu_experts = define(
    "vllm_cpu_experts(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, SymInt first_expert, Tensor w13, Tensor w2,"
    " Tensor? w13_bias, Tensor? w2_bias, str activation, bool weights_on_input) -> Tensor",
    kernel=_experts,
    key="CPU",
    fake=shapes.vllm_cpu_experts,
    check=shapes.check_vllm_cpu_experts,
    backward=no_gradient,
)
"""``[N, H], int [N, K], float32 [N, K], packed [E, 2 * I, H] and [E, H, I], biases [E, 2 * I] and [E, H] -> [N, H]``, zero for
rows that have no expert here; float32 for float16, which may not hold a summand. It reads ids on the host: it has CPU tensors
alone, so that this waits for nothing.

Raises:
    ValueError, TypeError: arguments do not fit each other.
    RuntimeError: vLLM's kernels are not installed.
"""


def load() -> bool:
    """Load vLLM's CPU kernels; whether they are there."""
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return False
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "cpu_fused_moe")


RunRows: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, ExpertWeights, bool], torch.Tensor]


def run_rows(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    first_expert: int,
    experts: ExpertWeights,
    weights_on_input: bool,
) -> torch.Tensor:
    """The weighted sum of the chosen experts' results, of the experts that are here.

    Args:
        hidden_states: ``[N, H]``.
        topk_ids: int32 or int64 ``[N, K]``, ids of the whole layer; -1, and ids of other ranks' experts, go nowhere.
        topk_weights: float32 ``[N, K]``.
        first_expert: id of this rank's first expert.
        experts: packed by `pack_experts`.
        weights_on_input: whether the weights go into the experts' input instead of on their output.

    Returns:
        ``[N, H]``, zero for rows that have no expert here; float32 for float16.
    """
    output: torch.Tensor = vllm_cpu_experts(
        hidden_states, topk_ids, topk_weights, first_expert, *experts[:4], experts.activation, weights_on_input
    )
    return output


def why_not(experts: ExpertWeights) -> str | None:
    """Why the kernel cannot take these experts; None if it can."""
    w13, w2 = experts.w13, experts.w2
    sizes = w2.shape[1:]
    if experts.layout is not WeightLayout.PLAIN:
        return "they are packed already"
    if w13.device.type != "cpu" or w13.dtype not in FLOATS or w2.dtype != w13.dtype:
        return f"they are {w13.dtype} on {w13.device.type}"
    if experts.activation not in ACTIVATIONS or "vllm_cpu" not in ACTIVATIONS[experts.activation].kernels:
        return f"their activation is {experts.activation!r}"
    if sizes[0] % ALIGNMENT or not sizes.numel():
        return f"H and I are {tuple(sizes)}, and H must be a multiple of {ALIGNMENT}, and neither 0"
    return None if load() else "vLLM's CPU kernels are not installed"


def packer_for(experts: ExpertWeights) -> Callable[[ExpertWeights], ExpertWeights] | None:
    """What packs these experts, if the kernel can take them."""
    return pack_experts if why_not(experts) is None else None


def pack_experts(experts: ExpertWeights) -> ExpertWeights:
    """Experts that the kernel reads; I is filled up with zeros to a multiple of 32, which changes no result.

    Raises:
        ValueError: it cannot take them; the message says why. Or a weight or bias does not fit the others.
        TypeError: a dtype differs from that of the other weights.
    """
    reason = why_not(experts)
    if reason is not None:
        raise ValueError(f"pack_experts: experts must fit vLLM's CPU kernel, but {reason}")
    shapes.check_weights(*experts[:4])
    experts = _fill_up(experts, -experts.w2.shape[2] % ALIGNMENT)
    return experts._replace(w13=_pack(experts.w13), w2=_pack(experts.w2), layout=WeightLayout.VLLM_CPU)


def _fill_up(experts: ExpertWeights, count: int) -> ExpertWeights:
    """With `count` more zeros in I: of the gate and of up, of which every activation makes zero, and in the inputs of w2."""
    if count == 0:
        return experts
    axis = 1 if ACTIVATIONS[experts.activation].alternates else 2  # gate and up in turn, or one after the other

    def outputs(x_EO: torch.Tensor) -> torch.Tensor:
        parts = x_EO.unflatten(1, (-1, 2) if axis == 1 else (2, -1))
        shape = list(parts.shape)
        shape[axis] = count
        return torch.cat((parts, parts.new_zeros(shape)), axis).flatten(1, 2)

    bias = None if experts.w13_bias is None else outputs(experts.w13_bias)
    return experts._replace(w13=outputs(experts.w13), w2=F.pad(experts.w2, (0, count)), w13_bias=bias)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    """``[E, N, K]`` in the kernel's order: a tensor of the same shape and dtype."""
    packed = torch.empty_like(weight, memory_format=torch.contiguous_format)
    torch.ops._C.prepack_moe_weight(weight.contiguous(), packed, ISA)
    return packed
