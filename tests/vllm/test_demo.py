"""What the demo over vLLM takes for a failure. It runs two minutes, so that it is no test itself."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_ops.demo_vllm import run
from moe_ops.demo_vllm.run import LAYERS, Served

GRAPH = ["moe_ops.route.default"] * LAYERS
STOCK = Served([[1, 2], [3], [4]], [["_C.cpu_fused_moe"]])
GOOD = Served([[1, 2], [3], [4]], [GRAPH, GRAPH])


@pytest.mark.parametrize(
    ("ours", "failure"),
    [
        (GOOD._replace(tokens=[[1, 2], [3], [5]]), "the tokens differ"),
        (GOOD._replace(graphs=[]), "2 ranks compiled 0 graphs, not 2"),
        (GOOD._replace(graphs=[GRAPH, GRAPH[1:]]), "the stage is not in the graphs"),
    ],
)
def test_failures_are_seen(ours: Served, failure: str) -> None:
    assert run._find_failures(STOCK, GOOD) == []
    assert run._find_failures(STOCK, ours) == [failure]


def serve(directory: Path, model: Path, *, tp: int, strategy: str | None) -> Served:
    return STOCK if strategy is None else GOOD


def serve_eagerly(directory: Path, model: Path, *, tp: int, strategy: str | None) -> Served:
    return GOOD._replace(graphs=[])


def serve_badly(directory: Path, model: Path, *, tp: int, strategy: str | None) -> Served:
    return STOCK if strategy is None else GOOD._replace(tokens=[[1, 2], [3], [5]])


def serve_nothing(directory: Path, model: Path, *, tp: int, strategy: str | None) -> Served:
    raise RuntimeError("an engine failed")


@pytest.mark.parametrize(("engine", "status"), [(serve, 0), (serve_badly, 1), (serve_eagerly, 1), (serve_nothing, 1)])
def test_its_status_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], engine: Callable[..., Served], status: int
) -> None:
    monkeypatch.setattr(run, "_serve", engine)
    assert run.run() == status
    assert ("All generate the same tokens" in capfd.readouterr().out) == (status == 0)
