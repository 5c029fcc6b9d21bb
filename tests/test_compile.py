"""Tracing: one graph for every token count, under aot_eager and inductor; export; an AOTInductor package."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

import moe_ops as mo
from moe_ops import Strategy

pytestmark = pytest.mark.slow

COUNTS = [0, 1, 2, 3, 7, 64, 257, 4096]
H, E, K, I, W = 16, 8, 2, 8, 4
FORMS = {
    "all2all": (Strategy.ALL2ALL, False),
    "all2all-sharded": (Strategy.ALL2ALL, True),
    "mc2": (Strategy.MC2, False),
    "mc2-sharded": (Strategy.MC2, True),
    "allgather-dp": (Strategy.ALLGATHER, False),
    "allgather-ep": (Strategy.ALLGATHER, True),
}
Stage = Callable[..., torch.Tensor]


def layout_of(form: str, name: str) -> mo.Layout:
    """On rank 1 of a fake group of four ranks: it is the TP and the EP group; in the DP form of ALLGATHER, DP and PCP."""
    group, (strategy, sharded) = mo.Group(name, W, 1), FORMS[form]
    groups = mo.ParallelGroups(dp=group, pcp=group) if form == "allgather-dp" else mo.ParallelGroups(tp=group, ep=group)
    # A ragged exchange needs counts that somebody sent: test_stage_compile.py compiles it on real ranks.
    dispatch = None if strategy is Strategy.ALLGATHER else mo.Dispatch.FIXED_CAPACITY
    return mo.Layout(strategy, groups, dispatch, tokens_are_sharded=sharded)


def lengths_of(mask: torch.Tensor, counts: list[torch.Tensor]) -> mo.Lengths:
    """The rows of each rank, or the longest of all alone."""
    rows = [count.shape[0] for count in counts]
    return mo.Lengths(longest=rows[0], mask=mask) if len(rows) == 1 else mo.Lengths(per_rank=rows, mask=mask)


def prepare_and_finalize(form: str, group: str) -> Stage:
    layout = layout_of(form, group)

    def run(x: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor, counts: list[torch.Tensor]) -> torch.Tensor:
        out = mo.prepare(x, logits, layout, lengths_of(mask, counts))
        y = out.hidden_states.to(torch.float32) * 2 + out.router_logits.sum(1, keepdim=True)
        y = torch.where(out.mask.unsqueeze(1), y, 0)
        return mo.finalize(y, out.state, layout, reduce_results=True)

    return run


def whole_stage(form: str, group: str, dtype: torch.dtype) -> Stage:
    layout = layout_of(form, group)
    local = E // layout.groups.ep.size
    experts = mo.ExpertWeights(torch.randn(local, 2 * I, H).to(dtype), torch.randn(local, H, I).to(dtype))

    def run(x: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor, counts: list[torch.Tensor]) -> torch.Tensor:
        lengths = lengths_of(mask, counts)
        return mo.moe_stage(x, logits, experts, mo.Routing(K, E), layout, lengths=lengths, reduce_results=True)

    return run


def arguments(num_tokens: int, form: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Tokens, logits, mask and counts of one call, as a user marks them: ragged, and none of them a constant."""
    x, logits = torch.randn(num_tokens, H).to(dtype), torch.randn(num_tokens, E)
    if FORMS[form][1]:
        counts = [num_tokens // 2, num_tokens, num_tokens + 1, 3]  # this process is rank 1
    elif form == "allgather-dp":
        counts = [num_tokens if rank == 5 else 2 + rank % 3 for rank in range(W * W)]  # it is DP rank 1 and PCP rank 1
    else:
        counts = [num_tokens + 2]
    longest, tp = max(counts), 1 if form == "allgather-dp" else W
    mask = torch.arange(longest * tp if FORMS[form][1] else -(-longest // tp) * tp) < num_tokens
    mo.mark_token_axes(x, logits, mask)
    return x, logits, mask, [mo.token_count(count) for count in counts]


def count_graphs(function: Stage, form: str, backend: str, dtype: torch.dtype = torch.float32) -> int:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for num_tokens in COUNTS:
        with torch.no_grad():
            result = compiled(*arguments(num_tokens, form, dtype))
        assert result.shape == (num_tokens, H)
        assert result.dtype == dtype
    return counter.frame_count


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("form", FORMS)
def test_one_graph_for_every_count(form: str, backend: str, fake_group4: str) -> None:
    assert count_graphs(prepare_and_finalize(form, fake_group4), form, backend) == 1


@pytest.mark.parametrize("quant", [quant for quant in mo.Quant if quant is not mo.Quant.NONE], ids=lambda q: q.value)
def test_one_graph_with_quantised_activations(quant: mo.Quant, fake_group4: str) -> None:
    layout = layout_of("allgather-ep", fake_group4)

    def run(x: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor, counts: list[torch.Tensor]) -> torch.Tensor:
        out = mo.prepare(x, logits, layout, lengths_of(mask, counts), quant)
        assert out.pertoken_scale is not None
        y = mo.dequantize_activations(out.hidden_states, out.pertoken_scale, quant=quant, hidden_size=H)
        return mo.finalize(y, out.state, layout)

    assert count_graphs(run, "allgather-ep", "aot_eager") == 1


@pytest.mark.parametrize("form", FORMS)
def test_one_graph_for_laying_out_ids(form: str, fake_group4: str) -> None:
    layout = layout_of(form, fake_group4)

    def run(x: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor, counts: list[torch.Tensor]) -> torch.Tensor:
        out = mo.prepare(x, logits, layout, lengths_of(mask, counts))
        laid_out = mo.lay_out_like_prepared((x[:, :2] * 8).to(torch.int32), out.state, layout)
        torch._check(laid_out.shape[0] == out.hidden_states.shape[0])
        return mo.finalize(out.hidden_states * laid_out[:, :1], out.state, layout, reduce_results=True)

    assert count_graphs(run, form, "aot_eager") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_one_graph_for_the_whole_stage(form: str, dtype: torch.dtype, fake_group4: str) -> None:
    assert count_graphs(whole_stage(form, fake_group4, dtype), form, "aot_eager", dtype) == 1


def test_the_counter_counts() -> None:
    """Without marks there is a graph for 0, one for 1, one for the rest: the tests above can fail."""
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda x: x.narrow(0, 0, x.shape[0]) * 2, backend=counter, fullgraph=True)
    for num_tokens in COUNTS:
        run(torch.randn(num_tokens, H))
    assert counter.frame_count >= 3


@pytest.mark.parametrize("form", FORMS)
def test_export_with_marked_token_axes(form: str, fake_group4: str) -> None:
    """Each op stays one node of the exported program, which serves every count."""
    program = torch.export.export(Module(prepare_and_finalize(form, fake_group4)), arguments(12, form), strict=True)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    if form != "all2all-sharded":  # which is the identity
        assert any(target.startswith("moe_ops.") for target in targets)
    assert not any("c10d" in target for target in targets)
    for num_tokens in COUNTS:
        assert program.module()(*arguments(num_tokens, form)).shape == (num_tokens, H)


@pytest.mark.parametrize("form", FORMS)
def test_export_with_a_dynamic_token_axis(form: str, fake_group4: str) -> None:
    """torch takes a dynamic size for 2 or more, so the program serves counts with 2 rows a chunk or more."""
    program = export_dynamic(form, fake_group4)
    for num_tokens in (W + 1, 64, 257):
        assert program.module()(*arguments(num_tokens, form)).shape == (num_tokens, H)


def export_dynamic(form: str, fake_group4: str) -> torch.export.ExportedProgram:
    dynamic = {0: torch.export.Dim.DYNAMIC}
    example = arguments(12, form)
    shapes = (dynamic, dynamic, dynamic, [dynamic] * len(example[3]))
    return torch.export.export(Module(prepare_and_finalize(form, fake_group4)), example, dynamic_shapes=shapes)


class Module(torch.nn.Module):
    def __init__(self, run: Stage) -> None:
        super().__init__()
        self.run = run

    def forward(
        self, x: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor, counts: list[torch.Tensor]
    ) -> torch.Tensor:
        return self.run(x, logits, mask, counts)


@pytest.mark.parametrize(("form", "is_marked"), [("mc2", True), ("allgather-ep", False)])
def test_aot_inductor_package_builds(form: str, is_marked: bool, fake_group4: str, tmp_path: Any) -> None:
    if is_marked:
        program = torch.export.export(Module(prepare_and_finalize(form, fake_group4)), arguments(12, form), strict=True)
    else:
        program = export_dynamic(form, fake_group4)
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "stage.pt2"))
    assert (tmp_path / "stage.pt2").stat().st_size > 0


