"""One rank of the demo: run every form of every family, compiled, and measure each call."""

import math
import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import linear

import moe_ops as mo
from moe_ops.demo.cases import DP, EP, FORMS, TP, Case, Family, Form
from moe_ops.traffic import count_traffic

TIMED_CALLS = 5
TIMEOUT = timedelta(seconds=180)
"""A rank waits no longer for another; compiling may hold one up."""


ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",  # the ranks talk over the loopback interface alone
    "KINETO_LOG_LEVEL": "6",  # the profiler prints no notices
}


class Measurement(NamedTuple):
    """What one rank found in one case.

    Attributes:
        family: its name.
        form: the form that ran.
        case: index of the case among the form's.
        error: largest difference from the expected result, as a share of the largest value expected.
        graphs: compilations of this form so far.
        collectives: of one call.
        bytes_sent: of one call, as counted at this rank's sockets.
        seconds: of one call, median.
    """

    family: str
    form: Form
    case: int
    error: float
    graphs: int
    collectives: int
    bytes_sent: int
    seconds: float


class Sink(Protocol):
    """The sending end of a queue."""

    def put(self, measurement: Measurement, /) -> None:
        """Send it."""


class Inputs(NamedTuple):
    """What the compiled function is given; the length travels as the rows of a tensor, so that it is not compiled in."""

    hidden_states: torch.Tensor
    longest: torch.Tensor


Layer = Callable[[Inputs], torch.Tensor]


def run_rank(rank: int, families: list[Family], backend: str, store: str, sink: Sink) -> None:
    """The whole work of a process."""
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=EP, timeout=TIMEOUT)
    mesh = init_device_mesh("cpu", (DP, TP), mesh_dim_names=("dp", "tp"))
    groups = mo.ParallelGroups.from_device_mesh(mesh)
    for family in families:
        for form in FORMS:
            _run_form(family, form, groups, backend, sink)
    dist.barrier()  # no rank leaves while another still talks to it
    dist.destroy_process_group()


def _run_form(family: Family, form: Form, groups: mo.ParallelGroups, backend: str, sink: Sink) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    layer = torch.compile(_make_layer(family, form, groups), backend=counter, fullgraph=True)
    for index, case in enumerate(family.cases(form)):
        inputs = _make_inputs(case, groups.ep.rank)
        error = relative_error(layer(inputs), case.expected[groups.ep.rank], case.tokens[groups.ep.rank].dtype)
        seconds = statistics.median(_time(layer, inputs) for _ in range(TIMED_CALLS))
        dist.barrier()
        traffic = count_traffic(partial(layer, inputs))
        graphs = int(counter.frame_count)
        sink.put(Measurement(family.name, form, index, error, graphs, *traffic, seconds))


def _make_layer(family: Family, form: Form, groups: mo.ParallelGroups) -> Layer:
    """The MoE block of this rank, router included, as a user would write it."""
    size = family.routing.num_experts // groups.ep.size
    mine = slice(groups.ep.rank * size, (groups.ep.rank + 1) * size)
    experts = mo.ExpertWeights(family.experts.w13[mine].clone(), family.experts.w2[mine].clone())
    shared = _own_shared(family.shared, groups.tp)
    layout = mo.Layout(form.strategy, groups, form.dispatch, tokens_are_sharded=form.is_sharded)

    def layer(inputs: Inputs) -> torch.Tensor:
        return mo.moe_stage(
            inputs.hidden_states,
            linear(inputs.hidden_states, family.gate),
            experts,
            family.routing,
            layout,
            lengths=mo.Lengths(longest=inputs.longest.shape[0]),
            shared_experts=shared,
            reduce_results=True,
        )

    return layer


def _own_shared(shared: mo.SharedExperts | None, tp: mo.Group) -> mo.SharedExperts | None:
    """This TP rank's part of the intermediate axis."""
    if shared is None:
        return None
    gate, up = (half.chunk(tp.size)[tp.rank] for half in shared.w13.chunk(2))
    return shared._replace(w13=torch.cat([gate, up]), w2=shared.w2.chunk(tp.size, dim=1)[tp.rank].clone())


def _make_inputs(case: Case, rank: int) -> Inputs:
    """What a rank gives to the layer, whatever the form; a serving engine knows the longest count of all ranks just so."""
    tokens = case.tokens[rank]
    mo.mark_token_axes(tokens)
    return Inputs(tokens, mo.token_count(max(case.counts)))


def relative_error(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest difference as a share of the largest value expected; infinite for NaN, another shape or dtype."""
    if result.shape != expected.shape or result.dtype != dtype:
        return math.inf
    if not len(expected):
        return 0.0
    error = float((result.double() - expected).abs().max() / expected.abs().max())
    return math.inf if math.isnan(error) else error


def _time(layer: Layer, inputs: Inputs) -> float:
    dist.barrier()  # not to count the wait for a rank that comes late
    start = time.perf_counter()
    layer(inputs)
    return time.perf_counter() - start
