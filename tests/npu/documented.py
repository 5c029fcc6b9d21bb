"""What the pages of torch_npu's fused ops say that they compute, on a CPU: kernels of the real ``npu::`` ops for CPU tensors.

An op's page is ``torch_npu-<op>.md`` of https://gitcode.com/Ascend/op-plugin, in ``docs/context``; shapes are those of
torch_npu's meta functions. The kernels are adversaries: what a page requires of an argument is checked, and what it leaves
unwritten, or does not define, is NaN, or an index or a byte out of range. They are slow, and share no arithmetic with the
library.
Here are those that quantise and route; `documented_experts` and `documented_exchange` have the others.

M rows, N columns of a result, K of a row (of choices: top-k), E experts, H hidden, B blocks of 32.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch_npu  # noqa: F401  # it defines the ops

LIB = torch.library.Library("npu", "IMPL")
ASCEND_950 = 260  # the chips of A5 from here on; below, A3

BLOCK, E8M0_BIAS, E8M0_NAN = 32, 127, 255
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)
OUTPUTS = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16, 24: torch.float8_e4m3fn, 292: torch.float8_e4m3fn}
E2M1 = 296  # torch_npu's number of the dtype

calls: Counter[str] = Counter()
"""How often each op was called."""


class Chip:
    """The chip that the kernels are of; a test sets it."""

    soc_version = 250


def documents(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Register a kernel for CPU tensors, under its own name."""

    @wraps(kernel)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[kernel.__name__] += 1
        return kernel(*args, **kwargs)

    LIB.impl(kernel.__name__, counted, "CPU")
    return kernel


def require(op: str, condition: object, what: str) -> None:
    """What a page requires."""
    if not condition:
        raise ValueError(f"{op}: its page requires {what}")


