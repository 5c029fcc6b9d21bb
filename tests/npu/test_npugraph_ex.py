"""The stage compiled by npugraph_ex: its results on real gloo ranks, and what it captures over the stand-in for CANN.

On a CPU (`force_eager`) its passes run and then the graph, with CPU kernels. It replaces torch's all_to_all_single by an op,
`npu_define::all_to_all_single_npu`, that torchair has too: the package that is imported first registers the kernel. That of
npugraph_ex takes the numbers of elements that it was given for numbers of rows, which is wrong for all but 1-D tensors; that
of torchair divides them. So there are ranks that import torchair first, and ranks that do not.
"""

import functools
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.exc import BackendCompilerFailed

import moe_ops as mo
from moe_ops.collectives import exchange_rows
from tests.device_graphs import FORMS, QUANTISED_FORMS, Buffers, Form, make_buffers, make_stage
from tests.problems import E, Inputs, Problem, make_inputs
from tests.problems import make_stage as make_stage_of_rank
from tests.ranks import RankPool, pool_of_ranks

c10d = torch.ops._c10d_functional
FORCE_EAGER = {"force_eager": True}
VLLM_ASCEND = {**FORCE_EAGER, "inplace_pass": False, "clone_input": False}
CASES = {
    "mc2": Problem("mc2", masked=1),
    "mc2-shared": Problem("mc2", masked=1, shared="sharded", dtype=torch.bfloat16),
    "all2all": Problem("all2all-fixed", chosen="ids-and-weights"),
    "all2all-w8a8": Problem("all2all-fixed", quant=mo.Quant.W8A8, weight_quant=mo.Quant.W8A8),
    "allgather": Problem("allgather-dp", shared="replicated"),
    "allgather-pcp": Problem("allgather-dp", layout=(1, 2, 2), dtype=torch.bfloat16),
    "allgather-ep-even": Problem("allgather-ep", said=("longest", "mask")),
    "allgather-ep": Problem("allgather-ep", shared="sharded"),
    "allgather-ep-w8a8": Problem("allgather-ep", quant=mo.Quant.W8A8),
    "routing": Problem("mc2", routing=mo.Routing(3, E, num_expert_group=4, topk_group=2, routed_scaling_factor=2.5)),
}
COUNTS = [(3, 17, 0, 7), (1, 0, 9, 1)]
EVEN_COUNTS = [(16,) * 4, (1,) * 4]


@functools.cache
def stand_in_for_exchange(torchair_first: bool) -> str:
    """Let the op that both packages have for an all-to-all run on a CPU, for which neither has a kernel.

    The stand-in is their own kernel for npu as it is, which exchanges over whatever the process group is: gloo. Returns the
    module whose kernel it is.
    """
    if torchair_first:
        import torchair  # noqa: F401
    import npugraph_ex  # noqa: F401
    from npugraph_ex.ops import _hcom_alltoall as module

    if torchair_first:
        from torchair._ge_concrete_graph.ge_converter.experimental import hcom_alltoall as module
    elif "torchair.core" in sys.modules:
        raise RuntimeError("torchair was imported in a process that was to do without")
    # npugraph_ex sets a handler that ignores SIGTERM before it sends it again, so that the pool could not end the process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    library = torch.library.Library("npu_define", "FRAGMENT")
    library.impl("all_to_all_single_npu", module.npu_all_to_all_single_npu, "CPU")
    _libraries.append(library)
    return module.__name__


_libraries: list[torch.library.Library] = []  # what they register ends with them


