"""A short run that measures how long collectives take, for the cost model; all ranks return the same figures."""

import statistics
import time
from collections.abc import Callable

import torch

from moe_ops import collectives
from moe_ops.cost_types import Calibration, CollectiveKind, Link
from moe_ops.groups import Group, check_group

SMALL, LARGE = 1 << 12, 1 << 22
"""Bytes that a rank sends: latency rules one, bandwidth the other."""

WARM_UP_CALLS = 3


def calibrate(
    group: Group, *, device: torch.device | str = "cpu", sizes: tuple[int, int] = (SMALL, LARGE), rounds: int = 15
) -> Calibration:
    """Time each kind of collective over `group` at two sizes and fit ``latency + bytes / bandwidth``.

    A collective call: every rank of the group makes it, and all return the same. The time of a round is that of its slowest
    rank, the time of a size the median of its rounds; the sizes take turns. Where the large size is not slower than the small
    one, its time is taken for bandwidth alone.

    Args:
        group: two ranks or more: usually EP.
        device: what the collectives run on.
        sizes: bytes that a rank sends, a small and a large number of them.
        rounds: how often each size is timed.

    Raises:
        ValueError: the group has one rank, or `sizes` or `rounds` are out of range.
        RuntimeError: no process group has the name of the group.

    Example: once, when all ranks start::

        calibration = mo.calibrate(groups.ep, device=x.device)
    """
    if group.size < 2:
        raise ValueError(f"calibrate: group must have 2 ranks or more, got {group.size}")
    small, large = sizes
    if not 0 < small < large:
        raise ValueError(f"calibrate: sizes must be a small and a large number of bytes, got {sizes}")
    if rounds < 1:
        raise ValueError(f"calibrate: rounds must be at least 1, got {rounds}")
    check_group("calibrate", "the", group.name, group.size, group.rank)
    links = {}
    for kind in CollectiveKind:
        calls = [_make_call(kind, size, group, torch.device(device)) for size in sizes]
        times: list[list[float]] = [[], []]
        for number in range(WARM_UP_CALLS + rounds):
            for call, found in zip(calls, times, strict=True):
                seconds = _time(call, group, torch.device(device))
                if number >= WARM_UP_CALLS:
                    found.append(seconds)
        links[kind.value] = fit_link(sizes, (statistics.median(times[0]), statistics.median(times[1])))
    return Calibration(**links)


def fit_link(sizes: tuple[int, int], seconds: tuple[float, float]) -> Link:
    """The link that takes these times for these bytes; a latency below 0 becomes 0.

    Example: 1 ms, and 1 us for each KB::

        fit_link((1000, 2000), (0.001001, 0.001002))
    """
    (small, large), (first, second) = sizes, seconds
    per_byte = (second - first) / (large - small) if second > first else second / large
    return Link(max(first - small * per_byte, 0.0), 1 / per_byte)


def _make_call(kind: CollectiveKind, num_bytes: int, group: Group, device: torch.device) -> Callable[[], torch.Tensor]:
    """A collective in which a rank sends about `num_bytes`, as the cost model counts them."""
    size, name = group.size, group.name
    block = max(num_bytes // (size - 1) // 4, 1)  # float32 elements that go to each other rank
    if kind is CollectiveKind.ALL_GATHER:
        x = torch.zeros(block, device=device)
        return lambda: collectives.all_gather(x, size, name)()
    if kind is CollectiveKind.ALL_REDUCE:  # each block travels twice: to its sum, and back
        y = torch.zeros(max(block * size // 2, 1), device=device)
        return lambda: collectives.all_reduce(y, name, size)
    z = torch.zeros(block * size, device=device)
    if kind is CollectiveKind.REDUCE_SCATTER:
        return lambda: collectives.reduce_scatter(z, size, name)()
    return lambda: collectives.exchange_rows(z, size, name)()


def _time(call: Callable[[], torch.Tensor], group: Group, device: torch.device) -> float:
    """Seconds of one call on the slowest rank, the same number on all. All ranks start together."""
    _largest(0.0, group, device)
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return _largest(time.perf_counter() - start, group, device)


def _largest(value: float, group: Group, device: torch.device) -> float:
    """The largest of any rank, read on the host: it is a figure for the model, and the wait is what starts ranks together."""
    c10d = collectives.c10d
    x = torch.tensor([value], dtype=torch.float32, device=device)
    return float(c10d.wait_tensor(c10d.all_reduce(x, "max", group.name)).item())
