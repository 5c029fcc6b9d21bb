"""``torch.library.opcheck`` on every op at the boundary counts 0, 1, TP - 1, TP, TP + 1 and many.

All four tests for ops that compute. For ops that communicate the two that apply: ``wait_tensor`` returns its input
undeclared and so fails the schema test in torch itself.
"""

from typing import Any

import pytest
import torch
from torch.library import opcheck
from torch.utils._pytree import tree_map

import moe_ops as mo
from moe_ops.backends.vllm_cpu import ALIGNMENT

from .vllm_stand_in import load_kernels

OPS = torch.ops.moe_ops
TP = 4
COUNTS = [0, 1, TP - 1, TP, TP + 1, 37]
COMPOSITE_TESTS = ("test_autograd_registration", "test_aot_dispatch_dynamic")
H, E, K, I = 8, 6, 2, 4
ODD = 35  # a ragged block and half a byte


def ceil4(num_tokens: int) -> int:
    return -(-num_tokens // TP) * TP


def floats(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, steps=torch.Size(shape).numel()).reshape(shape)


def ids(rows: int, k: int = K) -> torch.Tensor:
    return (torch.arange(rows * k).view(rows, k) % (E + 1) - 1).to(torch.int32)


def mask(num_tokens: int) -> torch.Tensor:
    return torch.arange(ceil4(num_tokens) + TP) < num_tokens


def quantized_bytes(num_tokens: int, quant: mo.Quant) -> list[torch.Tensor]:
    return [x.view(torch.uint8) for x in mo.quantize_activations(floats(num_tokens, ODD), quant=quant)]


def places(num_tokens: int) -> torch.Tensor:
    """Which row sent is the copy of each token for each rank."""
    return torch.arange(num_tokens * TP).view(num_tokens, TP) % (num_tokens + 1) - 1


LEAF_CASES: dict[str, Any] = {
    "pack_rows": lambda t: ([floats(t, H).bfloat16(), ids(t), floats(t)], t + 2, [0, -1, 0]),
    "unpack_rows": lambda t: (torch.zeros(t, 12, dtype=torch.uint8), [ids(3), floats(3)]),
    "compact_rows": lambda t: (floats(3 * t, H), [t, 0, t // 2]),
    "expand_rows": lambda t: (floats(t + t // 2, H), [t, 0, t // 2]),
    "quantize_int8": lambda t: (floats(t, ODD),),
    "dequantize_int8": lambda t: (*mo.quantize_activations(floats(t, ODD), quant=mo.Quant.W8A8), torch.bfloat16),
    "quantize_mxfp8": lambda t: (floats(t, ODD),),
    "dequantize_mxfp8": lambda t: (*quantized_bytes(t, mo.Quant.MXFP8), torch.bfloat16),
    "quantize_mxfp4": lambda t: (floats(t, ODD),),
    "dequantize_mxfp4": lambda t: (*quantized_bytes(t, mo.Quant.MXFP4), ODD, torch.bfloat16),
    "route": lambda t: (floats(t, E), K, "sigmoid", True, 3, 2, floats(E), 2.5, torch.arange(t) < 3, None, None),
    "map_to_physical": lambda t: (ids(t), torch.tensor([[0, 3], [1, -1]] * 3)),
    "count_expert_load": lambda t: (ids(t), E),
    "permute_by_expert": lambda t: ([floats(t, H), floats(t)], ids(t), 2, 3),
    "unpermute": lambda t: (floats(t * K, H), floats(t, K), torch.arange(t * K).view(t, K) - 1),
    "weigh_rows": lambda t: (floats(t * K, H), floats(t, K), torch.arange(t * K).view(t, K) - 1),
    "plan_copies": lambda t: (ids(t), 2, 3, t // 2),
    "pack_copies": lambda t: ([floats(t, H), ids(t)], torch.arange(t * 3).view(t, 3) - 1, 3 * t, [0, -1]),
    "grouped_linear": lambda t: (floats(t, H), torch.tensor([t // 2, 0, t // 3]), floats(3, I, H), floats(3, I)),
    "grouped_outer": lambda t: (floats(t, H), floats(t, I), torch.tensor([t // 2, 0, t // 3])),
    "sum_groups": lambda t: (floats(t, H), torch.tensor([t // 2, 0, t // 3])),
    "spread_rows": lambda t: (floats(t, H), torch.arange(t * K).view(t, K) - 1, t * K + 1),
    "dot_rows": lambda t: (floats(t * K, H), -floats(t * K, H), torch.arange(t * K).view(t, K) - 1),
    "vllm_cpu_experts": lambda t: (
        *(floats(t, ALIGNMENT), ids(t), floats(t, K), 1),
        *(floats(3, 2 * ALIGNMENT, ALIGNMENT), floats(3, ALIGNMENT, ALIGNMENT), None, None),
        *("silu", False),
    ),
}
DIFFERENTIABLE = (
    *("compact_rows", "expand_rows", "route", "permute_by_expert", "unpermute", "weigh_rows", "grouped_linear"),
)
COMPOSITE_CASES: dict[str, Any] = {
    "prepare_all2all": lambda t, g: (floats(t, H), floats(t, E), g, TP, 1),
    "finalize_all2all": lambda t, g: (floats(ceil4(t) // TP, H), t, g, TP),
    "prepare_mc2": lambda t, g: (floats(t, H), floats(t, E), mask(t), ceil4(t) + TP, g, TP, 1),
    "chunk_mc2_mask": lambda t, g: (mask(t), ceil4(t) // TP, TP, 2),
    "finalize_mc2": lambda t, g: (floats(ceil4(t) // TP + 1, H), t, ceil4(t) + TP, g, TP),
    "prepare_allgather_dp": lambda t, g: ([floats(t, H), floats(t, E)], [0, 0], t + 1, TP * t + 5, g, TP, g, TP),
    "finalize_allgather_dp": lambda t, g: (floats(TP * (TP * t + 5), H), t, TP * t + 4, TP * t + 5, g, TP, g, TP),
    "prepare_allgather_ep": lambda t, g: ([floats(t, H), floats(t, E)], [3, t, 0, 5], g, TP, 1),
    "finalize_allgather_ep": lambda t, g: (floats(t + 8, H), t, [3, t, 0, 5], g, TP),
    "chunk_tokens": lambda t, g: (ids(t), ceil4(t), TP, 2, -1),
    "dispatch_all_to_all": lambda t, g: ([floats(t, H), ids(t), floats(t, K)], ids(t), [0, -1, 0], 2, g, TP),
    "start_dispatch_all_to_all": lambda t, g: ([floats(t, H), ids(t), floats(t, K)], ids(t), [0, -1, 0], 2, g, TP),
    "combine_all_to_all": lambda t, g: (floats(t + 3, H), places(t), [1, t, 0, 2], [t, 0, 3, 0], g, TP),
    "dispatch_fixed_capacity": lambda t, g: ([floats(t, H), ids(t), floats(t, K)], ids(t), [0, -1, 0], 2, t, g, TP),
    "combine_fixed_capacity": lambda t, g: (floats(TP * (t + 1), H), places(t), g, TP),
    "all_reduce": lambda t, g: (floats(t, H), g, TP),
}


@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("op", LEAF_CASES)
def test_leaf(op: str, num_tokens: int) -> None:
    load_kernels()
    opcheck(getattr(OPS, op).default, LEAF_CASES[op](num_tokens))


@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_leaf_with_gradients(op: str, num_tokens: int) -> None:
    def leaf(x: Any) -> Any:
        return x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    opcheck(getattr(OPS, op).default, tree_map(leaf, LEAF_CASES[op](num_tokens)))


@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("op", COMPOSITE_CASES)
def test_composite(op: str, num_tokens: int, fake_group4: str) -> None:
    arguments = COMPOSITE_CASES[op](num_tokens, fake_group4)
    opcheck(getattr(OPS, op).default, arguments, test_utils=COMPOSITE_TESTS)


def test_every_op_is_checked() -> None:
    registered = {name.removeprefix("moe_ops::").partition(".")[0] for name in all_ops()}
    assert registered == set(LEAF_CASES) | set(COMPOSITE_CASES)


def all_ops() -> list[str]:
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moe_ops::")]
