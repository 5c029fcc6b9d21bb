"""The one ``torch.library.Library`` of the package, and how an op is added to it."""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, TypeAlias, TypeVar

import torch
from torch.autograd import forward_ad

T = TypeVar("T")
Wait: TypeAlias = Callable[[], T]
"""Waits for a collective that was issued, and returns what arrived."""

LIB = torch.library.Library("moe_ops", "DEF")

KERNELS: dict[str, dict[str, Callable[..., Any]]] = {}
"""The kernels of each op that computes, by dispatch key, without the op's check."""

PORTABLE = "CompositeExplicitAutograd"
"""The key of kernels for any device: of functional aten ops alone, and without host reads, so that a compiler may trace them in
place of the op."""

_checks: dict[str, Callable[..., None] | None] = {}


def define(
    schema: str,
    *,
    composite: Callable[..., Any] | None = None,
    kernel: Callable[..., Any] | None = None,
    key: str = PORTABLE,
    fake: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register one op and return its callable overload.

    An op that communicates passes ``composite``: compilers expand it into functional collectives, which they may order
    and overlap; autograd and the fake follow from the body. An op that computes passes ``kernel`` and ``fake`` and stays one
    node everywhere; `key` says for which devices the kernel is, and `add_kernel` adds those for others. One whose result
    depends smoothly on an argument passes its ``backward``, too, and what that saves (``torch.library.register_autograd``). A
    collective never goes into a ``kernel``: a compiler may reorder or remove such a node on one rank while the others wait.

    ``check`` takes the arguments of the op and raises if they are wrong. It runs before the composite, before every kernel and
    before the fake, so none of them has to.
    """
    if (composite is None) == (kernel is None) or (kernel is None) != (fake is None):
        raise TypeError("define: pass either composite, or kernel and fake")
    name = schema.partition("(")[0]
    _checks[name] = check
    LIB.define(schema, tags=torch.Tag.pt2_compliant_tag)
    if composite is not None:
        LIB.impl(name, _checked(name, composite), "CompositeImplicitAutograd")
    if kernel is not None and fake is not None:
        add_kernel(name, kernel, key)
        torch.library.register_fake(f"moe_ops::{name}", _checked(name, fake), lib=LIB)
    if backward is not None:
        torch.library.register_autograd(f"moe_ops::{name}", backward, setup_context=setup_context, lib=LIB)
    op: Callable[..., Any] = getattr(torch.ops.moe_ops, name).default
    return op


def add_kernel(name: str, kernel: Callable[..., Any], key: str) -> None:
    """Register one more kernel of an op that computes, for the devices of a dispatch key."""
    LIB.impl(name, _checked(name, kernel), key)
    KERNELS.setdefault(name, {})[key] = kernel


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    check = _checks[name]

    @wraps(function)
    def run(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            refuse_forward_mode(name, args)
        if check is not None:
            check(*args)
        return function(*args)

    return run


def blocking(step: Callable[..., Wait[T]]) -> Callable[..., T]:
    """The function that runs a step to its end: for the ``composite`` of the op that is the step."""

    @wraps(step)
    def run(*args: Any) -> T:
        return step(*args)()

    return run


def refuse_forward_mode(op: str, arguments: Iterable[Any]) -> None:
    """Raise if an argument has a tangent: the ops have no formula for it, and torch would go on with zeros, in silence."""
    if forward_ad._current_level < 0:  # nobody differentiates in forward mode
        return
    tensors = torch.utils._pytree.tree_leaves(list(arguments))
    if any(isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            f"{op}: arguments must have no tangents (forward-mode differentiation, torch.func.jvp), got one that has: "
            "differentiate in reverse mode"
        )


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A value that an op has made, as its result: of the dtype and, as the fakes say, contiguous. May be `x` itself."""
    # Where nothing is cast, `to` ignores the format; and `contiguous` keeps the strides of sizes of 0 and 1.
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes is known to be true; a compiler need not know, and no guard is added."""
    if isinstance(condition, bool) and not torch.compiler.is_dynamo_compiling():  # under Dynamo symbols pass for bool
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # 0.7 seconds that eager code does without

    return statically_known_true(condition)


def needs_gradient(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether autograd records what is done to these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def no_gradient(ctx: Any, *grads: torch.Tensor) -> None:
    """The backward of an op that has none: an error is better than a gradient that is missing."""
    raise RuntimeError(
        "moe_ops: quantised activations, quantised or packed weights, and gradients themselves have no gradient"
    )
