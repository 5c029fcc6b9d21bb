"""The stage in torchair's graph mode: one call for a backend that knows the ops of this library."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch._decomp import get_decompositions
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from moe_ops._library import KERNELS, PORTABLE
from moe_ops.backends.npu_kernels import KEY
from moe_ops.dispatchers.all_to_all import NotCapturableError


def get_npu_backend(
    *, compiler_config: Any = None, custom_decompositions: dict[Any, Callable[..., Any]] | None = None
) -> Any:
    """``torchair.get_npu_backend``, for ``torch.compile(..., backend=..., fullgraph=True, dynamic=True)``.

    In the place of an op of this library that computes, its kernel is traced; an op that communicates consists of collectives.
    So the GE graph holds torch_npu's fused ops, aten ops and collectives, and no op of this library needs a converter.

    Args:
        compiler_config: a ``torchair.CompilerConfig``; None: the default.
        custom_decompositions: decompositions of further ops. Where there is one of this library, too, yours is taken.

    Raises:
        ImportError: torch_npu, which brings torchair, is not installed.

    While it compiles, Dynamo wraps errors in ``BackendCompilerFailed``. Its ``inner_exception`` is a NotCapturableError if the
    function dispatches by ALL_TO_ALL, which reads on the host; and a ValueError if a size is unbacked, because an input was
    marked (`mark_token_axes`) or the size read from a tensor: GE's graphs cannot hold such sizes.

    Example::

        layer = torch.compile(layer, backend=get_npu_backend(), fullgraph=True, dynamic=True)
    """
    import torch_npu  # noqa: F401  # which makes torchair importable
    import torchair

    _register_converters(torchair)
    table = {**decompositions(), **(custom_decompositions or {})}
    config = torchair.CompilerConfig() if compiler_config is None else compiler_config
    backend = torchair.get_npu_backend(compiler_config=config, custom_decompositions=table)

    def compile_checked(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        _check(graph, inputs)
        return backend(graph, inputs)

    return compile_checked


def _check(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Raise for what torchair cannot convert, in terms of this library."""
    nodes = [node for part in graph.modules() if isinstance(part, torch.fx.GraphModule) for node in part.graph.nodes]
    reading = {torch.ops.moe_ops.dispatch_all_to_all, torch.ops.moe_ops.exchange_counts}
    if any(getattr(node.target, "overloadpacket", None) in reading for node in nodes):
        raise NotCapturableError(
            "torchair: dispatch must be FIXED_CAPACITY, got ALL_TO_ALL, which reads its split sizes on the host"
        )
    values = [*inputs, *(node.meta.get("example_value") for node in nodes)]
    unbacked = [x for x in values if isinstance(x, torch.SymInt) and free_unbacked_symbols(x)]
    if unbacked:
        raise ValueError(
            f"torchair: sizes must be backed, got {unbacked}: compile with dynamic=True, without mark_token_axes, and read no "
            "size from a tensor"
        )


@cache
def _register_converters(torchair: Any) -> None:
    """torchair converts all arithmetic of sizes that we need, except the maximum."""
    from torchair._ge_concrete_graph.ge_apis import Maximum

    def convert_sym_max(a: Any, b: Any, meta_outputs: Any = None) -> Any:
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b)
        int64 = torchair.ge.DataType.DT_INT64
        a, b = (
            torchair.ge.Const(x, int64) if isinstance(x, int) else torchair.ge.Cast(x, dst_type=int64) for x in (a, b)
        )
        return Maximum(a, b)

    torchair.register_fx_node_ge_converter(torch.sym_max)(convert_sym_max)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """For each op of this library its kernel; for each aten op in kernels that torchair does not convert, other aten ops."""
    aten = torch.ops.aten
    return {
        **{
            getattr(torch.ops.moe_ops, name).default: partial(_run_kernel, name)
            for name, kernels in KERNELS.items()
            if PORTABLE in kernels
        },
        **get_decompositions([aten.softplus]),
        aten.sort.stable: _sort,
        aten.amax.default: _amax,
        aten.bitwise_and.Scalar: _bitwise_and,
        aten.__rshift__.Scalar: _shift_right,
        aten.__lshift__.Scalar: _shift_left,
        aten._assert_scalar.default: _drop_assertion,
    }


def _run_kernel(name: str, *args: Any, **kwargs: Any) -> Any:
    kernels = KERNELS[name]
    tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    key = KEY if tensors[0].device.type == "npu" and KEY in kernels else PORTABLE
    return kernels[key](*args, **kwargs)


def _amax(x: torch.Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> torch.Tensor:
    for axis in sorted((axis % x.dim() for axis in dim or range(x.dim())), reverse=True):
        x = torch.max(x, axis, keepdim).values
    return x


def _bitwise_and(x: torch.Tensor, other: int) -> torch.Tensor:
    return torch.bitwise_and(x, x.new_full((), other))


def _shift_right(x: torch.Tensor, places: int) -> torch.Tensor:
    return torch.div(x, 1 << places, rounding_mode="floor")


def _shift_left(x: torch.Tensor, places: int) -> torch.Tensor:
    return x * (1 << places)


def _drop_assertion(condition: Any, message: str) -> None:
    """torchair does not convert it. The sizes in its graphs are backed, so guards check the same condition before each call."""


def _sort(
    x: torch.Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """By GE's TopKV2, which puts the lower index first where values are equal."""
    values, indices = torch.topk(x.to(torch.int32) if x.dtype is torch.bool else x, x.shape[dim], dim, descending)
    return values.to(x.dtype), indices
