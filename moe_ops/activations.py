"""The activations of experts: one table, which everyone asks.

R rows, I intermediate.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from moe_ops.elementwise import each

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # of GPT-OSS


class Activation(NamedTuple):
    """One activation.

    Attributes:
        function: of gate and up, ``[R, I]`` each.
        alternates: whether gate and up stand in turn in the rows of w13, or the gate's rows come first.
        kernels: the back ends (modules of `moe_ops.backends`) whose kernels have it.
    """

    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    alternates: bool = False
    kernels: tuple[str, ...] = ()


def _silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return each(F.silu, gate) * up


def _gelu(gate: torch.Tensor, up: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    return each(partial(F.gelu, approximate=approximate), gate) * up


def _swigluoai(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * each(torch.sigmoid, gate * SWIGLU_ALPHA) * (up + 1)


ACTIVATIONS = {
    "silu": Activation(_silu, kernels=("vllm_cpu", "npu")),
    "gelu": Activation(_gelu, kernels=("vllm_cpu",)),
    "gelu_tanh": Activation(partial(_gelu, approximate="tanh"), kernels=("vllm_cpu",)),
    "swigluoai": Activation(_swigluoai, alternates=True, kernels=("vllm_cpu",)),
}
"""By the names that `ExpertWeights` and vLLM give them.

Sources: SwiGLU and GEGLU, `arXiv:2002.05202 <https://arxiv.org/abs/2002.05202>`_, equations 5 and 6; ``"swigluoai"``, the
clamped form of GPT-OSS with gate and up in turn: ``GptOssExperts`` of Transformers.
"""


def activation_named(name: str) -> Activation:
    """The row of the table.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"experts: activation must be one of {tuple(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]
