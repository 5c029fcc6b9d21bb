"""The stage in torchair's graph mode: which operators GE gets, and with which attributes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from moe_ops.backends.npu_mc2 import hccl_communicator
from tests.device_graphs import TOP_K, E

from . import STAND_IN
from .expected_graphs import EXPECTED, EXPECTED_ON_A5
from .ge_graphs import GeGraph, Node
from .layers import A5_LAYERS, LAYERS, RANKS, computing_types, graph_of

IS_A5 = STAND_IN.chip.startswith("Ascend950")
TABLE = EXPECTED_ON_A5 if IS_A5 else EXPECTED
ALL_LAYERS = {**LAYERS, **A5_LAYERS}
of_any_chip = pytest.mark.skipif(IS_A5, reason="the same for all chips, so it runs once")


class Made(NamedTuple):
    """The graph of a form, with a symbol for the token count, and the names of its communicators."""

    graph: GeGraph
    world: str
    tp: str


_made: dict[str, Made] = {}


@pytest.fixture
def made(hccl_groups: Callable[..., dict[int, dist.ProcessGroup]]) -> Callable[[str], Made]:
    """The graph of a form, by name; made once for all tests, which takes seconds."""

    def make(name: str) -> Made:
        if name not in _made:
            hccl_groups(sizes=())
            layer = ALL_LAYERS[name]
            groups = layer.groups()
            tp = hccl_communicator(groups.tp.name, 0)
            _made[name] = Made(graph_of(layer, groups), hccl_communicator(groups.ep.name, groups.ep.rank), tp)
        return _made[name]

    return make


@pytest.mark.parametrize("name", TABLE)
def test_the_graph_holds_what_is_expected_and_nothing_else(made: Callable[[str], Made], name: str) -> None:
    assert computing_types(made(name).graph) == TABLE[name]


@pytest.mark.parametrize("name", ["mc2-w4a8", "mc2-mxfp4"] if IS_A5 else ["mc2-w4a8", "mc2-weighed"])
def test_what_no_fused_op_does_is_converted_too(made: Callable[[str], Made], name: str) -> None:
    types = made(name).graph.types
    assert types.count("GroupedMatmul") == 2
    assert ("MoeDistributeDispatchV2" in types) == (name == "mc2-w4a8")
    assert types.count("HcomAllToAllV") == (0 if name == "mc2-w4a8" else 2)


def attributes(node: Node, names: str) -> list[Any]:
    return [node.attributes[name] for name in names.split()]


def test_dispatch_and_combine_know_their_group_and_their_halves(made: Callable[[str], Made]) -> None:
    graph, world, tp = made("mc2-tp")
    axis = "group_ep ep_world_size ep_rank_id moe_expert_num group_tp tp_world_size tp_rank_id global_bs"
    dispatch, combine = graph.node("MoeDistributeDispatchV2"), graph.node("MoeDistributeCombineV2")
    for node in (dispatch, combine):
        assert attributes(node, axis) == [world, RANKS, 0, E, world, 1, 0, 0]
    assert attributes(dispatch, "quant_mode expert_token_nums_type shared_expert_rank_num") == [0, 1, 0]
    # x, expert_ids, scales, x_active_mask, expert_scales
    assert [source is not None for source in dispatch.sources[:5]] == [True, True, False, True, IS_A5]
    # What the kernel made for its other half is what that gets: outputs 2 (assist info), 4 and 5 (counts), 6 (scales).
    edges = [edge for op in graph.definition.op if op.type == combine.type for edge in op.input]
    taken = {int(edge.rpartition(":")[2]) for edge in edges if edge.startswith(f"{dispatch.name}:")}
    assert taken == ({2, 4, 5, 6} if IS_A5 else {2, 4, 5})
    assert graph.node("HcomAllGather").attributes["group"] == tp != world  # the chunks are gathered over TP


@pytest.mark.parametrize("name", ["mc2-w8a8"] + ["mc2-mxfp8"] * IS_A5)
def test_dispatch_quantises_on_the_way(made: Callable[[str], Made], name: str) -> None:
    dispatch = made(name).graph.node("MoeDistributeDispatchV2")
    int8, e4m3 = 2, 36  # GE's numbers
    expected = [2, int8] if name == "mc2-w8a8" else [4, e4m3]
    assert attributes(dispatch, "quant_mode y_dtype") == expected


@of_any_chip
def test_gating_has_the_groups_of_the_model(made: Callable[[str], Made]) -> None:
    gating = made("mc2-deepseek").graph.node("MoeGatingTopK")
    names = "k k_group group_count group_select_mode norm_type renorm out_flag routed_scaling_factor"
    assert attributes(gating, names) == [TOP_K, 2, 4, 1, 1, 0, True, 1.0]
    assert gating.sources[1] is not None  # the bias


@of_any_chip
def test_local_dispatch_is_bounded_by_constants(made: Callable[[str], Made]) -> None:
    graph = made("allgather-dp").graph
    local = E // RANKS
    names = "active_num expert_num active_expert_range expert_tokens_num_type expert_tokens_num_flag row_idx_type quant_mode"
    assert attributes(graph.node("MoeInitRoutingV3"), names) == [-1, local + 1, [0, local], 1, True, 0, -1]
    assert graph.node("MoeFinalizeRoutingV2").attributes["drop_pad_mode"] == 2
    for product in graph.nodes("GroupedMatmul"):
        assert attributes(product, "split_item group_type group_list_type") == [2, 0, 1]


@of_any_chip
def test_ragged_counts_may_be_symbols(made: Callable[[str], Made]) -> None:
    """That of each other rank is the larger of a size and 0, and the longest of all the larger of two, again and again."""
    larger = made("allgather-ep-ragged").graph.nodes("Maximum")
    assert [node.inputs for node in larger] == [("Cast", "Const")] * (RANKS - 1) + [("Cast", "Cast")] * (RANKS - 1)
    assert all(len(set(node.sources)) == 2 for node in larger)
