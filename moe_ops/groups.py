"""Process groups as plain values: what an op needs of a group is its name, its size and this process's rank in it."""

from typing import NamedTuple

import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName

AXES = ("dp", "pcp", "tp")
"""Mesh axes of a stage, slowest first: EP rank = (dp_rank * PCP + pcp_rank) * TP + tp_rank."""


class Group(NamedTuple):
    """One axis of parallelism: a process group's name, its size, and this process's rank in it."""

    name: str
    size: int
    rank: int

    @classmethod
    def single(cls) -> "Group":
        """An absent axis: one rank, no process group."""
        return cls("", 1, 0)

    @classmethod
    def from_process_group(cls, group: dist.ProcessGroup | None) -> "Group":
        """The axis that `group` spans; None is an absent axis."""
        if group is None:
            return cls.single()
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"Group: group must be a ProcessGroup that this process is a member of, got {group!r}")
        return cls(group.group_name, group.size(), group.rank())


class ParallelGroups(NamedTuple):
    """The axes that a stage spans; those that are absent are single.

    EP covers DP x PCP x TP of one pipeline stage. It may also be the DP group, or the TP group, itself: then every rank of
    the other axes holds the same experts.
    """

    tp: Group = Group.single()
    dp: Group = Group.single()
    ep: Group = Group.single()
    pcp: Group = Group.single()

    @classmethod
    def from_process_groups(
        cls,
        *,
        tp: dist.ProcessGroup | None = None,
        dp: dist.ProcessGroup | None = None,
        ep: dist.ProcessGroup | None = None,
        pcp: dist.ProcessGroup | None = None,
    ) -> "ParallelGroups":
        """Read names, sizes and ranks off process groups, once; None is an absent axis.

        Example::

            groups = mo.ParallelGroups.from_process_groups(dp=dist.group.WORLD, ep=dist.group.WORLD)
        """
        return cls(
            tp=Group.from_process_group(tp),
            dp=Group.from_process_group(dp),
            ep=Group.from_process_group(ep),
            pcp=Group.from_process_group(pcp),
        )

    @classmethod
    def from_device_mesh(cls, mesh: DeviceMesh) -> "ParallelGroups":
        """Take the mesh dimensions named "dp", "pcp" and "tp" (any of them, in this order); EP is their product.

        A collective call when EP has to be made of several dimensions: every rank of the mesh calls it.

        Raises:
            ValueError: the mesh has none of the dimensions, or has them in another order.

        Example::

            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            groups = mo.ParallelGroups.from_device_mesh(mesh)
        """
        names = mesh.mesh_dim_names or ()
        axes = [name for name in names if name in AXES]
        if not axes or axes != [name for name in AXES if name in axes]:
            raise ValueError(
                f"ParallelGroups.from_device_mesh: mesh must name dimensions of {AXES} in this order, got {names}"
            )
        ep = mesh[tuple(axes)]._flatten().get_group() if len(axes) > 1 else mesh.get_group(axes[0])
        return cls.from_process_groups(ep=ep, **{name: mesh.get_group(name) for name in axes})


def check_group(op: str, axis: str, name: str, size: int, rank: int = 0) -> None:
    """Raise unless `name` is an initialised process group of `size` ranks, of which `rank` is one.

    Raises:
        RuntimeError: no process group has this name.
        ValueError: the process group has another size, or no such rank.
    """
    try:
        actual = _resolve_process_group(GroupName(name)).size()
    except (RuntimeError, KeyError, ValueError) as error:
        raise RuntimeError(
            f"{op}: {axis} group must name an initialised process group, got {name!r} of {size} ranks"
        ) from error
    if actual != size:
        raise ValueError(f"{op}: {axis} group {name!r} must have size {actual}, that of its process group, got {size}")
    if isinstance(rank, int) and not 0 <= rank < size:  # a simulation of several ranks has no single one
        raise ValueError(f"{op}: {axis} rank must be in [0, {size}), got {rank}")


# As torch.compiler.assume_constant_result does, which imports the whole compiler (2 seconds): Dynamo need not look into it.
check_group._dynamo_marked_constant = True  # type: ignore[attr-defined]