def unwritten(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What a kernel leaves as it was: NaN, or the worst number there is."""
    if dtype.itemsize == 1 and dtype.is_floating_point:
        return torch.full(tuple(shape), 0xFF, dtype=torch.uint8).view(dtype)
    if dtype.is_floating_point:
        return torch.full(tuple(shape), torch.nan, dtype=dtype)
    worst = {torch.uint8: 255, torch.int8: -128}.get(dtype, 2**30 + 1)
    return torch.full(tuple(shape), worst, dtype=dtype)


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``scale = rowMax(abs(x)) / 127``, ``round(x / scale)``; no page says what comes of rows of zeros, or not finite ones."""
    x_MK = x.to(torch.float32)
    scale_M = x_MK.abs().amax(dim=1) / 127
    is_defined_M1 = (scale_M.isfinite() & (scale_M > 0)).unsqueeze(1)
    rounded_MK = torch.where(is_defined_M1, x_MK / scale_M.unsqueeze(1), -128.0).round().to(torch.int8)
    return rounded_MK, scale_M


def nearest_code(magnitude: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """uint8 codes of the nearest values of a float64 grid: ties to even codes, what is beyond the last becomes the last."""
    middle = (grid[1:] + grid[:-1]) / 2
    below, above = torch.searchsorted(middle, magnitude), torch.searchsorted(middle, magnitude, right=True)
    return torch.where(below % 2 == 0, below, above).to(torch.uint8)


E4M3_GRID = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E2M1_GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def mx_rows(x: torch.Tensor, grid: torch.Tensor, emax: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[M, K]`` and scale bytes ``[M, even number of blocks]``: blocks share ``2 ** (floor(log2(amax)) - emax)``.

    No page says which scale a block of zeros has, nor what comes of one that is not finite; bytes past the last block are never
    to be used.
    """
    x_MK = x.double()
    codes, scales = [], []
    for block in x_MK.split(BLOCK, dim=1):
        amax_M1 = block.abs().amax(dim=1, keepdim=True)
        exponent_M1 = (torch.frexp(amax_M1).exponent - 1 - emax).clamp(min=-E8M0_BIAS)
        code = nearest_code(block.abs() / 2.0 ** exponent_M1.double(), grid) | (block.signbit() * len_of_sign(grid))
        byte_M1 = torch.where(amax_M1 > 0, exponent_M1 + E8M0_BIAS, 200).to(torch.uint8)
        is_finite_M1 = amax_M1.isfinite()
        codes.append(torch.where(is_finite_M1, code, 0))
        scales.append(torch.where(is_finite_M1, byte_M1, E8M0_NAN))
    scale_MB = torch.cat(scales, dim=1)
    return torch.cat(codes, dim=1), torch.cat(
        [scale_MB, unwritten((len(x), scale_MB.shape[1] % 2), torch.uint8)], dim=1
    )


def len_of_sign(grid: torch.Tensor) -> torch.Tensor:
    """The bit of the sign, which is the one above those of the grid's codes."""
    return torch.tensor(0x80 if len(grid) > 8 else 0x08, dtype=torch.uint8)


@documents
def npu_dynamic_quant(input: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    require(
        "npu_dynamic_quant", input.dtype in HALVES and input.dim() > 1, "float16 or bfloat16 of two dimensions or more"
    )
    require("npu_dynamic_quant", not options, "nothing else here")
    return int8_rows(input)


@documents
def npu_dynamic_mx_quant(
    input: torch.Tensor, *, dst_type: int = E2M1, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    op = "npu_dynamic_mx_quant"
    require(op, Chip.soc_version >= ASCEND_950, "a chip of A5")
    require(op, input.dtype in FLOATS and not options, "float16, bfloat16 or float32")
    require(op, input.dtype is not torch.float32 or input.shape[1] >= BLOCK, "32 columns or more of float32")
    if OUTPUTS.get(dst_type) is torch.float8_e4m3fn:
        codes, scale = mx_rows(input, E4M3_GRID, 8)
        return codes.view(torch.float8_e4m3fn), scale.unflatten(1, (-1, 2))
    require(op, dst_type == E2M1 and input.shape[1] % 2 == 0, "an even number of columns of e2m1")
    codes, scale = mx_rows(input, E2M1_GRID, 2)
    return codes[:, ::2] | (codes[:, 1::2] << 4), scale.unflatten(1, (-1, 2))


@documents
def npu_moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    active_num: int = -1,
    expert_num: int = -1,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    op = "npu_moe_init_routing_v2"
    require(op, x.dim() == 2 and x.dtype in (*FLOATS, torch.int8), "x [M, H] of float16, bfloat16, float32 or int8")
    require(op, expert_idx.dtype is torch.int32 and expert_idx.dim() == 2, "int32 expert_idx [M, K]")
    require(op, len(expert_idx) == len(x), "as many rows of expert_idx as of x")
    require(op, ((expert_idx >= 0) & (expert_idx < expert_num)).all(), "ids in [0, expert_num)")
    require(op, 0 < expert_num <= 10240 and active_num in (-1, 0, expert_idx.numel()), "all rows here")
    require(op, (expert_tokens_num_type, expert_tokens_num_flag) == (1, True), "counts here")
    require(
        op, (quant_mode, row_idx_type) == (-1, 0) and not options, "no quantisation, and indices to gather by, here"
    )
    start, end = active_expert_range
    require(op, 0 <= start < end <= expert_num, "an active range of experts")
    chosen = expert_idx.flatten().tolist()
    rows = unwritten((len(chosen), x.shape[1]), x.dtype)
    positions = torch.full((len(chosen),), -1, dtype=torch.int32)
    counts = torch.zeros(end - start, dtype=torch.int64)
    place = 0
    for choice in sorted(range(len(chosen)), key=lambda choice: chosen[choice]):
        if start <= chosen[choice] < end:
            rows[place], positions[choice] = x[choice // expert_idx.shape[1]], place
            counts[chosen[choice] - start] += 1
            place += 1
    return rows, positions, counts, unwritten((len(chosen),), torch.float32)


@documents
def npu_moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "npu_moe_gating_top_k"
    num_experts = x.shape[1]
    size = num_experts // group_count
    require(op, x.dim() == 2 and x.dtype in FLOATS and not options, "x [M, E] of float16, bfloat16 or float32")
    require(
        op, bias is None or (bias.shape == (num_experts,) and bias.dtype is x.dtype), "a bias [E] of the dtype of x"
    )
    require(op, num_experts % group_count == 0 and size > 2, "equal groups of more than 2 experts")
    require(op, max(num_experts, -(-size // 32) * 32 * group_count) <= 2048, "2048 experts at most, aligned to 32")
    require(op, 1 <= k_group <= group_count and 1 <= k <= size * k_group, "no more choices than experts in the groups")
    x_ME = x.double()
    exp_ME = (x_ME - x_ME.amax(dim=1, keepdim=True)).exp()
    scores_ME = 1 / (1 + (-x_ME).exp()) if norm_type == 1 else exp_ME / exp_ME.sum(dim=1, keepdim=True)
    choice_ME = scores_ME if bias is None else scores_ME + bias.double()
    ids = unwritten((len(x), k), torch.int32)
    for row, choice in enumerate(choice_ME.tolist()):
        if any(score != score for score in choice):
            continue  # it is not said how NaN is ranked
        groups = [
            sorted(choice[first : first + size])[-1 - group_select_mode :] for first in range(0, num_experts, size)
        ]
        best = sorted(range(group_count), key=lambda group: -sum(groups[group]))[:k_group]
        allowed = [expert for expert in range(num_experts) if expert // size in best]
        # Ties: not said either. The last comes first, where the library says the first does.
        ids[row] = torch.tensor(sorted(allowed, key=lambda expert: (-choice[expert], -expert))[:k])
    is_ranked_M1 = ids[:, :1] < num_experts
    y_MK = scores_ME.gather(1, torch.where(is_ranked_M1, ids, 0).long())
    if norm_type == 1:
        y_MK = y_MK / (y_MK.sum(dim=1, keepdim=True) + eps)
    y_MK = torch.where(is_ranked_M1, y_MK * routed_scaling_factor, torch.nan)
    return y_MK.to(x.dtype), ids, scores_ME.float() if out_flag else unwritten(x.shape, torch.float32)


@documents
def npu_moe_finalize_routing(
    expanded_permuted_rows: torch.Tensor,
    skip1: torch.Tensor | None,
    skip2: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor,
    expanded_src_to_dst_row: torch.Tensor,
    export_for_source_row: torch.Tensor | None,
    drop_pad_mode: int = 0,
    k: int = 1,
) -> torch.Tensor:
    op = "npu_moe_finalize_routing"
    rows, index = expanded_permuted_rows, expanded_src_to_dst_row
    require(
        op, (skip1, skip2, bias, export_for_source_row, drop_pad_mode) == (None,) * 4 + (2,), "no other summands here"
    )
    require(
        op, rows.dim() == 2 and rows.dtype in FLOATS and scales.dtype is rows.dtype, "scales of the dtype of the rows"
    )
    require(
        op, index.dtype is torch.int32 and index.shape == (scales.numel(),) == rows.shape[:1], "int32 indices [M * K]"
    )
    require(op, ((index >= 0) & (index < len(index))).all(), "indices in [0, M * K)")
    total_MH = torch.zeros(len(scales), rows.shape[1])
    for choice, index_M in enumerate(index.long().view(scales.shape).unbind(1)):
        total_MH = total_MH + rows.float()[index_M] * scales.float()[:, choice, None]  # weight 0 does not drop NaN
    return total_MH.to(rows.dtype)
