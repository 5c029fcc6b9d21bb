"""Shape function == fake == symbolic fake == eager, for every op, over topologies of up to 64 ranks.

A fake process group stands in for the ranks: what an op returns then has the right shape and no meaning, which is what is
compared here. Values are compared on simulated and on real ranks elsewhere.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from hypothesis import given, settings
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fake_impls
from moe_ops._library import KERNELS, PORTABLE

from .op_cases import CASES, E, H, K, Sizes

MODULES = [importlib.import_module(found.name) for found in pkgutil.walk_packages(fake_impls.__path__, "fake_impls.")]
TOKENS = st.one_of(st.integers(0, 5), st.integers(0, 130))
# What a ragged exchange receives is a new symbol, which only a trace has. vLLM's kernel may not be here.
OPS = [op for op in CASES if op not in ("exchange_counts", "dispatch_all_to_all", "vllm_cpu_experts")]


def shape_function(op: str) -> Callable[..., Any]:
    return next(getattr(module, op) for module in MODULES if hasattr(module, op))


@st.composite
def sizes(draw: Any) -> Sizes:
    ranks = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 32, 64]))
    return Sizes(
        draw(TOKENS),
        ranks,
        rank=draw(st.integers(0, ranks - 1)),
        more=draw(st.integers(0, 3)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        width=draw(st.integers(1, 70)),
    )


def transposed(leaf: Any) -> Any:
    """The same values, and not contiguous."""
    return leaf.t().contiguous().t() if isinstance(leaf, torch.Tensor) and leaf.dim() == 2 else leaf


@contextmanager
def fake_ranks(size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def described(result: Any) -> list[Any]:
    """Shape, dtype and stride of tensors; integers as they are."""
    leaves = pytree.tree_leaves(list(result) if isinstance(result, tuple) else result)
    return [describe(leaf) for leaf in leaves]


def describe(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return [plain(size) for size in leaf.shape], leaf.dtype, [plain(stride) for stride in leaf.stride()]
    return plain(leaf)


def plain(value: int | torch.SymInt) -> int:
    return value.node.hint if isinstance(value, torch.SymInt) and value.node.hint is not None else int(value)


def with_symbolic_rows(mode: FakeTensorMode, leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    symbolic = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (leaf.dim() - 1)
    # Weights, biases, tables and counts of experts keep their sizes.
    is_weight = leaf.dim() == 3 or (leaf.shape[0] in (3, E) and leaf.dim() < 3 and leaf.shape != (leaf.shape[0], H))
    if is_weight or leaf.shape[0] < 2:  # a backed symbol cannot be 0 or 1; test_compile.py traces those as unbacked
        return mode.from_tensor(leaf, static_shapes=True)
    return mode.from_tensor(leaf, symbolic_context=StatelessSymbolicContext(dynamic_sizes=symbolic))


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@given(drawn=sizes(), is_strided=st.booleans())
@settings(max_examples=40)
def test_shape_function_fake_and_eager_agree(op: str, drawn: Sizes, is_strided: bool) -> None:
    arguments = CASES[op](drawn)
    arguments = pytree.tree_map(transposed, arguments) if is_strided else arguments
    call = getattr(torch.ops.moe_ops, op).default
    with fake_ranks(drawn.ranks):
        eager = described(call(*arguments))
        assert described(shape_function(op)(*arguments)) == eager
        if "CPU" in KERNELS.get(op, {}):  # then that was called, and not the kernel for other devices
            assert described(KERNELS[op][PORTABLE](*arguments)) == eager
        with FakeTensorMode() as mode:
            fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            assert described(call(*fakes)) == eager
        with FakeTensorMode(shape_env=ShapeEnv(duck_shape=False)) as mode:
            symbolic = pytree.tree_map(lambda leaf: with_symbolic_rows(mode, leaf), arguments)
            assert described(call(*symbolic)) == eager
            assert described(shape_function(op)(*symbolic)) == eager


def test_every_op_has_a_shape_function() -> None:
    assert all(callable(shape_function(op)) for op in CASES)


def test_a_ragged_exchange_returns_a_new_symbol_for_each_rank() -> None:
    """Its shape function needs a trace to make symbols in: it is the fake of an op that exists for this test alone."""
    library = torch.library.Library("moe_ops_test", "DEF")
    for op in ("exchange_counts", "dispatch_all_to_all"):
        library.define(str(getattr(torch.ops.moe_ops, op).default._schema).removeprefix("moe_ops::"))
        torch.library.register_fake(f"moe_ops_test::{op}", shape_function(op), lib=library)
    real = torch.zeros(5, H), torch.zeros(5, K, dtype=torch.int32), torch.zeros(5, K)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        tensors = [mode.from_tensor(x) for x in real]
        positions, send, receive = torch.ops.moe_ops_test.exchange_counts(tensors[1], 2, "0", 4)
        assert len({str(split) for split in [*send, *receive]}) == 8
        assert positions.shape == (5, 4)
        received, positions, send, receive = torch.ops.moe_ops_test.dispatch_all_to_all(tensors, 2, "0", 4)
        assert len({str(split) for split in [*send, *receive]}) == 8
        assert positions.shape == (5, 4)
        for tensor, like in zip(received, tensors, strict=True):
            assert tensor.dtype == like.dtype
            assert tensor.shape[1:] == like.shape[1:]
            assert str(tensor.shape[0]) == str(torch.sym_sum(receive))
