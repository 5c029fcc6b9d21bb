"""The stage compiled by torchair: which calls one graph serves, and what is an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchair
from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError
from torch.utils.checkpoint import checkpoint

import moe_ops as mo
from moe_ops import Dispatch, Strategy
from moe_ops.dispatchers import dispatch
from moe_ops.dispatchers.all_to_all import NotCapturableError
from moe_ops.groups import Group
from moe_ops.route import route
from tests.device_graphs import TOP_K, E, Form

from .conftest import forget_graphs, made_graphs
from .expected_graphs import EXPECTED
from .ge_graphs import GeGraph
from .layers import LAYERS, RANKS, Layer, backend, computing_types, graph_of, make_inputs, stage_of
from .stand_in import StandIn

Compile = Callable[..., tuple[Any, GeGraph]]
Groups = Callable[..., dict[int, dist.ProcessGroup]]


@torch._dynamo.config.patch(specialize_float=False)
def test_symbols_for_floats_make_the_same_graph(hccl_groups: Groups) -> None:
    """Dynamo's default: it makes them, and traces all of it again, since they have to be constants."""
    hccl_groups(sizes=())
    layer = LAYERS["mc2-deepseek"]
    assert computing_types(graph_of(layer, layer.groups())) == EXPECTED["mc2-deepseek"]


def test_lengths_are_checked_at_every_call(hccl_groups: Groups) -> None:
    """By guards: assertions are dropped."""
    hccl_groups(sizes=())
    compiled = torch.compile(stage_of(LAYERS["mc2-tp"]), backend=backend(), fullgraph=True, dynamic=True)
    with torch.no_grad():
        assert compiled(*make_inputs(26, 28)).shape[0] == 26
        with pytest.raises(TorchRuntimeError, match=r"Eq\(Mod\(s\d+, 2\), 0\)"):  # the mask's rows and TP
            compiled(*make_inputs(30, 35))
        with pytest.raises(TorchRuntimeError, match=r"\(s\d+ <= s\d+"):  # the tokens and the mask's rows
            compiled(*make_inputs(30, 28))


def compile_and_call(
    function: Callable[..., Any], *inputs: torch.Tensor, made_by: Any = None, dynamic: bool = True
) -> None:
    made_by = backend() if made_by is None else made_by
    with torch.no_grad():
        torch.compile(function, backend=made_by, fullgraph=True, dynamic=dynamic)(*inputs)


def reading_stage() -> Callable[..., Any]:
    return stage_of(Layer(Form(Strategy.ALL2ALL, Dispatch.ALL_TO_ALL)))


def reading_dispatch() -> Callable[..., Any]:
    ep = Group.from_process_group(dist.group.WORLD)

    def run(hidden_states: torch.Tensor, router_logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
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
    stage = stage_of(LAYERS["mc2"])

    def mutate(hidden_states: torch.Tensor, router_logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask.logical_not_()
        return stage(hidden_states, router_logits, mask)

    with torch.no_grad():
        _, graph = ge(mutate, *make_inputs(6), backend=backend())
    assert "LogicalNot" in graph.node("NetOutput").inputs  # a result, which is copied into the caller's mask
    # and what says which rows are active: their choices, and of which there are scores.
    (mask,) = (node for node in graph.nodes("Unsqueeze") if node.inputs[0] == "LogicalNot")
    usable, weights, ids = (node for node in graph.all_nodes if mask.name in node.sources)
    assert (usable.type, weights.type, ids.type) == ("LogicalAnd", "SelectV2", "SelectV2")
