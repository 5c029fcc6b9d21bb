"""What Python does for a call of the stage: frames of the library on the stack, and calls of its functions."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

import fake_impls
import moe_ops
from moe_ops import collectives, stage

OURS = tuple(f"{Path(package.__file__).parent}/" for package in (moe_ops, fake_impls))


class Calls(NamedTuple):
    """Of one call of `moe_stage`.

    Attributes:
        frames: from `moe_stage` to each functional collective, both ends included.
        before: calls of the library's functions up to the first collective.
        total: calls of them in all. (A generator that goes on counts as a call.)
    """

    frames: tuple[int, ...]
    before: int
    total: int


def count_calls(call: Callable[[], Any]) -> Calls:
    """Run `call`, which calls `moe_stage` once, and count."""
    recorder = _Recorder()
    c10d = collectives.c10d
    collectives.c10d = recorder  # where the library calls functional collectives
    sys.setprofile(recorder.count)
    try:
        call()
    finally:
        sys.setprofile(None)
        collectives.c10d = c10d
    return Calls(tuple(recorder.frames), recorder.before, recorder.total)


class _Recorder:
    """Stands in for ``torch.ops._c10d_functional`` and calls it."""

    def __init__(self) -> None:
        self.frames: list[int] = []
        self.before = self.total = 0

    def count(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            self.total += 1

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op: Callable[..., Any] = getattr(torch.ops._c10d_functional, name)
        if name != "wait_tensor":
            self.before = self.before or self.total
            self.frames.append(_depth(sys._getframe(1)))
        return op


def _depth(frame: FrameType | None) -> int:
    depth = 1
    while frame is not None and frame.f_code is not stage.moe_stage.__code__:
        frame, depth = frame.f_back, depth + 1
    if frame is None:
        raise RuntimeError("count_calls: call must call moe_stage, which is not on the stack")
    return depth
