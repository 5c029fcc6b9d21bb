import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchair
from npugraph_ex._acl_concrete_graph.fx2acl_converter import AclConcreteGraph
from torchair._ge_concrete_graph import compat_ir, fx2ge_converter
from torchair._ge_concrete_graph.fx2ge_converter import GeConcreteGraph
from torchair.core import _torchair

from . import STAND_IN
from .ge_graphs import GeGraph
from .lone_rank import LoneRankStore
from .stand_in import StandIn

# Where torchair asks the graph engine itself, which the stand-in has no part of:
fx2ge_converter.initialize_graph_engine = lambda *_: None
compat_ir.is_cann_compat = lambda *_, **__: ""  # this CANN knows every operator and attribute
_torchair.get_registered_ir_def = lambda _: ("ERROR", [], [], [])  # and has no definition to make a converter from

_made_graphs: list[Any] = []


def _keep_graphs(graph_class: type) -> None:
    """Keep each graph that is made, as it is when the passes over it are done."""
    optimize = graph_class.optimize_graph_without_runtime

    @functools.wraps(optimize)
    def optimize_and_keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = optimize(self, *args, **kwargs)
        _made_graphs.append(self)
        return result

    graph_class.optimize_graph_without_runtime = optimize_and_keep


_keep_graphs(GeConcreteGraph)
_keep_graphs(AclConcreteGraph)


def made_graphs() -> list[GeGraph]:
    """The graphs that torchair made for GE since `forget_graphs`."""
    return [GeGraph(made.graph) for made in _made_graphs]


def _only_graph() -> Any:
    assert len(_made_graphs) == 1, f"one graph was to be made, got {len(_made_graphs)}"
    return _made_graphs[0]


@pytest.fixture(autouse=True)
def _constant_floats() -> Iterator[None]:
    """With symbolic sizes, what Dynamo takes half the time for."""
    with torch._dynamo.config.patch(specialize_float=True):
        yield


@pytest.fixture(scope="session")
def chip() -> str:
    """The name of the chip that the stand-in says it is; one for a process."""
    return STAND_IN.chip


@pytest.fixture(scope="session")
def stand_in() -> StandIn:
    """The stand-in itself, which counts captures and replays and lists launches."""
    return STAND_IN


@pytest.fixture
def ge() -> Iterator[Callable[..., tuple[Any, GeGraph]]]:
    """`ge(function, *args, backend=None, dynamic=True)`: the result, and the graph that torchair made for GE.

    The graph is made and not run: the result is that of the FX graph, run eagerly, which is right for tensors on a CPU alone.
    A backend of one's own needs `config.debug.run_eagerly = True` too.
    """

    def compile_for_ge(
        function: Callable[..., Any], *args: Any, backend: Callable[..., Any] | None = None, dynamic: bool = True
    ) -> tuple[Any, GeGraph]:
        if backend is None:
            config = torchair.CompilerConfig()
            config.debug.run_eagerly = True
            backend = torchair.get_npu_backend(compiler_config=config)
        forget_graphs()
        result = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
        return result, GeGraph(_only_graph().graph)

    yield compile_for_ge
    forget_graphs()


@pytest.fixture
def npugraph_ex() -> Iterator[Callable[..., tuple[Any, AclConcreteGraph]]]:
    """`npugraph_ex(function, *args, calls=1, dynamic=False, **options)`: the result of the last call, and the graph.

    With the option `force_eager=True` its passes run, and then the graph without capture: on a CPU with right results. Without
    it, on the stand-in, the first call captures and each replays.
    """

    def compile_for_npugraph_ex(
        function: Callable[..., Any], *args: Any, calls: int = 1, dynamic: bool = False, **options: Any
    ) -> tuple[Any, AclConcreteGraph]:
        forget_graphs()
        compiled = torch.compile(function, backend="npugraph_ex", options=options, fullgraph=True, dynamic=dynamic)
        for _ in range(calls):
            result = compiled(*args)
        return result, _only_graph()

    yield compile_for_npugraph_ex
    forget_graphs()


def forget_graphs() -> None:
    torch._dynamo.reset()
    _made_graphs.clear()


@pytest.fixture
def hccl_groups() -> Iterator[Callable[..., dict[int, dist.ProcessGroup]]]:
    """`hccl_groups(rank=0, world_size=8, sizes=(2, 4))`: real `hccl` process groups, by size, of a rank that is alone.

    The world, and of each size the group of neighbours that holds this rank. Their collectives launch and send nothing. Other
    groups and device meshes can be made of this world as of any.
    """

    store = LoneRankStore()  # held here, for a process group holds the part of it that is not python

    def make(rank: int = 0, world_size: int = 8, sizes: tuple[int, ...] = (2, 4)) -> dict[int, dist.ProcessGroup]:
        dist.init_process_group("hccl", store=store, rank=rank, world_size=world_size)
        groups = {world_size: dist.group.WORLD}
        for size in sizes:
            neighbours = [list(range(first, first + size)) for first in range(0, world_size, size)]
            groups[size], _ = dist.new_subgroups_by_enumeration(neighbours)
        return groups

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def communicator_name() -> Callable[[dist.ProcessGroup], str]:
    """`communicator_name(group)`: what torch_npu's own ops take for a group, the name of its HCCL communicator on this rank."""
    return lambda group: group._get_backend(torch.device("npu")).get_hccl_comm_name(group.rank())
