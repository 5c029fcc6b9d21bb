"""A process in which vllm-ascend's real source runs without an NPU, beside vLLM.

torch_npu is a stand-in: its names exist and do nothing, but for the grouped product of the experts, which is plain arithmetic
here. Ops that vllm-ascend registers for NPU tensors are registered for CPU tensors, too, with vllm-ascend's own functions. No
kernel of Ascend's runs.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SOURCE = Path(os.environ.get("MOE_OPS_VLLM_ASCEND", Path(__file__).parents[2] / ".venv-vllm-ascend"))
"""Where vllm-ascend is installed (`pip install --target`), apart from vLLM, which would take it for its platform."""

STANDS_IN_FOR = ("torch_npu", "fla_npu", "scipy")
"""Packages of mocks: those for Ascend, and one of vllm-ascend's requirements that vLLM has not."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds these packages and whatever is in them: modules of mocks."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        is_ours = name.partition(".")[0] in STANDS_IN_FOR
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_ours else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__version__ = "1.17.0"  # numba asks scipy's
        module.__getattr__ = lambda name: _mock(spec.name, name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _mock(module: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return mock.MagicMock(name=f"{module}.{name}")


_LIBRARIES: list[torch.library.Library] = []


def stand_in_for_torch_npu() -> None:
    sys.meta_path.insert(0, _Finder())
    torch.npu = mock.MagicMock(name="torch.npu")
    torch.npu.current_device.return_value = torch.device("cpu")
    torch.Tensor.npu = lambda self: self
    library = torch.library.Library("npu", "FRAGMENT")
    library.define(
        "npu_grouped_matmul(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor? group_list=None,"
        " int split_item=0, int group_type=-1, int group_list_type=0) -> Tensor[]"
    )
    library.impl("npu_grouped_matmul", _grouped_products, "CPU")
    _LIBRARIES.append(library)


def _grouped_products(
    x: Sequence[torch.Tensor], weight: Sequence[torch.Tensor], bias: Any = None, group_list: Any = None, **how: int
) -> list[torch.Tensor]:
    """NaN in the rows past the last group, which the kernel leaves as they were."""
    counts = group_list if how["group_list_type"] == 1 else group_list.diff(prepend=group_list.new_zeros(1))
    output = torch.full((x[0].shape[0], weight[0].shape[2]), torch.nan)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        output[start : start + count] = x[0][start : start + count] @ weight[0][expert]
        start += count
    return [output]


def prepare_process() -> None:
    """Import vLLM, with vllm-ascend beside it but not as its platform, and let vllm-ascend register its ops and layers."""
    if "vllm_ascend" in sys.modules:
        return
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", MOE_OPS_VLLM="1")
    os.environ["VLLM_DIST_IDENT"] = str(os.getpid())  # not the same on all ranks: gloo instead of shared memory
    from vllm.platforms import current_platform

    assert current_platform.is_cpu()
    sys.path.append(str(SOURCE))
    stand_in_for_torch_npu()
    from vllm_ascend.ops import register_custom_ops as ops
    from vllm_ascend.utils import register_ascend_customop

    register_ascend_customop()

    _leave_out_dispatchers()
    _as_on_a_platform_out_of_tree()
    library = torch.library.Library("vllm", "IMPL")
    library.impl("maybe_all_gather_and_maybe_unpad", ops._maybe_all_gather_and_maybe_unpad_impl, "CPU")
    library.impl("maybe_pad_and_reduce", ops._maybe_pad_and_reduce_impl, "CPU")
    library.impl("maybe_all_reduce_tensor_model_parallel", ops._maybe_all_reduce_tensor_model_parallel_impl, "CPU")
    library.impl("maybe_all_reduce_shared_expert", ops._maybe_all_reduce_shared_expert_impl, "CPU")
    _LIBRARIES.append(library)


def _leave_out_dispatchers() -> None:
    """Those of vllm-ascend's methods ask for HCCL's communicators when they are made; no step of theirs runs here."""
    from vllm_ascend.ops.fused_moe import moe_comm_method as module

    for name in ("AllGather", "All2AllV", "MC2"):
        setattr(module, f"TokenDispatcherWith{name}", lambda **arguments: types.SimpleNamespace())


def _as_on_a_platform_out_of_tree() -> None:
    """vLLM's method for plain experts asks for a kernel, and a platform such as Ascend's has none of vLLM's."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    method.select_unquantized_moe_backend = lambda moe_config: (UnquantizedMoeBackend.OOT, None)
