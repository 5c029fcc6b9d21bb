"""Every example in the documentation runs: those of docstrings, and those of the pages, on one rank."""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import moe_ops as mo
from moe_ops import dispatchers, experts, overlap, route, shared_experts, slots
from moe_ops.collectives import all_gather
from moe_ops.dispatchers import local

from .ranks import RankPool

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in ("ascend.md", "vllm.md"))
"""Those of Ascend need torch_npu, that of vLLM has none."""

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(mo, name) for name in mo.__all__ if inspect.isfunction(getattr(mo, name))},
    "reference.moe_stage": mo.reference.moe_stage,
    "Layout": mo.Layout,
    "Lengths": mo.Lengths,
    "Routing": mo.Routing,
    "from_device_mesh": mo.ParallelGroups.from_device_mesh,
    "from_process_groups": mo.ParallelGroups.from_process_groups,
    **{name: getattr(dispatchers, name) for name in ("dispatch", "combine")},
    **{name: getattr(slots, name) for name in ("place_copies", "to_physical")},
    **{name: getattr(local, name) for name in ("dispatch_local", "weigh_input", "combine_local")},
    "route": route.route,
    "count_expert_load": route.count_expert_load,
    "run_experts": experts.run_experts,
    "run_shared_experts": shared_experts.run_shared_experts,
}
NEEDS_TWO_RANKS = {"calibrate", "select_strategy"}


def make_names() -> dict[str, Any]:
    """What the examples take for granted: a layer of 8 experts, and 5 tokens of a rank."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, gate, w13, w2 = draw(5, 8), draw(8, 8), draw(8, 16, 8), draw(8, 8, 8)
    routing, weights = mo.Routing(top_k=2, num_experts=8), mo.ExpertWeights(w13, w2)
    groups = mo.ParallelGroups.from_process_groups(ep=dist.group.WORLD)
    layout = mo.Layout(mo.Strategy.ALLGATHER, groups)
    topk_weights, topk_ids = route.route(x @ gate.T, routing)
    dispatched = local.dispatch_local(x, topk_ids, topk_weights, first_expert=0, num_local_experts=8)
    return {
        **{"torch": torch, "mo": mo, "dist": dist, "partial": partial},
        **{name: getattr(overlap, name) for name in ("Transfer", "Result")},
        **{"all_gather": all_gather, "dispatched": dispatched},
        **{name: function for name, function in FUNCTIONS.items() if "." not in name},
        **{"x": x, "x1": x[:3], "x2": x[3:], "gate": gate, "w13": w13, "w2": w2, "bias": draw(256)},
        **{"hidden_states": x, "router_logits": x @ gate.T, "logits1": x[:3] @ gate.T, "logits2": x[3:] @ gate.T},
        **{"experts": weights, "routing": routing, "layout": layout, "groups": groups, "lengths": mo.Lengths()},
        **{"table": torch.randint(-1, 8, (20, 2)), "input_ids": torch.arange(5), "longest": 5},
        **{"ids": topk_ids, "weights": topk_weights, "topk_ids": topk_ids, "topk_weights": topk_weights},
        **{"shared": mo.SharedExperts(draw(8, 8), draw(8, 4), is_tp_sharded=False), "hidden_size": 8},
        **{
            "pg": dist.group.WORLD,
            "init_device_mesh": mesh_of_all_ranks,
            "mesh": mesh_of_all_ranks("cpu", (1, 1), mesh_dim_names=("dp", "tp")),
        },
        **{"group": mo.Group.from_process_group(dist.group.WORLD), "compiled_layer": lambda *_: x},
        **{"out": mo.prepare(x, x @ gate.T, layout), "expert_output": x, "my_all_reduce_over_tp": torch.clone, "y": x},
        **{"rows": dispatched.rows[:3], "calibration": mo.Calibration.uniform(latency=2e-5, bandwidth=5e10)},
    }


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names, on one gloo rank."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield make_names()
    dist.destroy_process_group()


def mesh_of_all_ranks(device: str, sizes: tuple[int, ...], *, mesh_dim_names: tuple[str, ...]) -> DeviceMesh:
    """`init_device_mesh` for as many ranks as there are."""
    return init_device_mesh(device, (dist.get_world_size(), *(1 for _ in sizes[1:])), mesh_dim_names=mesh_dim_names)


def example_of(function: Callable[..., Any]) -> str:
    """The code under ``Example...::`` in a docstring."""
    doc = inspect.getdoc(function) or ""
    found = re.search(r"^Example.*::\n\n((?:    .*\n?|\n)+)", doc, re.MULTILINE)
    assert found, f"{function} has no example"
    return textwrap.dedent(found[1])


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - NEEDS_TWO_RANKS))
def test_the_example_of_a_function_runs(names: dict[str, Any], name: str) -> None:
    function, code = FUNCTIONS[name], example_of(FUNCTIONS[name])
    if name == "run_experts":  # for experts of three
        names = names | {"experts": mo.ExpertWeights(names["w13"][:3], names["w2"][:3])}
    assert function.__name__ in code
    exec(compile(code, name, "exec"), dict(names))


def run_example(rank: int, code: str) -> None:
    groups = mo.ParallelGroups.from_process_groups(dp=dist.group.WORLD, ep=dist.group.WORLD)
    exec(code, {"mo": mo, "groups": groups, "x": torch.ones(1)})


@pytest.mark.parametrize("name", sorted(NEEDS_TWO_RANKS))
def test_the_example_for_two_ranks_runs(ranks2: RankPool, name: str) -> None:
    ranks2.run(run_example, example_of(FUNCTIONS[name]))


def test_every_function_has_an_example() -> None:
    assert all(example_of(FUNCTIONS[name]) for name in FUNCTIONS)


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run_in_order(names: dict[str, Any], page: str) -> None:
    scope = dict(names)
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)):
        exec(compile(block, f"{page}, block {number}", "exec"), scope)


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))],
)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        if not link.startswith("http"):
            assert ((ROOT / page).parent / link).exists(), link
