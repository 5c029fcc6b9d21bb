"""The one ``torch.library.Library`` of the package, and how an op is added to it."""

from collections.abc import Callable
from typing import Any

import torch

LIB = torch.library.Library("moe_ops", "DEF")


def define(
    schema: str,
    *,
    composite: Callable[..., Any] | None = None,
    kernel: Callable[..., Any] | None = None,
    fake: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register one op and return its callable overload.

    An op that communicates passes ``composite``: compilers expand it into functional collectives, which they may order
    and overlap; autograd and the fake follow from the body. An op that computes passes ``kernel`` and ``fake`` and
    stays one node everywhere. A collective never goes into a ``kernel``: a compiler may reorder or remove such a node on
    one rank while the others wait.
    """
    if (composite is None) == (kernel is None) or (kernel is None) != (fake is None):
        raise TypeError("define: pass either composite, or kernel and fake")
    name = schema.partition("(")[0]
    LIB.define(schema, tags=torch.Tag.pt2_compliant_tag)
    if composite is not None:
        LIB.impl(name, composite, "CompositeImplicitAutograd")
    else:
        LIB.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"moe_ops::{name}", fake, lib=LIB)
    op: Callable[..., Any] = getattr(torch.ops.moe_ops, name).default
    return op
