"""Computing while rows travel: one stream of work waits for its collective while another computes.

A stream is a generator that yields a `Transfer` wherever it needs the result of a collective, and at its end its own result, as
a `Result`. (Dynamo of torch 2.13 loses what a generator returns.) Generators hold what lies between two collectives in local
variables, and compilers trace them into one graph, in which the order of the nodes is that of the calls.
"""

from collections import deque
from collections.abc import Callable, Generator
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

Arrived = TypeVar("Arrived")
Computed = TypeVar("Computed")
Value = TypeVar("Value")
Parameters = ParamSpec("Parameters")
Finish: TypeAlias = Callable[[], Arrived]
"""Waits for a collective that was issued, and returns what arrived."""


class Transfer(Generic[Arrived, Computed]):
    """A collective that is still to be issued.

    Attributes:
        arrived: what it brought, once the stream that yielded it goes on.
        computed: what was computed while it was in flight, likewise.
    """

    arrived: Arrived
    computed: Computed

    def __init__(self, start: Callable[[], Finish[Arrived]], meanwhile: Callable[[], Computed] | None = None) -> None:
        """`start` issues the collective; `meanwhile` computes what the stream has to do that does not need it."""
        self._start, self._meanwhile = start, meanwhile

    def start(self) -> None:
        """Issue the collective."""
        self._finish = self._start()
        if self._meanwhile is not None:
            self.computed = self._meanwhile()

    def finish(self) -> None:
        """Wait for it."""
        self.arrived = self._finish()


class Result(Generic[Value]):
    """What a stream has made; it yields nothing after it."""

    def __init__(self, value: Value) -> None:
        self.value = value


Steps: TypeAlias = Generator[Transfer[Any, Any] | Result[Value], None, None]
"""A stream of work."""


def interleave(*streams: Steps[Value]) -> list[Value]:
    """Run streams so that while the collective of one is in flight, the next computes; their results.

    Two halves of a batch, for example, each ``moe_stage_steps(...)``: the rows of one travel while the experts of the other
    compute. No value changes: each stream computes what it computes alone. All ranks pass streams that communicate alike, in
    the same order.

    No two collectives are in flight at once: gloo, and torch's functional collectives on it, do not stand that. (Inductor may
    issue the next before it waits for the last.)

    Raises:
        TypeError: a stream is not one.
        RuntimeError: a stream ended without a result, or was run before.
    """
    results: dict[int, Value] = {}
    waiting = deque(enumerate(streams))
    in_flight: tuple[int, Steps[Value], Transfer[Any, Any]] | None = None
    while waiting or in_flight is not None:
        transfer: Transfer[Any, Any] | None = None
        if waiting:
            index, stream = waiting.popleft()
            try:
                step = next(stream)
            except TypeError:
                raise TypeError(f"interleave: streams must be generators, got {type(stream).__name__}") from None
            except StopIteration:
                raise RuntimeError(
                    "interleave: streams must end with a Result, and be run once, got one that ended"
                ) from None
            if isinstance(step, Result):
                results[index] = step.value
                continue
            transfer = step
        if in_flight is not None:
            in_flight[2].finish()
            waiting.append(in_flight[:2])
            in_flight = None
        if transfer is not None:
            transfer.start()
            in_flight = index, stream, transfer
    return [results[index] for index in range(len(streams))]


def at_once(steps: Callable[Parameters, Steps[Value]], name: str) -> Callable[Parameters, Value]:
    """The function `name` that runs such a stream by itself."""

    @wraps(steps)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Value:
        return interleave(steps(*args, **kwargs))[0]

    run.__name__ = run.__qualname__ = name
    return run
