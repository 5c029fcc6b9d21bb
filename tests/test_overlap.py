"""Streams of work: what is in flight when, in eager mode and in the graph; and that no value changes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import aot_module_simplified
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ops as mo
from moe_ops._library import Wait
from moe_ops.overlap import Result, Steps, Transfer

from .problems import FORMS, Problem, compiles, expected_of, make_inputs, make_stage, problems, run_stage
from .ranks import RankPool

LEAF, COLLECTIVE, WAIT = "moe_ops.", "_c10d_functional.", "_c10d_functional.wait_tensor.default"


def stream(name: str, log: list[str], num_transfers: int) -> Steps[str]:
    def start(index: int) -> Wait[int]:
        log.append(f"{name}{index} start")

        def finish() -> int:
            log.append(f"{name}{index} finish")
            return index

        return finish

    for index in range(num_transfers):
        log.append(f"{name} computes")
        arrived, _ = yield Transfer(partial(start, index), partial(log.append, f"{name} meanwhile"))
        assert arrived == index
    log.append(f"{name} ends")
    yield Result(name)


def test_one_computes_while_the_collective_of_the_other_is_in_flight() -> None:
    log: list[str] = []
    assert mo.interleave(stream("a", log, 2), stream("b", log, 1)) == ["a", "b"]
    assert log == [
        *("a computes", "a0 start", "a meanwhile", "b computes", "a0 finish"),
        *("b0 start", "b meanwhile", "a computes", "b0 finish"),
        *("a1 start", "a meanwhile", "b ends", "a1 finish", "a ends"),
    ]


@given(lengths=st.lists(st.integers(0, 4), max_size=4))
def test_every_collective_is_waited_for_before_the_next(lengths: list[int]) -> None:
    log: list[str] = []
    names = "abcd"[: len(lengths)]
    results = mo.interleave(*(stream(name, log, n) for name, n in zip(names, lengths, strict=True)))
    assert results == list(names)
    transfers = [line for line in log if line.endswith(("start", "finish"))]
    assert len(transfers) == 2 * sum(lengths)
    for started, finished in zip(transfers[::2], transfers[1::2], strict=True):
        assert (started.split()[0], started.split()[1], finished) == (
            finished.split()[0],
            "start",
            f"{started.split()[0]} finish",
        )


def halves(problem: Problem) -> tuple[Problem, Problem]:
    """Two batches of the same layer, with other tokens and other counts."""
    return problem, problem._replace(counts=problem.counts[::-1])


def run_interleaved(rank: int, problem: Problem, backend: str | None, **keywords: Any) -> Any:
    steps = [make_stage(rank, half, run=mo.moe_stage_steps, **keywords) for half in halves(problem)]
    inputs = [make_inputs(rank, half) for half in halves(problem)]

    def both(first: Any, second: Any) -> list[torch.Tensor]:
        results = mo.interleave(steps[0](first), steps[1](second))
        return [2 * result for result in results]  # results that the graph goes on with

    if backend is None:
        return both(*inputs), 0
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(both, backend=counter, fullgraph=True) if compiles(rank, problem) else both
    with torch.no_grad():
        results = run(*inputs)
        run(*(make_inputs(rank, half._replace(counts=(4, 0, 1, 9))) for half in halves(problem)))
    return results, counter.frame_count


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(max_examples=15)
def test_micro_batches_are_equal_to_the_bit(ranks4: RankPool, form: str, data: st.DataObject) -> None:
    problem = data.draw(problems(form))._replace(reduce_results=True)
    wanted = [ranks4.run(run_stage, half) for half in halves(problem)]
    for rank, (found, _) in enumerate(ranks4.run(run_interleaved, problem, None)):
        for index in range(2):
            assert torch.equal(found[index], 2 * wanted[index][rank])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "form", "backend"),
    [
        *((seed, form, "aot_eager") for seed, form in enumerate(FORMS)),
        *((seed, form, "inductor") for seed, form in enumerate(("all2all", "mc2", "allgather-ep"))),
    ],
)
def test_compiled_micro_batches_are_one_graph(ranks4: RankPool, seed: int, form: str, backend: str) -> None:
    problem = Problem(form, counts=(3, 64, 0, 7), shared="sharded", seed=seed)
    alone = [ranks4.run(run_stage, half) for half in halves(problem)]
    for rank, (found, graphs) in enumerate(ranks4.run(run_interleaved, problem, backend)):
        assert graphs == int(compiles(rank, problem))
        for index, half in enumerate(halves(problem)):
            torch.testing.assert_close(found[index].double() / 2, expected_of(half, rank), rtol=2e-5, atol=2e-5)
            assert backend == "inductor" or torch.equal(found[index], 2 * alone[index][rank])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["allgather-dp", "allgather-ep"])
@given(data=st.data())
@settings(max_examples=25)
def test_a_gather_that_runs_under_the_gate_changes_no_value(ranks4: RankPool, form: str, data: st.DataObject) -> None:
    problem = data.draw(problems(form))._replace(quant=data.draw(st.sampled_from([mo.Quant.NONE, mo.Quant.W8A8])))
    together = ranks4.run(run_stage, problem)
    for found, wanted in zip(ranks4.run(run_overlapped, problem), together, strict=True):
        assert torch.equal(found, wanted)


def run_overlapped(rank: int, problem: Problem) -> torch.Tensor:
    return make_stage(rank, problem, overlap_gate=True)(make_inputs(rank, problem))


def graph_of(rank: int, problem: Problem, **keywords: Any) -> list[str]:
    """The nodes of the whole stage in the order in which a graph runs them, composites expanded; of one rank."""
    torch._dynamo.reset()
    nodes: list[str] = []

    def note(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nodes.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return aot_module_simplified(module, inputs, fw_compiler=note)

    stage: Any = make_stage(rank, problem, **keywords)
    if compiles(rank, problem):
        stage = torch.compile(stage, backend=backend, fullgraph=True)
    with torch.no_grad():
        stage(make_inputs(rank, problem))
    return nodes


def one_graph(nodes: list[list[str]]) -> list[str]:
    """That of the rank that compiled."""
    (graph,) = [of_rank for of_rank in nodes if of_rank]
    return graph


def collectives(nodes: list[str]) -> Iterator[tuple[int, int]]:
    """Where each collective is issued, and where it is waited for."""
    issued = [index for index, node in enumerate(nodes) if node.startswith(COLLECTIVE) and node != WAIT]
    waited = [index for index, node in enumerate(nodes) if node == WAIT]
    return zip(issued, waited, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["allgather-dp", "allgather-ep"])
def test_in_the_graph_the_gather_is_issued_before_routing_and_waited_for_after(ranks4: RankPool, form: str) -> None:
    problem = Problem(form, layout=(4, 1, 1))
    nodes = one_graph(ranks4.run(partial(graph_of, overlap_gate=True), problem))
    issued, waited = next(collectives(nodes))
    assert issued < nodes.index("moe_ops.route.default") < waited
    nodes = one_graph(ranks4.run(graph_of, problem))
    issued, waited = next(collectives(nodes))
    assert nodes.index("moe_ops.route.default") < issued


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_shared_experts_run_while_rows_travel(ranks4: RankPool, form: str) -> None:
    is_sharded = FORMS[form][1]
    problem = Problem(form, shared="replicated" if is_sharded else "sharded", reduce_results=False)
    nodes = one_graph(ranks4.run(graph_of, problem))
    shared = [index for index, node in enumerate(nodes) if node == "aten.mm.default"]
    experts = nodes.index("moe_ops.grouped_linear.default")
    assert any(all(issued < index < waited < experts for index in shared) for issued, waited in collectives(nodes))


class InFlight(TorchDispatchMode):
    """How many collectives are in flight at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(op).startswith(COLLECTIVE):
            self.now += -1 if str(op) == WAIT else 1
            self.most = max(self.most, self.now)
        return op(*args, **(kwargs or {}))


