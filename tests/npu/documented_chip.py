"""CPU tensors treated as an NPU's, so that the lowerings call the documented kernels."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ops._library import KERNELS, PORTABLE
from moe_ops.backends import npu, npu_experts, npu_kernels, npu_mc2

from . import documented_exchange, documented_experts  # noqa: F401  # their kernels
from .documented import Chip, calls
from .documented_exchange import communicators

A3, A5 = 250, 260


class LowerLeaves(TorchDispatchMode):
    """Each op of the library that has a kernel for NPUs runs it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "moe_ops" and npu_kernels.KEY in KERNELS.get(name, {}):
            calls[f"moe_ops.{name}"] += 1
            return KERNELS[name][npu_kernels.KEY](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def communicator_of(group: str, rank: int) -> str:
    """Another name than that of the group, as HCCL's is."""
    name = f"communicator of {group}"
    communicators[name] = _resolve_process_group(group)
    return name


@contextmanager
def on_chip(soc_version: int) -> Iterator[None]:
    """All tensors are an NPU's of this chip; `calls` starts anew."""
    with ExitStack() as stack:
        for module in (npu, npu_experts, npu_mc2):
            stack.enter_context(patch.object(module, "is_on_npu", lambda x: True))
            stack.enter_context(patch.object(module, "soc_version", lambda: soc_version))
        stack.enter_context(patch.object(npu_mc2, "hccl_communicator", communicator_of))
        stack.enter_context(patch.object(Chip, "soc_version", soc_version))
        stack.enter_context(torch.no_grad())
        stack.enter_context(LowerLeaves())
        calls.clear()
        yield


def lowered(name: str, *args: Any, chip: int = A3, op: str | None) -> Any:
    """What an op's kernel for NPUs returns, which has to call the vendor's, or none."""
    with on_chip(chip):
        result = KERNELS[name][npu_kernels.KEY](*args)
        assert set(calls) == {op} - {None}
    return result


def portable(name: str, *args: Any) -> Any:
    return KERNELS[name][PORTABLE](*args)
