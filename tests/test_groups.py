"""Groups, read off real process groups of four gloo ranks."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import moe_ops as mo

from .ranks import RankPool, coordinates, groups_of

LAYOUTS = [(2, 1, 2), (1, 2, 2), (2, 2, 1), (1, 1, 4), (4, 1, 1)]


def sums_over_groups(rank: int, dp: int, pcp: int, tp: int) -> dict[str, tuple[int, int, float]]:
    """Size and rank in each group, and the sum of its members' global ranks: who they are."""
    found = {}
    for axis, group in groups_of(dp, pcp, tp)._asdict().items():
        total = torch.ops.moe_ops.all_reduce(torch.tensor(float(rank)), group.name, group.size)
        found[axis] = (group.size, group.rank, total.item())
    return found


@pytest.mark.parametrize(("dp", "pcp", "tp"), LAYOUTS, ids=str)
def test_device_mesh(ranks4: RankPool, dp: int, pcp: int, tp: int) -> None:
    for rank, found in enumerate(ranks4.run(sums_over_groups, dp, pcp, tp)):
        d, p, t = coordinates(rank, pcp, tp)
        places = {other: coordinates(other, pcp, tp) for other in range(4)}
        members = {
            "dp": [other for other, place in places.items() if place[1:] == (p, t)],
            "pcp": [other for other, place in places.items() if (place[0], place[2]) == (d, t)],
            "tp": [other for other, place in places.items() if place[:2] == (d, p)],
            "ep": [0, 1, 2, 3],
        }
        for axis, others in members.items():
            assert found[axis] == (len(others), others.index(rank), sum(others)), axis


def tp_group_of_a_process_group(rank: int) -> mo.ParallelGroups:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return mo.ParallelGroups.from_process_groups(tp=pairs[rank // 2], ep=dist.group.WORLD)


def test_process_groups(ranks4: RankPool) -> None:
    for rank, groups in enumerate(ranks4.run(tp_group_of_a_process_group)):
        assert groups.tp[1:] == (2, rank % 2)
        assert groups.ep[1:] == (4, rank)
        assert groups.dp == groups.pcp == mo.Group.single() == ("", 1, 0)


def errors_of_meshes(rank: int) -> list[str]:
    messages = []
    for names in (("x", "y"), ("tp", "dp")):
        with pytest.raises(ValueError, match="mesh must name") as error:
            mo.ParallelGroups.from_device_mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=names))
        messages.append(str(error.value))
    return messages


def test_a_mesh_without_the_dimensions_or_in_another_order(ranks4: RankPool) -> None:
    for unknown, reordered in ranks4.run(errors_of_meshes):
        assert "got ('x', 'y')" in unknown
        assert "got ('tp', 'dp')" in reordered


def test_a_group_of_which_this_process_is_no_member() -> None:
    with pytest.raises(TypeError, match="group must be a ProcessGroup that this process is a member of"):
        mo.Group.from_process_group(dist.GroupMember.NON_GROUP_MEMBER)
