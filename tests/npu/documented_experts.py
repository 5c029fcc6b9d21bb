"""What the pages of the ops of the experts say that they compute; as `documented`, whose legend holds here, too."""

from typing import Any

import torch

from .documented import (
    ASCEND_950,
    BLOCK,
    E4M3_GRID,
    E8M0_BIAS,
    E8M0_NAN,
    FLOATS,
    OUTPUTS,
    Chip,
    documents,
    int8_rows,
    mx_rows,
    require,
    unwritten,
)

E8M0 = 293  # torch_npu's number of the dtype


def mx_values(elements: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """``[..., K] e4m3, [..., K / 64, 2] bytes -> [..., K]`` in float64."""
    byte = pairs.flatten(-2).repeat_interleave(BLOCK, dim=-1)[..., : elements.shape[-1]]
    scale = torch.where(byte == E8M0_NAN, torch.nan, 2.0 ** (byte.double() - E8M0_BIAS))
    return elements.view(torch.float8_e4m3fn).double() * scale


def silu_times(x_MN: torch.Tensor) -> torch.Tensor:
    gate, up = x_MN.double().tensor_split(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@documents
def npu_swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    require("npu_swiglu", dim == -1 and input.dtype in FLOATS, "float16, bfloat16 or float32")
    require("npu_swiglu", input.shape[dim] % 2 == 0, "an even number of columns")
    return silu_times(input).to(input.dtype)


def groups_of_rows(op: str, group_list: torch.Tensor, list_type: int, num_experts: int, num_rows: int) -> list[range]:
    """The rows of each expert."""
    require(op, group_list.dtype is torch.int64 and group_list.shape == (num_experts,), "an int64 group list [E]")
    require(
        op, list_type in (0, 1) and (list_type == 0 or num_experts != 1), "a cumulative list where it has one entry"
    )
    ends = group_list.cumsum(0) if list_type == 1 else group_list
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    require(op, (ends >= starts).all() and ends[-1] <= num_rows, "groups that follow one another, within the rows")
    return [range(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


@documents
def npu_grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    *,
    bias: list[torch.Tensor] | None = None,
    scale: list[torch.Tensor] | None = None,
    per_token_scale: list[torch.Tensor] | None = None,
    group_list: torch.Tensor | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    output_dtype: int | None = None,
    scale_dtype: int | None = None,
    per_token_scale_dtype: int | None = None,
    **options: Any,
) -> list[torch.Tensor]:
    op = "npu_grouped_matmul"
    (rows,), (weight_EKN,) = x, weight
    require(
        op, group_list is not None and split_item in (2, 3) and group_type == 0 and not options, "a group list here"
    )
    require(
        op, rows.dim() == 2 and rows.is_contiguous() and rows.dtype is weight_EKN.dtype, "rows of the weight's dtype"
    )
    require(op, weight_EKN.dim() == 3 and weight_EKN.shape[1] == rows.shape[1], "a weight [E, K, N]")
    num_experts, _, num_outputs = weight_EKN.shape
    dtype = rows.dtype if output_dtype is None else OUTPUTS[output_dtype]
    per_row = torch.ones(len(rows), dtype=torch.float64)
    x_MK, w_EKN, per_column_EN = rows.double(), weight_EKN.double(), torch.ones(num_experts, num_outputs)
    if rows.dtype is torch.int8:
        (column_scale,), (row_scale,) = scale or [], per_token_scale or []
        expected = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}[dtype]
        require(op, column_scale.dtype is expected, f"scales of {expected} for results of {dtype}")
        require(op, column_scale.shape == (num_experts, num_outputs) and bias is None, "scales [E, N] here")
        require(op, row_scale.dtype is torch.float32 and row_scale.shape == (len(rows),), "float32 per_token_scale [M]")
        per_row, per_column_EN = row_scale.double(), column_scale
    elif rows.dtype is torch.float8_e4m3fn:
        (weight_pairs,), (row_pairs,) = scale or [], per_token_scale or []
        require(op, Chip.soc_version >= ASCEND_950 and dtype in FLOATS and bias is None, "a chip of A5")
        x_MK, w_EKN = mx_operands(op, rows, row_pairs, weight_EKN, weight_pairs, scale_dtype, per_token_scale_dtype)
    else:
        require(
            op,
            scale is None and per_token_scale is None and dtype is rows.dtype,
            "no scales, and the dtype of the rows",
        )
        bias_dtype = torch.float32 if rows.dtype is torch.bfloat16 else rows.dtype
        require(op, bias is None or bias[0].dtype is bias_dtype, f"a bias of {bias_dtype} with rows of {rows.dtype}")
    result = unwritten((len(rows), num_outputs), dtype)
    for expert, group in enumerate(groups_of_rows(op, group_list, group_list_type, num_experts, len(rows))):
        part = slice(group.start, group.stop)
        y_GN = x_MK[part] @ w_EKN[expert] * per_column_EN[expert].double() * per_row[part, None]
        result[part] = (y_GN if bias is None else y_GN + bias[0][expert].double()).to(dtype)
    return [result]


def mx_operands(
    op: str,
    rows: torch.Tensor,
    row_pairs: torch.Tensor,
    weight_EKN: torch.Tensor,
    weight_pairs: torch.Tensor,
    *scale_dtypes: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both operands in float64. Scales are bytes of e8m0: ``[M, K / 64, 2]`` of rows, ``[E, K / 64, N, 2]`` of the weight."""
    num_experts, num_inputs, num_outputs = weight_EKN.shape
    pairs = -(-num_inputs // (2 * BLOCK))
    require(op, scale_dtypes == (E8M0, E8M0), "to be told that bytes are e8m0")
    require(op, row_pairs.dtype is weight_pairs.dtype is torch.uint8, "bytes")
    require(op, row_pairs.shape == (len(rows), pairs, 2), "scales [M, K / 64, 2] of the rows")
    require(op, weight_pairs.shape == (num_experts, pairs, num_outputs, 2), "scales [E, K / 64, N, 2] of the weight")
    weight_ENK = mx_values(weight_EKN.transpose(1, 2).contiguous(), weight_pairs.transpose(1, 2))
    return mx_values(rows, row_pairs), weight_ENK.transpose(1, 2)


@documents
def npu_grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    weight_scale: list[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    *,
    dequant_mode: int = 0,
    quant_mode: int = 0,
    quant_dtype: int = 1,
    weight_scale_dtype: int | None = None,
    x_scale_dtype: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    op = "npu_grouped_matmul_swiglu_quant_v2"
    (weight_EKN,), (scale,) = weight, weight_scale
    num_experts, _, num_outputs = weight_EKN.shape
    require(op, x.dim() == 2 and x.dtype is weight_EKN.dtype and not options, "rows of the weight's dtype")
    if x.dtype is torch.int8:
        require(op, (dequant_mode, quant_mode, quant_dtype) == (0, 0, 1), "scales of rows and columns with int8")
        require(op, scale.dtype is torch.float32 and scale.shape == (num_experts, num_outputs), "float32 scales [E, N]")
        require(op, x_scale.dtype is torch.float32 and x_scale.shape == (len(x),), "float32 scales [M]")
        x_MK, w_EKN = x.double() * x_scale.double().unsqueeze(1), weight_EKN.double() * scale.double().unsqueeze(1)
        result, result_scale = unwritten((len(x), num_outputs // 2), torch.int8), unwritten((len(x),), torch.float32)
    else:
        require(op, Chip.soc_version >= ASCEND_950, "a chip of A5")
        require(op, (dequant_mode, quant_mode) == (2, 2) and OUTPUTS[quant_dtype] is x.dtype, "the MX modes with e4m3")
        x_MK, w_EKN = mx_operands(op, x, x_scale, weight_EKN, scale, weight_scale_dtype, x_scale_dtype)
        result = unwritten((len(x), num_outputs // 2), torch.uint8)
        result_scale = unwritten((len(x), -(-num_outputs // 2 // (2 * BLOCK)), 2), torch.uint8)
    for expert, group in enumerate(groups_of_rows(op, group_list, 0, num_experts, len(x))):
        part = slice(group.start, group.stop)
        if not group:
            continue
        inner_GI = silu_times(x_MK[part] @ w_EKN[expert])
        if x.dtype is torch.int8:
            result[part], result_scale[part] = int8_rows(inner_GI)
        else:
            codes, bytes_GB = mx_rows(inner_GI, E4M3_GRID, 8)
            result[part], result_scale[part] = codes, bytes_GB.unflatten(1, (-1, 2))
    return result if x.dtype is torch.int8 else result.view(torch.float8_e4m3fn), result_scale


@documents
def npu_format_cast(input: torch.Tensor, acl_format: int, **options: Any) -> torch.Tensor:
    """The same values in another order in memory, which a CPU has not."""
    fractal_nz = 29
    require("npu_format_cast", acl_format == fractal_nz and input.dtype is torch.int8, "FRACTAL_NZ, and int8 here")
    return input.clone()
