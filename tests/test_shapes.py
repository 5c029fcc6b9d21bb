"""Shape function == fake == symbolic fake == eager, for every op, over topologies of up to 64 ranks.

A fake process group stands in for the ranks: what an op returns then has the right shape and no meaning, which is what is
compared here. Values are compared on simulated and on real ranks elsewhere.
"""

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

import fake_impls.collectives
import fake_impls.dispatchers.all_to_all
import fake_impls.dispatchers.copies
import fake_impls.dispatchers.fixed_capacity
import fake_impls.dispatchers.local
import fake_impls.experts
import fake_impls.quantize
import fake_impls.route
import fake_impls.strategies.all2all
import fake_impls.strategies.allgather
import fake_impls.strategies.mc2
import moe_ops as mo
from moe_ops._library import BODIES, PORTABLE

MODULES = (
    fake_impls.collectives,
    fake_impls.dispatchers.all_to_all,
    fake_impls.dispatchers.copies,
    fake_impls.dispatchers.fixed_capacity,
    fake_impls.dispatchers.local,
    fake_impls.experts,
    fake_impls.quantize,
    fake_impls.route,
    fake_impls.strategies.all2all,
    fake_impls.strategies.allgather,
    fake_impls.strategies.mc2,
)
TOKENS = st.one_of(st.integers(0, 5), st.integers(0, 130))
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
H, E, K, I = 8, 6, 2, 3


def shape_function(op: str) -> Callable[..., Any]:
    return next(getattr(module, op) for module in MODULES if hasattr(module, op))


def as_bytes(tensors: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.view(torch.uint8) for tensor in tensors]


