"""Which strategy on Ascend: the rules that vllm-ascend publishes for each family of devices, for plans.

Pure functions of what is known beforehand, with limits as constants: nothing here asks a device.
"""

import enum
from typing import NamedTuple

from fake_impls.layout import rows_per_rank
from moe_ops.types import Dispatch, Strategy


class DeviceFamily(enum.Enum):
    """Families of Ascend devices that have rules of their own."""

    A2 = "a2"
    A3 = "a3"
    A5 = "a5"
    ASCEND_310P = "310p"


MC2_ROWS = {DeviceFamily.A2: 256, DeviceFamily.A3: 512, DeviceFamily.A5: 512}
"""Rows of a rank that MC2 can take. A2, A3: the limits of the kernel (``BS`` in torch_npu's page of
``npu_moe_distribute_dispatch``, https://gitcode.com/Ascend/op-plugin, ``docs/context``); A5: vllm-ascend's, which uses 512 on
A2, too (``set_mc2_tokens_capacity``)."""

MEGA_MOE_ROWS = 4096
"""Likewise, of CANN's MegaMoe (vllm-ascend)."""

A2_MIN_EP, A2_MAX_LOCAL_EXPERTS = 16, 24
"""MC2 on A2 (vllm-ascend's ``select_moe_comm_method``)."""
FUSED_MC2_MAX_EP, MEGA_MOE_MAX_EP = 32, 64
"""Fused MC2 on A3 (likewise)."""


class RuleChoice(NamedTuple):
    """What the published rule of a device family says."""

    strategy: Strategy
    dispatch: Dispatch
    reason: str


def mc2_capacity(device: DeviceFamily, num_tokens: int, *, tp_size: int, has_mega_moe: bool = False) -> int:
    """Tokens of a TP group that MC2 is set up for: `num_tokens`, in equal chunks of no more rows than the kernel takes.

    Args:
        device: its family; not 310P, which has no MC2.
        num_tokens: the most that a TP group is meant to bring to MC2. vllm-ascend takes ``max_num_batched_tokens`` if prefill
            uses MC2, else the largest size that graphs are captured for, else ``max_num_reqs * uniform_decode_query_len``.
        tp_size: ranks of TP.
        has_mega_moe: whether CANN's MegaMoe is there and enabled.

    Raises:
        ValueError: `num_tokens` or `tp_size` is out of range, or the device has no MC2.

    Example: 1024 tokens, and no more::

        mc2_capacity(DeviceFamily.A2, 1030, tp_size=4)
    """
    if device not in MC2_ROWS:
        raise ValueError(f"mc2_capacity: device must be one with MC2, got {device.name}")
    if num_tokens < 0:
        raise ValueError(f"mc2_capacity: num_tokens must be at least 0, got {num_tokens}")
    if tp_size < 1:
        raise ValueError(f"mc2_capacity: tp_size must be at least 1, got {tp_size}")
    limit = MEGA_MOE_ROWS if has_mega_moe else MC2_ROWS[device]
    return min(rows_per_rank(num_tokens, tp_size), limit) * tp_size


def select_by_device(
    device: DeviceFamily,
    *,
    num_tokens: int | None,
    capacity: int,
    num_experts: int,
    top_k: int,
    ep_size: int,
    world_size: int,
    has_lora: bool = False,
    has_fused_mc2: bool = False,
    has_mega_moe: bool = False,
) -> RuleChoice:
    """What vllm-ascend chooses on a device family (its main branch of August 2026, ``select_moe_comm_method``).

    Its fused MC2, which holds the experts, too, becomes MC2 here: this library has no fused form.

    Args:
        device: the family.
        num_tokens: the largest count of any DP rank; None, not known, is held to fit.
        capacity: tokens of a TP group that MC2 holds: `mc2_capacity`.
        num_experts: E.
        top_k: K.
        ep_size: ranks of EP; 1 where there is none.
        world_size: all ranks, those of all DP ranks and pipeline stages.
        has_lora: whether adapters are served.
        has_fused_mc2: A3: whether fused MC2 is enabled.
        has_mega_moe: A3: whether it is CANN's MegaMoe.

    Raises:
        ValueError: a size is out of range.

    Example::

        capacity = mc2_capacity(DeviceFamily.A3, 512, tp_size=1)
        sizes = {"num_experts": 256, "top_k": 8, "ep_size": 32, "world_size": 32}
        choice = select_by_device(DeviceFamily.A3, num_tokens=512, capacity=capacity, **sizes)
    """
    sizes = {"num_experts": num_experts, "top_k": top_k, "ep_size": ep_size, "world_size": world_size}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"select_by_device: {name} must be at least 1, got {size}")
    for name, count in {"num_tokens": num_tokens or 0, "capacity": capacity}.items():
        if count < 0:
            raise ValueError(f"select_by_device: {name} must be at least 0, got {count}")
    if ep_size == 1:
        return _allgather("no expert parallelism")
    if has_lora:
        return _all2all("LoRA with expert parallelism")
    if device is DeviceFamily.ASCEND_310P:
        return _allgather("310P has no other")
    is_fitting = num_tokens is None or num_tokens <= capacity
    tokens = f"{num_tokens} tokens {'fit' if is_fitting else 'do not fit'} in MC2's capacity of {capacity}"
    if device is DeviceFamily.A2:
        return _select_on_a2(is_fitting, tokens, num_experts // ep_size, ep_size)
    max_fused_ep = MEGA_MOE_MAX_EP if has_mega_moe else FUSED_MC2_MAX_EP
    if device is DeviceFamily.A3 and has_fused_mc2 and ep_size <= max_fused_ep:
        return _mc2(f"fused MC2 takes any count up to EP {max_fused_ep}, EP is {ep_size} (not fused in this library)")
    if is_fitting:  # on A5 also world_size > 1, which an EP group implies
        return _mc2(tokens)
    if device is DeviceFamily.A5 and world_size <= top_k:
        return _allgather(f"{tokens}, and {world_size} ranks are no more than top-k = {top_k}")
    return _all2all(tokens)


def _select_on_a2(is_fitting: bool, tokens: str, num_local_experts: int, ep_size: int) -> RuleChoice:
    if num_local_experts > A2_MAX_LOCAL_EXPERTS:
        return _allgather(f"{num_local_experts} experts a rank are more than {A2_MAX_LOCAL_EXPERTS}")
    if ep_size < A2_MIN_EP:
        return _allgather(f"EP {ep_size} is less than {A2_MIN_EP}")
    return _mc2(tokens) if is_fitting else _allgather(tokens)


def _allgather(reason: str) -> RuleChoice:
    return RuleChoice(Strategy.ALLGATHER, Dispatch.LOCAL, reason)


def _all2all(reason: str) -> RuleChoice:
    return RuleChoice(Strategy.ALL2ALL, Dispatch.ALL_TO_ALL, reason)


def _mc2(reason: str) -> RuleChoice:
    return RuleChoice(Strategy.MC2, Dispatch.FIXED_CAPACITY, reason)