@pytest.fixture(scope="module")
def ranks_with_torchair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two of their own, in which torchair is imported first. In those of other tests nothing imports it."""
    yield from pool_of_ranks(2, tmp_path_factory)


def unmarked(inputs: Inputs) -> Inputs:
    """Copies, of which no size is marked: npugraph_ex takes none that a compiler knows nothing about."""
    *tensors, counts = inputs
    return Inputs(*(x.clone() for x in tensors), [count.clone() for count in counts])


def compare_with_eager(
    rank: int, problem: Problem, all_counts: list[tuple[int, ...]], options: dict[str, bool]
) -> tuple[list[bool], int]:
    """Whether ranks 1 and 2, compiled, get what they get in eager mode, for each of the counts; and the graphs there are."""
    stand_in_for_exchange(False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    stage = make_stage_of_rank(rank, problem)
    compiled = stage
    if rank in (1, 2):
        compiled = torch.compile(stage, backend="npugraph_ex", options=options, fullgraph=True, dynamic=False)
    are_equal = []
    with torch.no_grad():
        for counts in all_counts:
            inputs = unmarked(make_inputs(rank, problem._replace(counts=counts)))
            expected = stage(inputs)
            are_equal.append(torch.equal(compiled(inputs), expected) and not expected.isnan().any().item())
    return are_equal, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check_equal(ranks: RankPool, case: str, options: dict[str, bool], num_batches: int) -> None:
    all_counts = (COUNTS if "per_rank" in CASES[case].said else EVEN_COUNTS)[:num_batches]
    answers = ranks.run(compare_with_eager, CASES[case], all_counts, options)
    assert [are_equal for are_equal, _ in answers] == [[True] * num_batches] * 4
    assert [graphs for _, graphs in answers] == [0, num_batches, num_batches, 0]


class TestResults:
    """Four ranks, (DP, TP) = (2, 2) or (PCP, TP) = (2, 2)."""

    @pytest.mark.parametrize("case", CASES)
    def test_equal_eager_mode(self, ranks4, case):
        # Each batch is a compilation of a second: several for one form of each transport, one for the others.
        num_batches = 2 if case in ("mc2", "allgather-ep-even", "allgather-ep") else 1
        check_equal(ranks4, case, FORCE_EAGER, num_batches)

    @pytest.mark.parametrize("case", ["mc2-shared", "all2all-w8a8", "allgather", "allgather-ep-w8a8"])
    def test_equal_eager_mode_with_options_of_vllm_ascend(self, ranks4, case):
        check_equal(ranks4, case, VLLM_ASCEND, num_batches=1)


def exchange(rank: int, sends_flat: bool, options: dict[str, bool], torchair_first: bool) -> tuple[str, bool, str]:
    """Whose kernel exchanges, whether a compiled exchange of rows is right, and the error if there is one."""
    module = stand_in_for_exchange(torchair_first)
    torch._dynamo.reset()
    size, name = dist.get_world_size(), dist.group.WORLD.group_name
    x = torch.arange(2.0 * size * 3).view(2 * size, 3) + 100 * rank

    def send_rows(x: torch.Tensor) -> torch.Tensor:
        return c10d.wait_tensor(c10d.all_to_all_single(x, [2] * size, [2] * size, name))

    def send_flat(x: torch.Tensor) -> torch.Tensor:
        return exchange_rows(x, size, name)()

    function = send_flat if sends_flat else send_rows
    try:
        result = torch.compile(function, backend="npugraph_ex", options=options, fullgraph=True)(x)
    except RuntimeError as error:
        return module, False, str(error)
    expected = torch.cat([x[2 * rank : 2 * rank + 2] - 100 * rank + 100 * source for source in range(size)])
    return module, torch.equal(result, expected), ""


@pytest.mark.parametrize("options", [FORCE_EAGER, VLLM_ASCEND], ids=["defaults", "vllm-ascend"])
class TestExchange:
    """What npugraph_ex makes of all_to_all_single, with the kernel of either package."""

    def test_rows_are_an_error_upstream(self, ranks4, options):
        for module, is_right, error in ranks4.run(exchange, False, options, False):
            assert module.startswith("npugraph_ex.")
            assert not is_right
            assert "Split sizes doesn't match total dim 0 size" in error

    def test_rows_are_right_with_torchair(self, ranks_with_torchair, options):
        for module, is_right, error in ranks_with_torchair.run(exchange, False, options, True):
            assert module.startswith("torchair.")
            assert is_right, error

    @pytest.mark.parametrize("torchair_first", [False, True], ids=["", "with-torchair"])
    def test_ours_is_right(self, request, options, torchair_first):
        pool = request.getfixturevalue("ranks_with_torchair" if torchair_first else "ranks4")
        for _, is_right, error in pool.run(exchange, True, options, torchair_first):
            assert is_right, error


@pytest.fixture
def groups(hccl_groups: Callable[..., Any]) -> mo.ParallelGroups:
    """Those of rank 5 of 8, (DP, TP) = (4, 2)."""
    hccl_groups(rank=5, sizes=())
    return mo.ParallelGroups.from_device_mesh(dist.init_device_mesh("npu", (4, 2), mesh_dim_names=("dp", "tp")))


def stage_of(form: Form, groups: mo.ParallelGroups, num_tokens: int) -> tuple[Callable[..., Any], Buffers]:
    """The stage as a function of tensors on the device, and such tensors."""
    return make_stage(form, groups, "npu"), make_buffers(num_tokens, form, groups, "npu")


def communication(launches: list[str]) -> list[str]:
    return [launch for launch in launches if launch.startswith("Hccl") or "Distribute" in launch]


class TestCapture:
    """npugraph_ex captures and replays by itself, for tensors on the device."""

    @pytest.mark.parametrize(
        "form", ["mc2-shared", "mc2-w8a8", "all2all", "allgather-shared", "allgather-ep-even", "allgather-ep-w8a8"]
    )
    def test_captures_once_and_replays(self, npugraph_ex, stand_in, groups, form):
        run, inputs = stage_of((FORMS | QUANTISED_FORMS)[form], groups, 8)
        eager = stand_in.launches_during(lambda: run(*inputs))
        captures, replays, refusals = stand_in.captures, stand_in.replays, stand_in.refusals
        results = []
        launched = stand_in.launches_during(lambda: results.append(npugraph_ex(run, *inputs, calls=3)))
        ((result, _),) = results  # of one FX graph
        # The first of the two captures is empty: it makes the memory pool.
        assert (stand_in.captures - captures, stand_in.replays - replays) == (2, 3)
        assert stand_in.refusals == refusals
        assert communication(launched) == communication(eager) != []
        assert result.shape == inputs[0].shape

    def test_a_ragged_exchange_is_an_error(self, npugraph_ex, groups):
        run, inputs = stage_of(Form(mo.Strategy.ALL2ALL, mo.Dispatch.ALL_TO_ALL), groups, 8)
        with pytest.raises(BackendCompilerFailed, match="Could not guard on data-dependent expression"):
            npugraph_ex(run, *inputs)

    @pytest.mark.parametrize("form", ["allgather-overlap-gate", "allgather-ep-even"])
    def test_dynamic_sizes_are_one_graph_captured_once_for_each(self, stand_in, groups, form):
        torch._dynamo.utils.counters.clear()
        unmasked = FORMS[form]._replace(masked=False)
        run, _ = stage_of(unmasked, groups, 8)
        compiled = torch.compile(run, backend="npugraph_ex", fullgraph=True, dynamic=True)
        captures, replays = stand_in.captures, stand_in.replays
        for num_tokens in (8, 16, 32, 8):
            _, inputs = stage_of(unmasked, groups, num_tokens)
            assert compiled(*inputs).shape == inputs[0].shape
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert (stand_in.captures - captures, stand_in.replays - replays) == (1 + 3, 4)

    def test_dynamic_sizes_with_assertions_are_an_error_upstream(self, groups):
        """A graph asserts that TP divides the size; npugraph_ex compares its own wrapper of the size instead of the size."""
        run, inputs = stage_of(FORMS["mc2"], groups, 8)
        with pytest.raises(BackendCompilerFailed, match=r"Runtime assertion failed for expression Eq\(Mod\("):
            torch.compile(run, backend="npugraph_ex", fullgraph=True, dynamic=True)(*inputs)

    def test_marked_axes_are_an_error_upstream(self, groups):
        """For the same reason: a marked size is asserted to be 0 or more."""
        run, inputs = stage_of(FORMS["allgather-ep-even"], groups, 8)
        mo.mark_token_axes(*inputs)
        with pytest.raises(BackendCompilerFailed, match="not supported between instances of 'ValuePack' and 'int'"):
            torch.compile(run, backend="npugraph_ex", fullgraph=True)(*inputs)
