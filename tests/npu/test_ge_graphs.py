"""The stage in torchair's graph mode: which operators GE gets, with which attributes, and what it cannot get."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torchair
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import moe_ops as mo
from moe_ops import Dispatch, Strategy
from moe_ops.backends.npu_mc2 import hccl_communicator
from moe_ops.dispatchers import dispatch
from moe_ops.dispatchers.all_to_all import NotCapturableError
from moe_ops.groups import Group
from moe_ops.integrations.torchair import get_npu_backend
from moe_ops.route import route
from tests.device_graphs import TOP_K, E, Form, H, make_stage

from . import STAND_IN
from .conftest import forget_graphs, made_graphs
from .expected_graphs import EXPECTED, EXPECTED_ON_A5
from .ge_graphs import GeGraph, Node
from .layers import A5_LAYERS, LAYERS, RANKS, Layer, make_inputs
from .stand_in import StandIn

COPIES_AND_CONSTANTS = {"Fill", "Identity"}
IS_A5 = STAND_IN.chip.startswith("Ascend950")
TABLE = EXPECTED_ON_A5 if IS_A5 else EXPECTED
ALL_LAYERS = {**LAYERS, **A5_LAYERS}
Compile = Callable[..., tuple[Any, GeGraph]]
Groups = Callable[..., dict[int, dist.ProcessGroup]]


def backend(**options: Any) -> Callable[..., Any]:
    config = torchair.CompilerConfig()
    config.debug.run_eagerly = True
    return get_npu_backend(compiler_config=config, **options)


def graph_of(ge: Compile, layer: Layer, groups: mo.ParallelGroups, num_tokens: int = 6) -> GeGraph:
    with torch.no_grad():
        output, graph = ge(make_stage(layer.form, groups, "npu"), *make_inputs(num_tokens), backend=backend())
    assert (output.shape, output.dtype, output.device.type) == ((num_tokens, H), torch.bfloat16, "npu")
    return graph


class Made(NamedTuple):
    """The graph of a form, with a symbol for the token count, and the names of its communicators."""

    graph: GeGraph
    world: str
    tp: str


_made: dict[str, Made] = {}


@pytest.fixture
def made(ge: Compile, hccl_groups: Groups) -> Callable[[str], Made]:
    """The graph of a form, by name; made once for all tests, which takes seconds."""

    def make(name: str) -> Made:
        if name not in _made:
            hccl_groups(sizes=())
            layer = ALL_LAYERS[name]
            groups = layer.groups()
            graph = graph_of(ge, layer, groups)
            tp = hccl_communicator(groups.tp.name, 0)
            _made[name] = Made(graph, hccl_communicator(groups.ep.name, groups.ep.rank), tp)
        return _made[name]

    return make


@pytest.mark.parametrize("name", TABLE)
def test_the_graph_holds_what_is_expected_and_nothing_else(made: Callable[[str], Made], name: str) -> None:
    found = [kind for kind in made(name).graph.compute_types if kind not in COPIES_AND_CONSTANTS]
    assert " ".join(found) == TABLE[name]


@pytest.mark.parametrize("name", ["mc2-w4a8", "mc2-weighed", "mc2-mxfp4"] if IS_A5 else ["mc2-w4a8", "mc2-weighed"])
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


def test_gating_has_the_groups_of_the_model(made: Callable[[str], Made]) -> None:
    gating = made("mc2-deepseek").graph.node("MoeGatingTopK")
    names = "k k_group group_count group_select_mode norm_type renorm out_flag routed_scaling_factor"
    assert attributes(gating, names) == [TOP_K, 2, 4, 1, 1, 0, True, 1.0]
    assert gating.sources[1] is not None  # the bias


def test_local_dispatch_is_bounded_by_constants(made: Callable[[str], Made]) -> None:
    graph = made("allgather-dp").graph
    local = E // RANKS
    names = "active_num expert_num active_expert_range expert_tokens_num_type expert_tokens_num_flag row_idx_type quant_mode"
    assert attributes(graph.node("MoeInitRoutingV3"), names) == [-1, local + 1, [0, local], 1, True, 0, -1]
    assert graph.node("MoeFinalizeRoutingV2").attributes["drop_pad_mode"] == 2
    for product in graph.nodes("GroupedMatmul"):
        assert attributes(product, "split_item group_type group_list_type") == [2, 0, 1]


@pytest.mark.parametrize("name", ["mc2-tp", "allgather-dp", "allgather-ep"])
def test_one_graph_serves_many_counts(hccl_groups: Groups, name: str) -> None:
    hccl_groups(sizes=())
    layer = LAYERS[name]
    stage = make_stage(layer.form, layer.groups(), "npu")
    compiled = torch.compile(stage, backend=backend(), fullgraph=True, dynamic=True)
    counter = torch._dynamo.utils.counters["stats"]
    counter.clear()
    with torch.no_grad():
        assert [compiled(*make_inputs(count)).shape[0] for count in (6, 10, 34, 258)] == [6, 10, 34, 258]
    assert counter["unique_graphs"] == 1


def test_ragged_counts_may_be_symbols(made: Callable[[str], Made]) -> None:
    """That of each other rank is the larger of a size and 0, and the longest of all the larger of two, again and again."""
    larger = made("allgather-ep-ragged").graph.nodes("Maximum")
    assert [node.inputs for node in larger] == [("Cast", "Const")] * (RANKS - 1) + [("Cast", "Cast")] * (RANKS - 1)
    assert all(len(set(node.sources)) == 2 for node in larger)


def compile_and_call(
    function: Callable[..., Any], *inputs: torch.Tensor, made_by: Any = None, dynamic: bool = True
) -> None:
    made_by = backend() if made_by is None else made_by
    with torch.no_grad():
        torch.compile(function, backend=made_by, fullgraph=True, dynamic=dynamic)(*inputs)


def stage_of(layer: Layer) -> Callable[..., Any]:
    return make_stage(layer.form, layer.groups(), "npu")


def reading_stage() -> Callable[..., Any]:
    return stage_of(Layer(Form(Strategy.ALL2ALL, Dispatch.ALL_TO_ALL)))


def reading_dispatch() -> Callable[..., Any]:
    ep = Group.from_process_group(dist.group.WORLD)

    def run(hidden_states: torch.Tensor, router_logits: torch.Tensor, mc2_mask: torch.Tensor) -> torch.Tensor:
        weights, ids = route(router_logits, mo.Routing(TOP_K, E))
        return dispatch(
            hidden_states, ids, weights, kind=Dispatch.ALL_TO_ALL, num_local_experts=E // RANKS, ep=ep
        ).local.rows

    return run


def reading_subgraph() -> Callable[..., Any]:
    run = reading_dispatch()
    return lambda *inputs: checkpoint(run, *inputs, use_reentrant=False)


@pytest.mark.parametrize("make", [reading_stage, reading_dispatch, reading_subgraph])
def test_a_host_read_is_our_error(hccl_groups: Groups, make: Callable[[], Callable[..., Any]]) -> None:
    hccl_groups(sizes=())
    with pytest.raises(BackendCompilerFailed, match="dispatch must be FIXED_CAPACITY, got ALL_TO_ALL") as raised:
        compile_and_call(make(), *make_inputs(6))
    assert isinstance(raised.value.inner_exception, NotCapturableError)


@pytest.mark.parametrize("name", ["mc2", "allgather-dp"])
def test_an_unbacked_size_is_our_error(hccl_groups: Groups, name: str) -> None:
    hccl_groups(sizes=())
    inputs = make_inputs(6)
    mo.mark_token_axes(*inputs)
    with pytest.raises(BackendCompilerFailed, match=r"torchair: sizes must be backed, got \[u0") as raised:
        compile_and_call(stage_of(LAYERS[name]), *inputs)
    assert isinstance(raised.value.inner_exception, ValueError)


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_a_size_read_from_a_tensor_is_our_error() -> None:
    def read(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(count.item()) + 1

    with pytest.raises(BackendCompilerFailed, match=r"torchair: sizes must be backed, got \[u0") as raised:
        compile_and_call(read, torch.ones(2).npu(), torch.tensor(3).npu())
    assert isinstance(raised.value.inner_exception, ValueError)


def test_decompositions_of_ones_own_are_added_and_come_first(ge: Compile) -> None:
    aten = torch.ops.aten
    own = {
        aten.relu.default: aten.abs,  # which has none here
        aten.amax.default: lambda x, dim, keepdim=False: aten.sum.dim_IntList(x, dim, keepdim),
    }
    _, graph = ge(
        lambda x: (x.relu(), x.amax(1), x.int() << 1),
        torch.ones(4, 4).npu(),
        backend=backend(custom_decompositions=own),
    )
    assert graph.compute_types == ["Abs", "ReduceSum", "Cast", "Mul", "Cast"]


def test_without_our_backend_there_is_no_converter(hccl_groups: Groups) -> None:
    hccl_groups(sizes=())
    with pytest.raises(Exception, match="No AscendIR Route was found"):
        compile_and_call(stage_of(LAYERS["mc2"]), *make_inputs(6), made_by=torchair.get_npu_backend(), dynamic=False)


def test_more_rows_than_mc2_takes_are_exchanged_by_the_portable_ops(stand_in: StandIn, hccl_groups: Groups) -> None:
    hccl_groups(sizes=())
    stage = stage_of(LAYERS["mc2"])
    with torch.no_grad():
        launched = {rows: stand_in.launches_during(lambda rows=rows: stage(*make_inputs(rows))) for rows in (512, 513)}
    assert {rows: any("MoeDistribute" in name for name in names) for rows, names in launched.items()} == {
        512: True,
        513: False,
    }


def test_a_guard_tells_the_rows_that_mc2_takes(hccl_groups: Groups) -> None:
    hccl_groups(sizes=())
    forget_graphs()
    compiled = torch.compile(stage_of(LAYERS["mc2"]), backend=backend(), fullgraph=True, dynamic=True)
    with torch.no_grad():
        assert [compiled(*make_inputs(count)).shape[0] for count in (6, 512, 513, 700)] == [6, 512, 513, 700]
    by_mc2, portable = made_graphs()
    assert "MoeDistributeDispatchV2" in by_mc2.types and "HcomAllToAllV" not in by_mc2.types
    assert "MoeDistributeDispatchV2" not in portable.types and portable.types.count("HcomAllToAllV") == 2


def test_unknown_counts_beyond_mc2_are_an_error_when_the_code_runs(hccl_groups: Groups) -> None:
    """They are held to fit, by a guard, which no other graph could satisfy."""
    hccl_groups(sizes=())
    compiled = torch.compile(stage_of(LAYERS["mc2"]), backend="aot_eager", fullgraph=True)
    counter = torch._dynamo.utils.counters["stats"]
    counter.clear()

    def run(count: int) -> None:
        inputs = make_inputs(count)
        mo.mark_token_axes(*inputs)
        with torch.no_grad():
            compiled(*inputs)

    run(6)
    run(512)
    assert counter["unique_graphs"] == 1
    with pytest.raises(AssertionError, match="<= 512"):
        run(513)


def test_a_mutated_input_is_written(ge: Compile, hccl_groups: Groups) -> None:
    """What a user's function does to a mask before the stage reaches the caller's tensor and the dispatch."""
    hccl_groups(sizes=())
    layer = LAYERS["mc2"]
    stage = make_stage(layer.form, layer.groups(), "npu")

    def mutate(hidden_states: torch.Tensor, router_logits: torch.Tensor, mc2_mask: torch.Tensor) -> torch.Tensor:
        mc2_mask.logical_not_()
        return stage(hidden_states, router_logits, mc2_mask)

    with torch.no_grad():
        _, graph = ge(mutate, *make_inputs(6), backend=backend())
    assert "LogicalNot" in graph.node("NetOutput").inputs  # a result, which is copied into the caller's mask
    # and what says which rows are active, of which all have a use.
    is_active, is_usable = graph.nodes("LogicalAnd")
    assert "LogicalNot" in is_active.inputs
    assert is_usable.inputs == ("Unsqueeze", "LogicalNot")