def test_collectives_are_visible_to_the_compiler(fake_group4: str) -> None:
    """The composites expand: what a back end receives are functional collectives, one each way, and no op of ours."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep)
    compiled = torch.compile(prepare_and_finalize("allgather-ep", fake_group4), backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(*arguments(5, "allgather-ep"))
    targets = [str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"]
    assert targets.count("_c10d_functional.all_gather_into_tensor.default") == 1
    assert targets.count("_c10d_functional.reduce_scatter_tensor.default") == 1
    assert not any("prepare" in target or "finalize" in target for target in targets)
    assert not any(".item" in target or "_local_scalar_dense" in target for target in targets)  # no host read


def test_graph_size_does_not_grow_with_the_world() -> None:
    assert nodes_with(8) == nodes_with(256)


def nodes_with(size: int) -> int:
    torch._dynamo.reset()
    dist.init_process_group("fake", rank=1, world_size=size)
    group = mo.Group(dist.group.WORLD.group_name, size, 1)
    groups = mo.ParallelGroups(tp=group, ep=group)
    chunked = mo.Layout(Strategy.ALL2ALL, groups)
    gathered = mo.Layout(Strategy.ALLGATHER, groups, tokens_are_sharded=True)
    sizes: list[int] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep)
    constant_counts = [3] * size

    def run(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        out = mo.prepare(x, logits, chunked)
        whole = mo.finalize(out.hidden_states, out.state, chunked)
        out = mo.prepare(whole, logits, gathered, mo.Lengths(per_rank=constant_counts))
        return mo.finalize(out.hidden_states, out.state, gathered)

    with torch.no_grad():
        torch.compile(run, backend=backend, fullgraph=True)(torch.randn(3, H), torch.randn(3, E))
    dist.destroy_process_group()
    return sizes[-1]
