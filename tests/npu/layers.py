"""The forms of the stage that tests convert to GE graphs, on rank 0 of eight."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torchair

import moe_ops as mo
from moe_ops import Quant
from moe_ops.integrations.torchair import get_npu_backend
from tests.device_graphs import (
    ALL2ALL,
    ALLGATHER,
    FIXED,
    MC2,
    TOP_K,
    W8A8,
    Buffers,
    E,
    Form,
    H,
    draw,
    make_stage,
    rows_of_mask,
)

from .conftest import forget_graphs, made_graphs
from .ge_graphs import GeGraph

RANKS = 8
ROUTING = mo.Routing(TOP_K, E)
ONLY_DP, WITH_TP, WITH_PCP = (8, 1, 1), (4, 1, 2), (2, 4, 1)  # [DP, PCP, TP]


class Layer(NamedTuple):
    """A form of the stage, how its ranks are laid out, and by how many rows its mask is longer than the tokens."""

    form: Form
    layout: tuple[int, int, int] = ONLY_DP
    spare_rows: int = 0

    def groups(self) -> mo.ParallelGroups:
        """Of a world of eight."""
        mesh: Any = dist.init_device_mesh("npu", self.layout, mesh_dim_names=("dp", "pcp", "tp"))
        return mo.ParallelGroups.from_device_mesh(mesh)


def make_inputs(num_tokens: int, mask_rows: int | None = None) -> Buffers:
    """Hidden states, logits, and a mask (of as many rows, unless said) that leaves out the last quarter."""
    hidden_states, router_logits = draw(num_tokens, seed=0)
    rows = num_tokens if mask_rows is None else mask_rows
    mask = torch.arange(rows) < rows - rows // 4
    return Buffers(hidden_states.npu(), router_logits.to(torch.bfloat16).npu(), mask.npu())


DEEPSEEK = ROUTING._replace(
    scoring="sigmoid",
    num_expert_group=4,
    topk_group=2,
    e_score_correction_bias=torch.arange(E) / E,
    routed_scaling_factor=2.5,
)
LAYERS = {
    "mc2": Layer(Form(MC2)),
    "mc2-tp": Layer(Form(MC2), WITH_TP, spare_rows=2),
    "mc2-shared": Layer(Form(MC2, shared="sharded", masked=False)),
    "mc2-given": Layer(Form(MC2, is_choice_given=True)),
    "mc2-packed": Layer(Form(MC2, is_packed=True)),
    "mc2-w8a8": Layer(Form(MC2, quant=W8A8)),
    "mc2-w8a8-packed": Layer(Form(MC2, quant=W8A8, is_packed=True)),
    "mc2-w4a8": Layer(Form(MC2, quant=Quant.W4A8)),
    "mc2-weighed": Layer(Form(MC2, routing=ROUTING._replace(apply_router_weight_on_input=True))),
    "mc2-deepseek": Layer(Form(MC2, routing=DEEPSEEK)),
    "mc2-sqrtsoftplus": Layer(Form(MC2, routing=ROUTING._replace(scoring="sqrtsoftplus"))),
    "mc2-eplb": Layer(Form(MC2, routing=ROUTING._replace(logical_to_physical=torch.arange(E).flip(0)))),
    "all2all-fixed": Layer(Form(ALL2ALL, FIXED, masked=False), WITH_TP),
    "allgather-dp": Layer(Form(ALLGATHER, masked=False), WITH_TP),
    "allgather-pcp": Layer(Form(ALLGATHER), WITH_PCP),
    "allgather-ep": Layer(Form(ALLGATHER, sharded=True, masked=False), WITH_TP),
    "allgather-ep-ragged": Layer(Form(ALLGATHER, sharded=True, counts="ragged"), WITH_TP),
    "allgather-ep-w8a8": Layer(Form(ALLGATHER, sharded=True, quant=W8A8, masked=False), WITH_TP),
}
A5_LAYERS = {
    "mc2-mxfp8": Layer(Form(MC2, quant=Quant.MXFP8)),
    "mc2-mxfp4": Layer(Form(MC2, quant=Quant.MXFP4)),
    "allgather-ep-mxfp8": Layer(Form(ALLGATHER, sharded=True, quant=Quant.MXFP8, masked=False), WITH_TP),
}


def stage_of(layer: Layer) -> Callable[..., Any]:
    """The stage of the layer, with groups of a world of eight."""
    return make_stage(layer.form, layer.groups(), "npu")


def backend(**options: Any) -> Callable[..., Any]:
    """Ours, which makes graphs for GE but does not run them."""
    config = torchair.CompilerConfig()
    config.debug.run_eagerly = True
    return get_npu_backend(compiler_config=config, **options)


def graph_of(layer: Layer, groups: mo.ParallelGroups) -> GeGraph:
    """The one graph that serves several token counts. (Of ragged ones no rank has fewer than two.)"""
    forget_graphs()
    stage = make_stage(layer.form, groups, "npu")
    compiled = torch.compile(stage, backend=backend(), fullgraph=True, dynamic=True)
    for count in (26, 30, 34, 258):
        inputs = make_inputs(count, rows_of_mask(count, layer.form, groups) + layer.spare_rows)
        with torch.no_grad():
            output = compiled(*inputs)
        assert (output.shape, output.dtype, output.device.type) == ((count, H), torch.bfloat16, "npu")
    (graph,) = made_graphs()
    return graph


def computing_types(graph: GeGraph) -> str:
    """Its operators in order, without copies and constants."""
    return " ".join(kind for kind in graph.compute_types if kind not in ("Fill", "Identity"))
