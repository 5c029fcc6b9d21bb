"""The experts through the CPU kernel of vLLM (``cpu_fused_moe``), on weights that it has packed.

One kernel groups the rows by expert, streams each expert's weights once and sums the results; at decode memory is its limit.
Source: ``vllm/_custom_ops.py`` (``cpu_prepack_moe_weight``, ``cpu_fused_moe``) of vLLM 0.32,
https://github.com/vllm-project/vllm.

N rows, K top-k, H hidden, I intermediate, E experts of this rank, P pairs of a row and one of its experts.
"""

import torch

from fake_impls.backends import vllm_cpu as shapes
from moe_ops._library import define, no_gradient

ISA = "vec"
"""The portable form of the kernel, which vLLM has for every x86 processor and all three dtypes."""

FEW = 8
"""Pairs of a row and an expert, up to which more of them cost less than to pick some."""

ALIGNMENT = 32
"""H and I, as packed, are multiples of it."""


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
    is_weighed: bool,
) -> torch.Tensor:
    """On CPU tensors alone, so that reading ids waits for nothing: the kernel takes all rows at once where all choices are of
    this rank, else the pairs that are, whose number has to be read."""
    weights = w13, w2, w13_bias, w2_bias
    output_NH = shapes.vllm_cpu_experts(
        hidden_states, topk_ids, topk_weights, first_expert, *weights, activation, is_weighed
    )
    num_local = w13.shape[0]
    local_NK = topk_ids - first_expert if first_expert else topk_ids
    if not topk_ids.numel():
        return output_NH.zero_()
    low, high = local_NK.aminmax()
    if not is_weighed and int(low) >= 0 and int(high) < num_local:
        _call(output_NH, hidden_states, weights, topk_weights, local_NK, activation)
        return output_NH
    # The kernel takes no id that is not an expert's, and weighs no input.
    is_local_NK = (local_NK >= 0) & (local_NK < num_local)
    if not is_weighed and topk_ids.numel() <= FEW:
        return _run_few(output_NH, hidden_states, weights, topk_weights, local_NK, is_local_NK, activation)
    # One row for each pair that is of this rank.
    row_P, choice_P = is_local_NK.nonzero(as_tuple=True)
    weights_P1 = topk_weights[row_P, choice_P].unsqueeze(1)
    rows_PH = hidden_states.index_select(0, row_P)
    if is_weighed:
        rows_PH = (rows_PH.to(torch.float32) * weights_P1).to(rows_PH.dtype)
        weights_P1 = torch.ones_like(weights_P1)
    results_PH, ids_P1 = torch.empty_like(rows_PH), local_NK[row_P, choice_P].unsqueeze(1)
    _call(results_PH, rows_PH, weights, weights_P1, ids_P1, activation)
    total_NH = torch.zeros(output_NH.shape, dtype=torch.float32).index_add_(0, row_P, results_PH.to(torch.float32))
    return output_NH.copy_(total_NH)


def _run_few(
    output_NH: torch.Tensor,
    hidden_states: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    topk_weights: torch.Tensor,
    local_NK: torch.Tensor,
    is_local_NK: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """All rows at once, so that little is done around the kernel: a choice of another rank's becomes one that the row makes
    here, with a weight of 0, for which no more weights of experts are read."""
    here_N1 = torch.where(is_local_NK, local_NK, -1).amax(dim=1, keepdim=True)
    low, high = here_N1.aminmax()
    if int(high) < 0:
        return output_NH.zero_()
    is_complete = int(low) >= 0
    instead_N1 = here_N1 if is_complete else torch.where(here_N1 < 0, high, here_N1)
    ids_NK, weights_NK = torch.where(is_local_NK, local_NK, instead_N1), torch.where(is_local_NK, topk_weights, 0.0)
    _call(output_NH, hidden_states, weights, weights_NK, ids_NK, activation)
    return output_NH if is_complete else output_NH.masked_fill_(here_N1 < 0, 0.0)


def _call(
    output: torch.Tensor,
    rows: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
) -> None:
    if not hasattr(torch.ops._C, "cpu_fused_moe") and not load():  # packed in another process
        raise RuntimeError("experts: packed weights need vLLM's CPU kernels, which are not installed")
    if rows.shape[0]:
        w13, w2, *biases = weights
        biases = [None if bias is None else bias.contiguous() for bias in biases]
        routed = topk_weights.contiguous(), topk_ids.to(torch.int32).contiguous()
        torch.ops._C.cpu_fused_moe(output, rows.contiguous(), w13, w2, *biases, *routed, False, activation, ISA)


vllm_cpu_experts = define(
    "vllm_cpu_experts(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, SymInt first_expert, Tensor w13, Tensor w2,"
    " Tensor? w13_bias, Tensor? w2_bias, str activation, bool is_weighed) -> Tensor",
    kernel=_experts,
    key="CPU",
    fake=shapes.vllm_cpu_experts,
    backward=no_gradient,
)
"""``[N, H], int [N, K], float32 [N, K], packed [E, 2 * I, H] and [E, H, I], biases [E, 2 * I] and [E, H] -> [N, H]``, zero for
rows that have no expert here. It reads ids on the host: it has CPU tensors alone, so that this waits for nothing.

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


def pack(weight: torch.Tensor) -> torch.Tensor:
    """``[E, N, K]`` in the kernel's order: a tensor of the same shape and dtype."""
    packed = torch.empty_like(weight, memory_format=torch.contiguous_format)
    torch.ops._C.prepack_moe_weight(weight.contiguous(), packed, ISA)
    return packed
