"""The experts: a gated MLP for each group of rows. R rows, E experts of this rank, H hidden, I intermediate, N outputs."""

from typing import Any

import torch
import torch.nn.functional as F

from fake_impls import experts as shapes
from fake_impls.checks import FLOATS, check_dtype
from moe_ops._library import add_kernel, define, no_gradient, refuse_forward_mode
from moe_ops.activations import activation_named
from moe_ops.backends import activation_for, experts_for, product_for
from moe_ops.quantize import dequantize_activations, quantize_activations
from moe_ops.quantized_weights import dequantize_weights
from moe_ops.types import ExpertWeights, Quant, WeightLayout

ALIGNMENT = 16  # bytes; F.grouped_mm rejects rows that are no multiple of it


def _grouped_linear(
    rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    ends_E = counts.cumsum(0, dtype=torch.int32)
    outputs, weight = weight.shape[1], weight.to(rows.dtype)
    result_RN = F.grouped_mm(_dense(_align(rows, 1)), _operand(weight), offs=ends_E)[:, :outputs]
    row_R = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32)
    if bias is not None:
        expert_R = torch.searchsorted(ends_E, row_R, right=True).clamp(max=counts.shape[0] - 1)
        result_RN = result_RN + bias[expert_R]
    # Rows past the last group are uninitialised.
    filled_RN = torch.where((row_R < ends_E[-1:]).unsqueeze(1), result_RN, 0)
    return filled_RN.clone(memory_format=torch.contiguous_format)


