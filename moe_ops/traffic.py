"""What a piece of code really sends: collectives as the profiler sees them, bytes as the kernel counts them at the sockets.

For gloo over TCP on Linux; used by the demo, the tests and the benchmarks, never by an op.
"""

import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

_BYTES_SENT_OFFSET = 200  # tcpi_bytes_sent and tcpi_bytes_retrans in struct tcp_info of linux/tcp.h, since Linux 4.19


class Traffic(NamedTuple):
    """Collectives that this rank took part in, and bytes that it sent for them, gloo's own headers included."""

    collectives: int
    bytes_sent: int


def count_traffic(call: Callable[[], Any]) -> Traffic:
    """Run `call` and count what it sends. It must do all of its communication before it returns.

    Example::

        collectives, bytes_sent = count_traffic(lambda: mo.moe_stage(x, logits, experts, routing, layout))
    """
    before = _bytes_sent()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    # The backend's own ops: an eager and a compiled call have exactly one for each collective.
    # (`profile.events()` makes objects of all of them, which takes thirty times as long.)
    recorded: Any = profile.profiler
    names = [event.name() for event in recorded.kineto_results.events()]
    return Traffic(sum(name.startswith("c10d::") for name in names), _settled_bytes_sent() - before)


def _settled_bytes_sent() -> int:
    """The count once the kernel has sent what the sockets still held when the call returned."""
    total = _bytes_sent()
    while True:
        time.sleep(0.01)
        previous, total = total, _bytes_sent()
        if total == previous:
            return total


def _bytes_sent() -> int:
    total = 0
    for descriptor in _socket_descriptors():
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent, sent_again = struct.unpack_from("=QQ", info, _BYTES_SENT_OFFSET)
                total += sent - sent_again
    return total


def _socket_descriptors() -> Iterator[int]:
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                yield int(name)
        except OSError:  # closed since it was listed
            continue
