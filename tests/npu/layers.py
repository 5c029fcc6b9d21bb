"""The forms of the stage that tests convert to GE graphs, on rank 0 of eight."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import moe_ops as mo
from moe_ops import Quant
from tests.device_graphs import ALL2ALL, ALLGATHER, FIXED, MC2, TOP_K, W8A8, Buffers, E, Form, draw

RANKS = 8
ROUTING = mo.Routing(TOP_K, E)
ONLY_DP, WITH_TP, WITH_PCP = (8, 1, 1), (4, 1, 2), (2, 4, 1)  # [DP, PCP, TP]


class Layer(NamedTuple):
    """A form of the stage, and how its ranks are laid out."""

    form: Form
    layout: tuple[int, int, int] = ONLY_DP

    def groups(self) -> mo.ParallelGroups:
        """Of a world of eight."""
        mesh: Any = dist.init_device_mesh("npu", self.layout, mesh_dim_names=("dp", "pcp", "tp"))
        return mo.ParallelGroups.from_device_mesh(mesh)


def make_inputs(num_tokens: int) -> Buffers:
    """Hidden states, logits, and a mask of which the last quarter is False."""
    hidden_states, router_logits = draw(num_tokens, seed=0)
    mask = torch.arange(num_tokens) < num_tokens - num_tokens // 4
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
    "mc2-tp": Layer(Form(MC2), WITH_TP),
    "mc2-shared": Layer(Form(MC2, shared="sharded")),
    "mc2-packed": Layer(Form(MC2, is_packed=True)),
    "mc2-w8a8": Layer(Form(MC2, quant=W8A8)),
    "mc2-w8a8-packed": Layer(Form(MC2, quant=W8A8, is_packed=True)),
    "mc2-w4a8": Layer(Form(MC2, quant=Quant.W4A8)),
    "mc2-weighed": Layer(Form(MC2, routing=ROUTING._replace(apply_router_weight_on_input=True))),
    "mc2-deepseek": Layer(Form(MC2, routing=DEEPSEEK)),
    "mc2-sqrtsoftplus": Layer(Form(MC2, routing=ROUTING._replace(scoring="sqrtsoftplus"))),
    "mc2-eplb": Layer(Form(MC2, routing=ROUTING._replace(logical_to_physical=torch.arange(E).flip(0)))),
    "all2all-fixed": Layer(Form(ALL2ALL, FIXED), WITH_TP),
    "allgather-dp": Layer(Form(ALLGATHER), WITH_TP),
    "allgather-pcp": Layer(Form(ALLGATHER), WITH_PCP),
    "allgather-ep": Layer(Form(ALLGATHER, sharded=True), WITH_TP),
    "allgather-ep-ragged": Layer(Form(ALLGATHER, sharded=True, counts="ragged"), WITH_TP),
    "allgather-ep-w8a8": Layer(Form(ALLGATHER, sharded=True, quant=W8A8), WITH_TP),
}
A5_LAYERS = {
    "mc2-mxfp8": Layer(Form(MC2, quant=Quant.MXFP8)),
    "mc2-mxfp4": Layer(Form(MC2, quant=Quant.MXFP4)),
    "allgather-ep-mxfp8": Layer(Form(ALLGATHER, sharded=True, quant=Quant.MXFP8), WITH_TP),
}
