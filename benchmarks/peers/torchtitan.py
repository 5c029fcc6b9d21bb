"""TorchTitan: its experts, which compute in bfloat16 whatever they are given, and its layer with expert parallelism."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import moe_ops as mo
from benchmarks.contest import Entry, Implementation
from benchmarks.layer import EXPERTS as NUM_EXPERTS
from benchmarks.layer import HIDDEN, INTERMEDIATE, TOP_K, Batch, Weights


def build_experts(weights: Weights, _: mo.Group) -> Implementation:
    """Its ``RoutedExperts`` without expert parallelism; the counts that its layer passes in are part of it."""
    routed = make_layer(weights, mo.Group.single()).routed_experts

    def run(x_BLD: torch.Tensor, ids_BLK: torch.Tensor, scores_BLK: torch.Tensor) -> torch.Tensor:
        chosen_BLE = torch.zeros(*x_BLD.shape[:2], NUM_EXPERTS, dtype=torch.bool).scatter_(-1, ids_BLK, True)
        return routed(x_BLD, scores_BLK, ids_BLK, chosen_BLE.sum(dim=(0, 1))).squeeze(0)

    return Implementation(run, lambda batch: [tensor.unsqueeze(0) for tensor in batch])


def build_stage(weights: Weights, group: mo.Group) -> Implementation:
    """Its ``MoE`` with ``AllToAllTokenDispatcher`` over the ranks of the group."""
    return as_stage(make_layer(weights, group))


def as_stage(layer: Any) -> Implementation:
    layer.routed_experts.token_dispatcher.wire_meshes(ep_mesh=DeviceMesh.from_group(dist.group.WORLD, "cpu"))

    def run(x_BLD: torch.Tensor) -> torch.Tensor:
        return layer(x_BLD).squeeze(0)

    return Implementation(run, _add_batch_axis)


def _add_batch_axis(batch: Batch) -> list[torch.Tensor]:
    return [batch.hidden_states.unsqueeze(0)]


def make_layer(weights: Weights, group: mo.Group) -> Any:
    """The layer with one rank's experts, for inference: no counts for balancing the load are kept."""
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    set_spmd_backend("default")  # its own default needs a mesh of named axes for the whole model
    warnings.filterwarnings("ignore", message="In CPU autocast")  # it asks for float32, which is none on a CPU
    experts = GroupedExperts.Config(dim=HIDDEN, hidden_dim=INTERMEDIATE, num_experts=NUM_EXPERTS // group.size)
    dispatcher = AllToAllTokenDispatcher.Config(num_experts=NUM_EXPERTS, top_k=TOP_K)
    router = TokenChoiceTopKRouter.Config(
        num_experts=NUM_EXPERTS,
        gate=Linear.Config(in_features=HIDDEN, out_features=NUM_EXPERTS, bias=False),
        top_k=TOP_K,
        score_func="softmax",
        route_norm=True,
    )
    routed = RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher)
    with torch.device("meta"):
        layer = MoE.Config(
            num_experts=NUM_EXPERTS, routed_experts=routed, router=router, load_balance_coeff=None
        ).build()
    layer.to_empty(device="cpu").to(weights.w13.dtype).eval().requires_grad_(False)
    mine = weights.share_of(group)
    w1, w3 = mine.w13.chunk(2, dim=1)
    inner = layer.routed_experts.inner_experts
    for parameter, value in ((inner.w1_EFD, w1), (inner.w2_EDF, mine.w2), (inner.w3_EFD, w3)):
        parameter.copy_(value)
    layer.router.gate.weight.copy_(weights.router)
    return layer


EXPERTS = Entry("TorchTitan", build_experts, requires="torchtitan", dtype=torch.bfloat16)
STAGE = Entry("TorchTitan", build_stage, requires="torchtitan", dtype=torch.bfloat16)