@st.composite
def calls(draw: Any, op: str) -> tuple[int, tuple[Any, ...]]:
    """(ranks, arguments) of a valid call of `op`. Group "0" is the group of all ranks."""
    size = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 32, 64]))
    rank, tokens, more, dtype = draw(st.integers(0, size - 1)), draw(TOKENS), draw(st.integers(0, 3)), draw(FLOATS)
    hidden, logits = torch.zeros(tokens, H, dtype=dtype), torch.zeros(tokens, E)
    ids = torch.zeros(tokens, K, dtype=torch.int32)
    chunk = -(-tokens // size)
    counts = draw(st.lists(TOKENS, min_size=size, max_size=size))
    counts[rank] = tokens
    mask = torch.zeros((chunk + more) * size, dtype=torch.bool)
    places = torch.zeros(tokens, size, dtype=torch.int64)
    x = torch.zeros(tokens, draw(st.integers(1, 70)), dtype=dtype)
    mxfp8, mxfp4 = (as_bytes(mo.quantize_activations(x, quant=quant)) for quant in (mo.Quant.MXFP8, mo.Quant.MXFP4))
    arguments: dict[str, tuple[Any, ...]] = {
        "prepare_all2all": (hidden, logits, "0", size, rank),
        "finalize_all2all": (hidden.new_zeros(chunk, H), tokens, "0", size),
        "prepare_mc2": (hidden, logits, mask if draw(st.booleans()) else None, (chunk + more) * size, "0", size, rank),
        "chunk_mc2_mask": (mask, chunk, size, rank),
        "finalize_mc2": (hidden.new_zeros(chunk + more, H), tokens, (chunk + more) * size, "0", size),
        "prepare_allgather_dp": (
            [hidden, logits],
            [0, -1],
            tokens + more,
            (tokens + more) * size + more,
            *("0", size) * 2,
        ),
        "finalize_allgather_dp": (
            hidden.new_zeros(((tokens + more) * size + more) * size, H),
            tokens,
            (tokens + more) * size,
            (tokens + more) * size + more,
            *("0", size) * 2,
        ),
        "prepare_allgather_ep": ([hidden, logits, ids], counts if more else None, "0", size, rank),
        "finalize_allgather_ep": (
            hidden.new_zeros(sum(counts) if more else tokens * size, H),
            tokens,
            counts if more else None,
            *("0", size),
        ),
        "combine_all_to_all": (
            hidden.new_zeros(sum(counts), H),
            places,
            [more if sum(counts) else 0] * size,
            counts,
            "0",
            size,
        ),
        "dispatch_fixed_capacity": ([hidden, ids, ids.float()], ids, [0, -1, 0], 2, tokens + more, "0", size),
        "combine_fixed_capacity": (hidden.new_zeros((tokens + more) * size, H), places, "0", size),
        "chunk_tokens": (ids, (chunk + more) * size, size, rank, -1),
        "all_reduce": (hidden, "0", size),
        "pack_rows": ([hidden, ids], tokens + more, [0, -1]),
        "unpack_rows": (
            torch.zeros(tokens, 12, dtype=torch.uint8),
            [ids[:2], hidden.new_zeros(3, 2, dtype=torch.half)],
        ),
        "compact_rows": (hidden.new_zeros(size * max(counts), H), counts),
        "expand_rows": (hidden.new_zeros(sum(counts), H), counts),
        "quantize_int8": (x,),
        "dequantize_int8": (x.to(torch.int8), x.float().sum(1), dtype),
        "quantize_mxfp8": (x,),
        "dequantize_mxfp8": (*mxfp8, dtype),
        "quantize_mxfp4": (x,),
        "dequantize_mxfp4": (*mxfp4, x.shape[1], dtype),
        "route": (logits.to(dtype), K, "softmax", bool(more), 1, 1, None, 1.0, None, None, None),
        "map_to_physical": (ids, torch.zeros(E, 2, dtype=torch.int64)),
        "count_expert_load": (ids, E),
        "permute_by_expert": ([hidden, ids], ids, rank, 3),
        "unpermute": (hidden.new_zeros(tokens * K, H), ids.float() if more else None, ids.long()),
        "weigh_rows": (hidden.new_zeros(tokens * K, H), ids.float(), ids.long()),
        "plan_copies": (ids, 2, size, tokens if more else None),
        "pack_copies": ([hidden, ids], places, tokens + more, [0, -1]),
        "grouped_linear": (
            hidden,
            torch.zeros(2, dtype=torch.int64),
            hidden.new_zeros(2, I, H),
            hidden.new_zeros(2, I) if more else None,
        ),
        "grouped_outer": (hidden, hidden.new_zeros(tokens, I), torch.zeros(2, dtype=torch.int64)),
        "sum_groups": (hidden, torch.zeros(2, dtype=torch.int64)),
        "spread_rows": (hidden, ids.long(), tokens + more),
        "dot_rows": (hidden, hidden.new_zeros(tokens, H), ids.new_zeros(more, K).long() - 1),
    }
    return size, pytree.tree_map(transposed, arguments[op]) if draw(st.booleans()) else arguments[op]


def transposed(leaf: Any) -> Any:
    """The same values, and not contiguous."""
    return leaf.t().contiguous().t() if isinstance(leaf, torch.Tensor) and leaf.dim() == 2 else leaf


OPS = [
    name.removeprefix("moe_ops::")
    for name in sorted(torch._C._dispatch_get_all_op_names())
    # What a ragged exchange receives is a new symbol, which only a trace has: test_compile.py. vLLM's kernel may not be here.
    if name.startswith("moe_ops::") and "dispatch_all_to_all" not in name and "vllm" not in name
]


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
    sizes = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (leaf.dim() - 1)
    is_weight = leaf.dim() == 3 or (leaf.dtype is torch.int64 and leaf.dim() == 1) or leaf.shape == (2, I)
    if is_weight or leaf.shape[0] < 2:  # a backed symbol cannot be 0 or 1; test_compile.py traces those as unbacked
        return mode.from_tensor(leaf, static_shapes=True)
    return mode.from_tensor(leaf, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
@settings(max_examples=100)
def test_shape_function_fake_and_eager_agree(op: str, data: st.DataObject) -> None:
    size, arguments = data.draw(calls(op))
    call = getattr(torch.ops.moe_ops, op).default
    with fake_ranks(size):
        eager = described(call(*arguments))
        assert described(shape_function(op)(*arguments)) == eager
        if "CPU" in BODIES.get(op, {}):  # then that was called, and not the kernel for other devices
            assert described(BODIES[op][PORTABLE](*arguments)) == eager
        with FakeTensorMode() as mode:
            fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            assert described(call(*fakes)) == eager
        with FakeTensorMode(shape_env=ShapeEnv(duck_shape=False)) as mode:
            symbolic = pytree.tree_map(lambda leaf: with_symbolic_rows(mode, leaf), arguments)
            assert described(call(*symbolic)) == eager
            assert described(shape_function(op)(*symbolic)) == eager


def test_every_op_has_a_shape_function() -> None:
    assert len(OPS) == 37
    assert all(callable(shape_function(op)) for op in OPS)


def test_a_ragged_exchange_returns_a_new_symbol_for_each_rank() -> None:
    """Its shape function needs a trace to make symbols in: it is the fake of an op that exists for this test alone."""
    library = torch.library.Library("moe_ops_test", "DEF")
    shapes = fake_impls.dispatchers.all_to_all
    for op, fake in (("dispatch", shapes.dispatch_all_to_all), ("start_dispatch", shapes.start_dispatch_all_to_all)):
        schema = str(getattr(torch.ops.moe_ops, f"{op}_all_to_all").default._schema)
        library.define(schema.removeprefix("moe_ops::"))
        torch.library.register_fake(f"moe_ops_test::{op}_all_to_all", fake, lib=library)
    real = torch.zeros(5, H), torch.zeros(5, K, dtype=torch.int32), torch.zeros(5, K)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        tensors = [mode.from_tensor(x) for x in real]
        arguments = (tensors, tensors[1], [0, -1, 0], 2, "0", 4)
        received, positions, send, receive = torch.ops.moe_ops_test.dispatch_all_to_all(*arguments)
        assert len({str(split) for split in [*send, *receive]}) == 8
        assert positions.shape == (5, 4)
        for tensor, like in zip(received, tensors, strict=True):
            assert tensor.dtype == like.dtype
            assert tensor.shape[1:] == like.shape[1:]
            assert str(tensor.shape[0]) == str(torch.sym_sum(receive))
        in_flight, *_, receive = torch.ops.moe_ops_test.start_dispatch_all_to_all(*arguments)
        assert in_flight.dtype is torch.uint8
        assert in_flight.shape[1] == 4 * H + 8 * K
        assert str(in_flight.shape[0]) == str(torch.sym_sum(receive))