def _grouped_linear_on_host(
    rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """On a CPU the counts can be read for nothing, and rows past the last group be left out."""
    num_rows, outputs, used = rows.shape[0], weight.shape[1], int(counts.sum())
    if weight.dtype is rows.dtype:
        ends_E = counts.cumsum(0, dtype=torch.int32)
        result_UN = F.grouped_mm(_dense(_align(rows[:used], 1)), _operand(weight), offs=ends_E)
    else:
        result_UN = _widening_linear(rows[:used], counts, weight)
    if bias is not None:
        result_UN[:, :outputs] += bias.repeat_interleave(counts, dim=0)
    if result_UN.shape == (num_rows, outputs):
        return result_UN
    result_RN = rows.new_empty(num_rows, outputs)
    result_RN[:used] = result_UN[:, :outputs]
    result_RN[used:] = 0
    return result_RN


def _widening_linear(rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """With weights of a narrower dtype: only those of experts that have rows are cast, one expert at a time. On a CPU, where
    reading the counts waits for nothing."""
    result_UN = rows.new_empty(rows.shape[0], weight.shape[1])
    start = 0
    for weight_NH, count in zip(weight, counts.tolist(), strict=True):
        if count:
            end = start + count
            torch.mm(rows[start:end], weight_NH.to(rows.dtype).t(), out=result_UN[start:end])
            start = end
    return result_UN


def _grouped_outer(a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    shape = counts.shape[0], a.shape[1], b.shape[1]
    if not a.shape[0]:
        return a.new_zeros(shape)
    ends_E = counts.cumsum(0, dtype=torch.int32)
    aligned_a, aligned_b = _dense(_align(a, 1)), _dense(_align(b, 1))
    product = F.grouped_mm(aligned_a.t(), aligned_b, offs=ends_E)
    filled_E11 = (counts > 0).view(-1, 1, 1)
    return torch.where(filled_E11, product[:, : a.shape[1], : b.shape[1]], 0).contiguous()


def _grouped_outer_on_host(a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """On a CPU the product of no rows is zero, and needs no selection."""
    outer_ENH = shapes.grouped_outer(a, b, counts)
    if not a.shape[0]:
        return outer_ENH.zero_()
    aligned_a, aligned_b = _dense(_align(a, 1)), _dense(_align(b, 1))
    product = F.grouped_mm(aligned_a.t(), aligned_b, offs=counts.cumsum(0, dtype=torch.int32))
    return product if product.shape == outer_ENH.shape else outer_ENH.copy_(product[:, : a.shape[1], : b.shape[1]])


def _sum_groups(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    row_R = torch.arange(x.shape[0], device=x.device)
    expert_R = torch.searchsorted(counts.cumsum(0), row_R, right=True)  # past the last group: one more
    total_EN = x.new_zeros(counts.shape[0] + 1, x.shape[1], dtype=torch.float32)
    return total_EN.index_add(0, expert_R, x.to(torch.float32))[:-1].to(x.dtype, copy=True)


def _operand(weight_ENH: torch.Tensor) -> torch.Tensor:
    """``[E, H, N]`` for F.grouped_mm, without a copy of weights that are contiguous, or transposed and contiguous before."""
    if weight_ENH.is_contiguous() or not weight_ENH.transpose(1, 2).is_contiguous():
        return _dense(_align(_align(weight_ENH, 2), 1)).transpose(1, 2)
    return _dense(_align(_align(weight_ENH.transpose(1, 2), 2), 1))


def _dense(x: torch.Tensor) -> torch.Tensor:
    """`x` with the strides of a new tensor: a size of 0 or 1 counts as contiguous with any, and F.grouped_mm looks at them."""
    return x.contiguous().view(-1).view(x.shape)


def _align(x: torch.Tensor, dim: int) -> torch.Tensor:
    missing = -x.shape[dim] % (ALIGNMENT // x.element_size())
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, counts, weight = ctx.saved_tensors
    needs_rows, _, needs_weight, needs_bias = ctx.needs_input_grad
    return (
        grouped_linear(grad, counts, weight.transpose(1, 2), None) if needs_rows else None,
        None,
        grouped_outer(grad, rows, counts).to(weight.dtype) if needs_weight else None,
        sum_groups(grad, counts) if needs_bias else None,
    )


# One node of ours, because the Meta of F.grouped_mm rejects float32 on CPU: fullgraph fails on the aten op itself.
grouped_linear = define(
    "grouped_linear(Tensor rows, Tensor counts, Tensor weight, Tensor? bias) -> Tensor",
    kernel=_grouped_linear,
    fake=shapes.grouped_linear,
    check=shapes.check_grouped_linear,
    backward=_linear_backward,
    setup_context=_keep_operands,
)
add_kernel("grouped_linear", _grouped_linear_on_host, "CPU")
grouped_outer = define(
    "grouped_outer(Tensor a, Tensor b, Tensor counts) -> Tensor",
    kernel=_grouped_outer,
    fake=shapes.grouped_outer,
    check=shapes.check_grouped_outer,
    backward=no_gradient,
)
add_kernel("grouped_outer", _grouped_outer_on_host, "CPU")
sum_groups = define(
    "sum_groups(Tensor x, Tensor counts) -> Tensor",
    kernel=_sum_groups,
    fake=shapes.sum_groups,
    check=shapes.check_sum_groups,
    backward=no_gradient,
)


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """``[R, 2 * I] -> [R, I]``: the gate's activation times up, by the table of `moe_ops.activations`."""
    row = activation_named(activation)
    fused = activation_for(x, row)
    if fused is not None:
        return fused(x)
    gate, up = (x[:, ::2], x[:, 1::2]) if row.alternates else x.chunk(2, dim=1)
    return row.function(gate, up)


def run_experts(
    rows: torch.Tensor,
    counts: torch.Tensor,
    experts: ExpertWeights,
    *,
    scale: torch.Tensor | None = None,
    quant: Quant = Quant.NONE,
    dtype: torch.dtype | None = None,
    is_summand: bool = False,
) -> torch.Tensor:
    """``w2 @ activation(w13 @ x)`` of each row, with the weights of its group's expert.

    With quantised weights or activations, the values that they stand for are multiplied, in float32: what a kernel of the
    format computes, but for the order of its sums. Activations are quantised before either product, and the first time only
    if they do not come with scales.

    Args:
        rows: ``[R, H]`` float32, bfloat16 or float16, or quantised; grouped by expert; rows past the last group may hold
            anything.
        counts: int64 ``[E]``, rows of each group, on the device of the rows; no more than R together, which is not checked.
        experts: w13 ``[E, 2 * I, H]``, w2 ``[E, H, I]``, of the dtype of the rows, float32 or quantised. With float32 weights
            the products are float32 whatever the rows are: for twice the memory, faster at prefill on a CPU without AMX.
        scale: scales of `rows`, if they are quantised.
        quant: what is done to activations.
        dtype: of the result; None: that of `rows`. Needed with `scale`.
        is_summand: whether the results are to be weighed and summed. Then what would be float16 is float32: a summand may be
            beyond float16 where the sum is not.

    Returns:
        ``[R, H]``; do not rely on what rows past the last group hold.

    Raises:
        ValueError: shapes do not fit each other, or no kernel reads the weights as they are packed.
        TypeError: a dtype is not supported, or differs from that of the rows.

    On a CUDA device, ``F.grouped_mm`` has a kernel for bfloat16; for other dtypes torch reads the groups on the host.

    Example: two rows for the first expert, one for the third::

        y = run_experts(rows, torch.tensor([2, 0, 1]), experts)
    """
    refuse_forward_mode("experts", (rows, experts))
    if scale is not None and (dtype is None or quant is Quant.NONE):
        raise ValueError(f"experts: dtype and quant must be given for quantised rows, got {dtype} and {quant}")
    dtype = rows.dtype if dtype is None else dtype
    result_dtype = shapes.sum_dtype(dtype) if is_summand else dtype
    run = experts_for(experts, rows, quant, dtype)
    if run is not None:
        quantized = quantize_activations(rows, quant=quant) if scale is None else (rows, scale)
        return run(*quantized, counts, experts, dtype).to(result_dtype)
    is_quantized = quant is not Quant.NONE or experts.w13_scale is not None or experts.w2_scale is not None
    product = grouped_linear if experts.layout is WeightLayout.PLAIN else product_for(experts)
    if product is None or (is_quantized and experts.layout is not WeightLayout.PLAIN):
        raise ValueError(f"experts: experts must have WeightLayout.PLAIN with {quant}, got {experts.layout}")
    if experts.layout is WeightLayout.PLAIN:
        shapes.check_experts(counts, experts.w13, experts.w2)
    hidden_size = experts.w2.shape[1]
    dtypes_13, dtypes_2 = (FLOATS, FLOATS) if is_quantized else ((rows.dtype, torch.float32), (experts.w13.dtype,))
    is_float32 = is_quantized or experts.w13.dtype is torch.float32
    x = _values(rows, scale, quant, hidden_size)
    w13 = _weight("w13", experts.w13, experts.w13_scale, hidden_size, dtypes_13, is_float32)
    x = x.to(torch.float32) if is_float32 else x
    inner = activate(product(x, counts, w13, _bias(experts.w13_bias, is_float32)), experts.activation)
    w2 = _weight("w2", experts.w2, experts.w2_scale, inner.shape[1], dtypes_2, is_float32)
    inner = _values(inner, None, quant, inner.shape[1])
    if inner.dtype is not result_dtype and inner.dtype is torch.float16 and product is grouped_linear:
        inner, is_float32 = inner.to(torch.float32), True
    return product(inner, counts, w2, _bias(experts.w2_bias, is_float32)).to(result_dtype)


def _values(x: torch.Tensor, scale: torch.Tensor | None, quant: Quant, width: int) -> torch.Tensor:
    """The values that `x` has once it is quantised (which it is already, with scales), in float32; `x` itself without."""
    if quant is Quant.NONE:
        return x
    if scale is None:
        x, scale = quantize_activations(x, quant=quant)
    return dequantize_activations(x, scale, quant=quant, hidden_size=width)


def _weight(
    name: str,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    num_inputs: int,
    dtypes: tuple[torch.dtype, ...],
    is_float32: bool,
) -> torch.Tensor:
    if scale is not None:
        return dequantize_weights(weight, scale, num_inputs=num_inputs)
    check_dtype("experts", f"{name} without {name}_scale", weight, dtypes)
    return weight.to(torch.float32) if is_float32 else weight


def _bias(bias: torch.Tensor | None, is_float32: bool) -> torch.Tensor | None:
    return bias.to(torch.float32) if is_float32 and bias is not None else bias