def count_in_flight(rank: int, problem: Problem) -> int:
    steps = [make_stage(rank, half, run=mo.moe_stage_steps) for half in halves(problem)]
    inputs = [make_inputs(rank, half) for half in halves(problem)]
    with torch.no_grad(), InFlight() as counter:
        mo.interleave(*(step(its) for step, its in zip(steps, inputs, strict=True)))
    return counter.most


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["none", "sharded", "replicated"])
@pytest.mark.parametrize("form", FORMS)
def test_the_stage_never_has_two_collectives_in_flight(ranks4: RankPool, form: str, shared: str) -> None:
    assert ranks4.run(count_in_flight, Problem(form, shared=shared)) == [1, 1, 1, 1]


def run_mixture(rank: int, problem: Problem, is_compiled: bool) -> list[torch.Tensor]:
    """Streams of three forms at once, in sizes that are not marked."""
    forms = [problem._replace(form=form) for form in MIXTURE]
    steps = [make_stage(rank, one, run=mo.moe_stage_steps) for one in forms]
    inputs = [make_inputs(rank, one) for one in forms]

    def run() -> list[torch.Tensor]:
        return mo.interleave(*(step(its) for step, its in zip(steps, inputs, strict=True)))

    torch._dynamo.reset()
    with torch.no_grad():
        return (torch.compile(run, backend="aot_eager", fullgraph=True) if is_compiled else run)()


MIXTURE = ("all2all", "mc2", "allgather-dp")


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_streams_of_different_forms(ranks4: RankPool, is_compiled: bool) -> None:
    problem = Problem("mc2", layout=(4, 1, 1))
    for rank, found in enumerate(ranks4.run(run_mixture, problem, is_compiled)):
        for form, result in zip(MIXTURE, found, strict=True):
            expected = expected_of(problem._replace(form=form), rank)
            torch.testing.assert_close(result.double(), expected, rtol=2e-5, atol=2e-5)


def iter_of_ints() -> Any:
    yield 1


def test_what_is_no_stream_is_named() -> None:
    with pytest.raises(TypeError, match="interleave: streams must be generators, got Tensor"):
        mo.interleave(torch.zeros(2))
    with pytest.raises(TypeError, match="interleave: streams must yield a Transfer or a Result, got int"):
        mo.interleave(iter_of_ints())
    spent = stream("a", [], 0)
    mo.interleave(spent)
    with pytest.raises(RuntimeError, match="streams must end with a Result, and be run once"):
        mo.interleave(spent)


@pytest.mark.parametrize("error", [TypeError("mine"), ValueError("mine"), StopIteration("mine")])
@pytest.mark.parametrize("where", ["computes", "starts", "waits"])
def test_what_a_stream_raises_is_not_hidden(error: Exception, where: str) -> None:
    """A StopIteration comes as the RuntimeError that Python makes of it in a generator."""

    def fail() -> Any:
        raise error

    def failing() -> Steps[str]:
        if where == "computes":
            fail()
        yield Transfer(fail if where == "starts" else lambda: fail)
        yield Result("never")

    kind = RuntimeError if isinstance(error, StopIteration) and where == "computes" else type(error)
    with pytest.raises(kind) as raised:
        mo.interleave(stream("a", [], 2), failing())
    assert raised.value is error or raised.value.__cause__ is error
