"""A stand-in for vLLM's CPU kernels where vLLM is not installed: the same schemas, plain arithmetic.

What it packs, nothing else can read; and where the real kernel would read out of bounds, it raises.
"""

import torch
import torch.nn.functional as F

from moe_ops.backends import vllm_cpu

LIB = torch.library.Library("_C", "FRAGMENT")
SCHEMAS = (
    "cpu_fused_moe(Tensor(a0!) output, Tensor input, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias,"
    " Tensor topk_weights, Tensor topk_id, bool skip_weighted, str act, str isa) -> ()",
    "prepack_moe_weight(Tensor weight, Tensor(a1!) packed_weight, str isa) -> ()",
)


def load_kernels() -> None:
    """vLLM's where they are installed, else the stand-in."""
    if not vllm_cpu.load():
        if not hasattr(torch.ops._C, "cpu_fused_moe"):
            install()
        vllm_cpu.load = lambda: True


def install() -> None:
    for schema in SCHEMAS:
        LIB.define(schema)
    LIB.impl("cpu_fused_moe", _experts, "CPU")
    LIB.impl("prepack_moe_weight", _pack, "CPU")


def _pack(weight: torch.Tensor, packed_weight: torch.Tensor, isa: str) -> None:
    packed_weight.copy_(weight.flip(0, 1, 2))


def _experts(output, x_NH, w13, w2, b13, b2, topk_weights, topk_ids, skip_weighted, act, isa) -> None:
    assert topk_ids.dtype == torch.int32 and topk_weights.dtype == torch.float32
    tensors = (output, x_NH, w13, w2, b13, b2, topk_weights, topk_ids)
    assert all(tensor.is_contiguous() for tensor in tensors if tensor is not None)
    assert int(topk_ids.min()) >= 0 and int(topk_ids.max()) < w13.shape[0]
    w13, w2 = (weight.flip(0, 1, 2).double() for weight in (w13, w2))
    total_NH = torch.zeros(output.shape, dtype=torch.float64)
    for row, ids_K in enumerate(topk_ids.tolist()):
        for choice, expert in enumerate(ids_K):
            gated = w13[expert] @ x_NH[row].double() + (0 if b13 is None else b13[expert].double())
            gate, up = gated.chunk(2)
            if act == "swigluoai":
                gate, up = gated[::2].clamp(max=7), gated[1::2].clamp(-7, 7) + 1
                active = gate * torch.sigmoid(1.702 * gate)
            else:
                active = (
                    F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh" if "tanh" in act else "none")
                )
            result = w2[expert] @ (active * up) + (0 if b2 is None else b2[expert].double())
            total_NH[row] += result * (1.0 if skip_weighted else topk_weights[row, choice])
    output.copy_(total_NH)
