"""Computing while rows travel: one stream of work waits for its collective while another computes.

A stream is a generator. Where it needs the result of a collective it yields a `Transfer`, and gets back what arrived and what
was computed meanwhile; last of all it yields its own result:

    def steps(x):
        rows, local = yield Transfer(partial(gather, x), partial(run_shared_experts, x))
        ...
        yield Result(y)

Generators hold what lies between two collectives in local variables, and compilers trace them into one graph, in which the
order of the nodes is that of the calls. A stream is flat: Dynamo (torch 2.13) loses values that pass through ``yield from``.
"""

from collections import deque
from collections.abc import Callable, Generator
from types import GeneratorType
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from moe_ops._library import Wait

Value = TypeVar("Value")


class Transfer(NamedTuple):
    """A collective that is still to be issued.

    Attributes:
        start: issues it, and returns what waits for it.
        meanwhile: computes what the stream has to do that does not need what arrives.
    """

    start: Callable[[], Wait[Any]]
    meanwhile: Callable[[], Any] | None = None


class Result(NamedTuple, Generic[Value]):
    """What a stream has made. It yields nothing after it."""

    value: Value


Steps: TypeAlias = Generator[Transfer | Result[Value], Any, None]
"""A stream of work."""


class _InFlight(NamedTuple):
    """A collective that was issued, and the stream that waits for it."""

    number: int
    stream: Steps[Any]
    wait: Wait[Any]
    computed: Any


def run_stream(stream: Steps[Value]) -> Value:
    """Run one stream by itself."""
    step = next(stream)
    while not isinstance(step, Result):
        wait = step.start()
        computed = None if step.meanwhile is None else step.meanwhile()
        step = stream.send((wait(), computed))
    value: Value = step.value
    return value


def _checked(step: object) -> Transfer:
    if not isinstance(step, Transfer):
        raise TypeError(f"interleave: streams must yield a Transfer or a Result, got {type(step).__name__}")
    return step


def interleave(*streams: Steps[Value]) -> list[Value]:
    """Run streams so that while the collective of one is in flight, the next computes.

    No value changes: each stream computes what it computes alone. All ranks pass streams that communicate alike, in the same
    order. Only one collective is in flight at a time: torch's functional collectives on gloo do not work with two. (Inductor
    may issue the next before it waits for the last.)

    Args:
        streams: generators such as ``moe_stage_steps(...)`` returns.

    Returns:
        The result of each stream, in their order.

    Raises:
        TypeError: a stream is not a generator, or yields something else than a `Transfer` or a `Result`.
        RuntimeError: a stream ended without a result, or was run to its end before.

    Example: two halves of a batch, of which the rows of one travel while the experts of the other compute::

        first, second = mo.interleave(
            mo.moe_stage_steps(x1, logits1, experts, routing, layout),
            mo.moe_stage_steps(x2, logits2, experts, routing, layout),
        )
    """
    for stream in streams:
        if not isinstance(stream, GeneratorType):
            raise TypeError(f"interleave: streams must be generators, got {type(stream).__name__}")
    results: dict[int, Value] = {}
    ready: deque[tuple[int, Steps[Value], Any]] = deque((index, stream, None) for index, stream in enumerate(streams))
    in_flight: _InFlight | None = None
    while ready or in_flight is not None:
        transfer: Transfer | None = None
        if ready:
            index, stream, arrived = ready.popleft()
            try:
                step = stream.send(arrived)
            except StopIteration:
                raise RuntimeError(
                    "interleave: streams must end with a Result, and be run once, got one that ended"
                ) from None
            if isinstance(step, Result):
                results[index] = step.value
                continue
            transfer = _checked(step)
        if in_flight is not None:
            ready.append((in_flight.number, in_flight.stream, (in_flight.wait(), in_flight.computed)))
            in_flight = None
        if transfer is not None:
            wait = transfer.start()
            computed = None if transfer.meanwhile is None else transfer.meanwhile()
            in_flight = _InFlight(index, stream, wait, computed)
    return [results[index] for index in range(len(streams))]
