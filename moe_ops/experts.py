"""The experts: a gated MLP for each group of rows. R rows, E experts of this rank, H hidden, I intermediate, N outputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from fake_impls import experts as shapes
from fake_impls.checks import FLOATS, check_dtype
from moe_ops._library import add_kernel, define, no_gradient
from moe_ops.backends import npu
from moe_ops.quantize import dequantize_activations, dequantize_weights, quantize_activations
from moe_ops.types import ExpertWeights, Quant, WeightLayout

ALIGNMENT = 16  # bytes; F.grouped_mm rejects rows that are no multiple of it
VECTOR = 32  # elements; a multiple of what one step of a vector loop takes
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # of GPT-OSS


def _grouped_linear(
    rows: torch.Tensor, counts: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    shapes.check_grouped_linear(rows, counts, weight, bias)
    ends_E = counts.cumsum(0, dtype=torch.int32)
    outputs = weight.shape[1]
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
    shapes.check_grouped_linear(rows, counts, weight, bias)
    num_rows, outputs, used = rows.shape[0], weight.shape[1], int(counts.sum())
    ends_E = counts.cumsum(0, dtype=torch.int32)
    result_UN = F.grouped_mm(_dense(_align(rows[:used], 1)), _operand(weight), offs=ends_E)
    if bias is not None:
        result_UN[:, :outputs] += bias.repeat_interleave(counts, dim=0)
    if result_UN.shape == (num_rows, outputs):
        return result_UN
    result_RN = rows.new_empty(num_rows, outputs)
    result_RN[:used] = result_UN[:, :outputs]
    result_RN[used:] = 0
    return result_RN


def _grouped_outer(a: torch.Tensor, b: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    shape = shapes.grouped_outer(a, b, counts).shape
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
    shapes.sum_groups(x, counts)
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
        grouped_outer(grad, rows, counts) if needs_weight else None,
        sum_groups(grad, counts) if needs_bias else None,
    )


# One node of ours, because the Meta of F.grouped_mm rejects float32 on CPU: fullgraph fails on the aten op itself.
grouped_linear = define(
    "grouped_linear(Tensor rows, Tensor counts, Tensor weight, Tensor? bias) -> Tensor",
    kernel=_grouped_linear,
    fake=shapes.grouped_linear,
    backward=_linear_backward,
    setup_context=_keep_operands,
)
add_kernel("grouped_linear", _grouped_linear_on_host, "CPU")
grouped_outer = define(
    "grouped_outer(Tensor a, Tensor b, Tensor counts) -> Tensor",
    kernel=_grouped_outer,
    fake=shapes.grouped_outer,
    backward=no_gradient,
)
add_kernel("grouped_outer", _grouped_outer_on_host, "CPU")
sum_groups = define(
    "sum_groups(Tensor x, Tensor counts) -> Tensor",
    kernel=_sum_groups,
    fake=shapes.sum_groups,
    backward=no_gradient,
)


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """``[R, 2 * I] -> [R, I]``: the gate's activation times up.

    Sources: SwiGLU and GEGLU, `arXiv:2002.05202 <https://arxiv.org/abs/2002.05202>`_, equations 5 and 6; ``"swigluoai"``, the
    clamped form of GPT-OSS with gate and up in turn: ``GptOssExperts`` of Transformers.
    """
    if activation not in shapes.ACTIVATIONS:
        raise ValueError(f"experts: activation must be one of {shapes.ACTIVATIONS}, got {activation!r}")
    if activation == "silu" and npu.is_on_npu(x):
        return npu.swiglu(x)
    if activation == "swigluoai":
        gate, up = x[:, ::2].clamp(max=SWIGLU_LIMIT), x[:, 1::2].clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        return gate * _each(torch.sigmoid, gate * SWIGLU_ALPHA) * (up + 1)
    gate, up = x.chunk(2, dim=1)
    if activation == "silu":
        return _each(F.silu, gate) * up
    return _each(partial(F.gelu, approximate="tanh" if activation == "gelu_tanh" else "none"), gate) * up


def _each(function: Callable[[torch.Tensor], torch.Tensor], x_RI: torch.Tensor) -> torch.Tensor:
    """A function of each element, of which none depends on where it stands.

    torch's vector loops leave the last few elements to scalar code that rounds in another way, so that a row's values would
    depend on how many rows there are.
    """
    missing = -x_RI.shape[1] % VECTOR if x_RI.device.type == "cpu" else 0
    padded = F.pad(x_RI, (0, missing)) if missing else x_RI.contiguous()
    return function(padded)[:, : x_RI.shape[1]]


def run_experts(
    rows: torch.Tensor,
    counts: torch.Tensor,
    experts: ExpertWeights,
    *,
    scale: torch.Tensor | None = None,
    quant: Quant = Quant.NONE,
    dtype: torch.dtype | None = None,
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

    Returns:
        ``[R, H]``; rows past the last group hold nothing to rely on: zero from the portable kernels, anything from an NPU's.

    Raises:
        ValueError: shapes do not fit each other, or the weights are packed.
        TypeError: a dtype is not supported, or differs from that of the rows.

    On a CUDA device, ``F.grouped_mm`` has a kernel for bfloat16; for other dtypes torch reads the groups on the host.
    """
    if scale is not None and (dtype is None or quant is Quant.NONE):
        raise ValueError(f"experts: dtype and quant must be given for quantised rows, got {dtype} and {quant}")
    dtype = rows.dtype if dtype is None else dtype
    if npu.is_on_npu(rows) and npu.can_run_quantized_experts(experts, quant, dtype):
        quantized = quantize_activations(rows, quant=quant) if scale is None else (rows, scale)
        return npu.run_quantized_experts(*quantized, counts, experts, dtype)
    if experts.layout is WeightLayout.NPU and quant is Quant.NONE and experts.w13_scale is None:
        inner = activate(npu.grouped_linear(rows, counts, experts.w13, experts.w13_bias), experts.activation)
        return npu.grouped_linear(inner, counts, experts.w2, experts.w2_bias)
    if experts.layout is not WeightLayout.PLAIN:
        raise ValueError(f"experts: experts must have WeightLayout.PLAIN with {quant}, got {experts.layout}")
    shapes.check_experts(counts, experts.w13, experts.w2)
    hidden_size = experts.w2.shape[1]
    is_quantized = quant is not Quant.NONE or experts.w13_scale is not None or experts.w2_scale is not None
    is_float32 = is_quantized or experts.w13.dtype is torch.float32
    x = _values(rows, scale, quant, hidden_size)
    w13 = _weight("w13", experts.w13, experts.w13_scale, hidden_size, is_quantized)
    x = x.to(torch.float32) if is_float32 else x
    inner = activate(grouped_linear(x, counts, w13, _bias(experts.w13_bias, is_float32)), experts.activation)
    w2 = _weight("w2", experts.w2, experts.w2_scale, inner.shape[1], is_quantized)
    inner = _values(inner, None, quant, inner.shape[1])
    output = grouped_linear(inner, counts, w2, _bias(experts.w2_bias, is_float32))
    result: torch.Tensor = output.to(dtype)
    return result


def _values(x: torch.Tensor, scale: torch.Tensor | None, quant: Quant, width: int) -> torch.Tensor:
    """The values that `x` has once it is quantised (which it is already, with scales), in float32; `x` itself without."""
    if quant is Quant.NONE:
        return x
    if scale is None:
        x, scale = quantize_activations(x, quant=quant)
    return dequantize_activations(x, scale, quant=quant, hidden_size=width)


def _weight(
    name: str, weight: torch.Tensor, scale: torch.Tensor | None, num_inputs: int, is_quantized: bool
) -> torch.Tensor:
    if scale is not None:
        return dequantize_weights(weight, scale, num_inputs=num_inputs)
    check_dtype("experts", f"{name} without {name}_scale", weight, FLOATS)
    return weight.to(torch.float32) if is_quantized else weight


def _bias(bias: torch.Tensor | None, is_float32: bool) -> torch.Tensor | None:
    return bias.to(torch.float32) if is_float32 and bias is not None else bias
