"""``torch.library.opcheck`` on every op at the boundary counts 0, 1, TP - 1, TP, TP + 1 and many.

All four tests for ops that compute. For ops that communicate the two that apply: ``wait_tensor`` returns its input
undeclared and so fails the schema test in torch itself.
"""

from typing import Any

import pytest
import torch
from torch.library import opcheck
from torch.utils._pytree import tree_map

from .op_cases import CASES, COMPOSITES, DIFFERENTIABLE, LEAVES, Sizes, registered_ops
from .vllm_stand_in import load_kernels

pytestmark = pytest.mark.slow

OPS = torch.ops.moe_ops
TP = 4
COUNTS = [0, 1, TP - 1, TP, TP + 1, 37]
COMPOSITE_TESTS = ("test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("op", LEAVES)
def test_leaf(op: str, num_tokens: int) -> None:
    load_kernels()
    opcheck(getattr(OPS, op).default, LEAVES[op](Sizes(num_tokens)))


@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_leaf_with_gradients(op: str, num_tokens: int) -> None:
    def leaf(x: Any) -> Any:
        return x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    opcheck(getattr(OPS, op).default, tree_map(leaf, LEAVES[op](Sizes(num_tokens))))


@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("op", COMPOSITES)
def test_composite(op: str, num_tokens: int, fake_group4: str) -> None:
    arguments = COMPOSITES[op](Sizes(num_tokens, TP, group=fake_group4))
    opcheck(getattr(OPS, op).default, arguments, test_utils=COMPOSITE_TESTS)


def test_every_op_has_a_case() -> None:
    assert registered_ops() == set(CASES)
