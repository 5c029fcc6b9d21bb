"""The one ``torch.library.Library`` of the package, and how an op is added to it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

LIB = torch.library.Library("moe_ops", "DEF")

BODIES: dict[str, dict[str, Callable[..., Any]]] = {}
"""The kernels of each op that computes, by dispatch key."""

PORTABLE = "CompositeExplicitAutograd"
"""The key of kernels for any device: of functional aten ops alone, and without host reads, so that a compiler may trace them in
place of the op."""


def define(
    schema: str,
    *,
    composite: Callable[..., Any] | None = None,
    kernel: Callable[..., Any] | None = None,
    key: str = PORTABLE,
    fake: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register one op and return its callable overload.

    An op that communicates passes ``composite``: compilers expand it into functional collectives, which they may order
    and overlap; autograd and the fake follow from the body. An op that computes passes ``kernel`` and ``fake`` and stays one
    node everywhere; `key` says for which devices it is. One whose result depends smoothly on an argument passes its
    ``backward``, too, and what that saves (``torch.library.register_autograd``). A collective never goes into a ``kernel``: a
    compiler may reorder or remove such a node on one rank while the others wait.
    """
    if (composite is None) == (kernel is None) or (kernel is None) != (fake is None):
        raise TypeError("define: pass either composite, or kernel and fake")
    name = schema.partition("(")[0]
    LIB.define(schema, tags=torch.Tag.pt2_compliant_tag)
    if composite is not None:
        LIB.impl(name, composite, "CompositeImplicitAutograd")
    if kernel is not None:
        add_kernel(name, kernel, key)
        torch.library.register_fake(f"moe_ops::{name}", fake, lib=LIB)
    if backward is not None:
        torch.library.register_autograd(f"moe_ops::{name}", backward, setup_context=setup_context, lib=LIB)
    op: Callable[..., Any] = getattr(torch.ops.moe_ops, name).default
    return op


def add_kernel(name: str, kernel: Callable[..., Any], key: str) -> None:
    """Register one more kernel of an op that computes, for the devices of a dispatch key."""
    LIB.impl(name, kernel, key)
    BODIES.setdefault(name, {})[key] = kernel


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A value that an op has made, as its result: of the dtype and, as the fakes say, contiguous. May be `x` itself."""
    # Where nothing is cast, `to` ignores the format; and `contiguous` keeps the strides of sizes of 0 and 1.
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def needs_gradient(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether autograd records what is done to these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def no_gradient(ctx: Any, *grads: torch.Tensor) -> None:
    """The backward of an op that has none: an error is better than a gradient that is missing."""
    raise RuntimeError(
        "moe_ops: quantised activations, quantised or packed weights, and gradients themselves have no gradient"
    )
