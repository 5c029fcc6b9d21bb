"""vLLM's groups of ranks as those of the stage."""

from torch._C._distributed_c10d import _register_process_group, _resolve_process_group
from vllm.distributed.parallel_state import GroupCoordinator, get_dp_group, get_ep_group, get_tp_group
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

from moe_ops.groups import Group, ParallelGroups


def groups_of(config: FusedMoEParallelConfig) -> ParallelGroups:
    """The groups that a layer spans; EP only where its experts are divided among ranks."""
    return ParallelGroups(
        tp=group_of(get_tp_group()),
        dp=group_of(get_dp_group()) if config.dp_size > 1 else Group.single(),
        ep=group_of(get_ep_group()) if config.use_ep else Group.single(),
    )


def group_of(coordinator: GroupCoordinator) -> Group:
    """A group of vLLM's, named as vLLM names it, such as ``ep:0``: torch's own names count up as groups are made, and a name is
    part of the graph that a compile cache keeps."""
    if coordinator.world_size == 1:
        return Group.single()
    name = coordinator.unique_name
    try:
        _resolve_process_group(name)
    except RuntimeError:
        _register_process_group(name, coordinator.device_group)
    return Group(name, coordinator.world_size, coordinator.rank_in_group)
