"""Simulated ranks: one process computes what every rank of a topology would, on a fake process group."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed._local_tensor import LocalIntNode, LocalTensor, LocalTensorMode

import moe_ops as mo

from .ranks import coordinates


class World(NamedTuple):
    """A [DP, PCP, TP] layout of simulated ranks; each group's rank is the rank of each of them."""

    dp: int
    pcp: int
    tp: int
    groups: mo.ParallelGroups

    @property
    def size(self) -> int:
        return self.dp * self.pcp * self.tp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        return coordinates(rank, self.pcp, self.tp)

    def tensor(self, per_rank: list[torch.Tensor]) -> Any:
        return LocalTensor({rank: tensor.clone() for rank, tensor in enumerate(per_rank)})


def local(value: Any, rank: int) -> Any:
    """What one simulated rank holds of a tensor or an integer."""
    if isinstance(value, LocalTensor):
        return value._local_tensors[rank]
    if isinstance(value, torch.SymInt):
        return value.node._local_ints[rank] if isinstance(value.node, LocalIntNode) else int(value)
    return value


@contextmanager
def simulated_world(dp: int, pcp: int, tp: int) -> Iterator[World]:
    size = dp * pcp * tp
    dist.init_process_group("fake", rank=0, world_size=size)
    try:
        mesh = dist.init_device_mesh("cpu", (dp, pcp, tp), mesh_dim_names=("dp", "pcp", "tp"))
        groups = mo.ParallelGroups.from_device_mesh(mesh)

        def with_ranks(group: mo.Group, axis: int | None) -> mo.Group:
            ranks = {r: r if axis is None else coordinates(r, pcp, tp)[axis] for r in range(size)}
            return group._replace(rank=torch.SymInt(LocalIntNode(ranks)))

        groups = mo.ParallelGroups(
            tp=with_ranks(groups.tp, 2),
            dp=with_ranks(groups.dp, 0),
            ep=with_ranks(groups.ep, None),
            pcp=with_ranks(groups.pcp, 1),
        )
        with LocalTensorMode(size):
            yield World(dp, pcp, tp, groups)
    finally:
        dist.destroy_process_group()
