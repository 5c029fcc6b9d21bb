"""The plan itself: for each token count a routing, the load that it makes, the costs and the choice.

T tokens of a TP group, G TP groups, N rows of an EP rank, W ranks of EP, K top-k.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fake_impls.layout import padded_rows
from moe_ops.backends.ascend_rules import DeviceFamily, RuleChoice, mc2_capacity, select_by_device
from moe_ops.cost_types import Calibration, LayerShape, Topology
from moe_ops.load import ExpertLoad, count_copies, draw_topk_ids, measure_load
from moe_ops.plan.models import Model
from moe_ops.selection import Selection, select_strategy


class Request(NamedTuple):
    """What a plan is made for.

    Attributes:
        model: sizes of the layer.
        layer: what of them decides the bytes.
        topology: sizes of the axes.
        tokens: of the TP group that has most; one plan for each count.
        calibration: how long collectives take.
        calibration_source: where that is from, for people.
        routing: ``uniform``, ``zipf:EXPONENT``, or the name of a file with ids.
        tokens_are_sharded: as `Layout` has it.
        must_be_capturable: whether a device graph is to hold it.
        device: whose published rule is shown, too, or None.
        capacity: tokens of a TP group that MC2 holds there; None: the longest of `tokens`, as far as the kernel takes it.
    """

    model: Model
    layer: LayerShape
    topology: Topology
    tokens: tuple[int, ...]
    calibration: Calibration
    calibration_source: str
    routing: str = "uniform"
    tokens_are_sharded: bool = False
    must_be_capturable: bool = False
    device: DeviceFamily | None = None
    capacity: int | None = None


class Plan(NamedTuple):
    """What was found for one token count; `rule` is None where no device was named."""

    num_tokens: int
    load: ExpertLoad
    selection: Selection
    rule: RuleChoice | None


def make_plan(request: Request, num_tokens: int) -> Plan:
    """Plan for one of the request's token counts, which every TP group has.

    Raises:
        ValueError: the routing is out of range.
        OSError: the routing's file cannot be read.
    """
    layer, topology = request.layer, request.topology
    topk_ids = make_routing(request.routing, num_tokens * topology.dp * topology.pcp, layer)
    shards_WNK = shard_routing(topk_ids, topology, num_tokens)
    selection = select_strategy(
        layer,
        topology,
        num_tokens,
        calibration=request.calibration,
        tokens_are_sharded=request.tokens_are_sharded,
        must_be_capturable=request.must_be_capturable,
        copies=count_copies(shards_WNK, num_experts=layer.num_experts),
    )
    load = measure_load(topk_ids, num_experts=layer.num_experts, ep_size=topology.ep)
    return Plan(num_tokens, load, selection, _rule(request, num_tokens))


def make_routing(routing: str, num_tokens: int, layer: LayerShape) -> torch.Tensor:
    """int ``[num_tokens, K]``. Of a file the rows are taken in turn, and again from the first where there are too few."""
    if routing == "uniform" or routing.startswith("zipf:"):
        name, _, text = routing.partition(":")
        try:
            exponent = float(text) if name == "zipf" else 0.0
        except ValueError:
            exponent = -1.0
        if not 0 <= exponent < float("inf"):
            raise ValueError(f"--routing zipf:EXPONENT must have an exponent of 0 or more, got {routing}")
        return draw_topk_ids(num_tokens, num_experts=layer.num_experts, top_k=layer.top_k, exponent=exponent)
    ids = _load_ids(Path(routing), layer)
    return ids[torch.arange(num_tokens) % len(ids)]


def shard_routing(topk_ids: torch.Tensor, topology: Topology, num_tokens: int) -> torch.Tensor:
    """``[G * T, K] -> [W, N, K]``: the rows of each EP rank, chunked over TP by the caller or by prepare; -1 pads."""
    groups_GTK = topk_ids.view(topology.dp * topology.pcp, num_tokens, topk_ids.shape[1])
    padded = padded_rows(num_tokens, topology.tp)
    return F.pad(groups_GTK, (0, 0, 0, padded - num_tokens), value=-1).view(
        topology.ep, padded // topology.tp, topk_ids.shape[1]
    )


def _load_ids(path: Path, layer: LayerShape) -> torch.Tensor:
    try:
        ids = torch.load(path, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever reading a file that is no saved tensor raises
        raise ValueError(
            f"--routing {path} must be a tensor saved by torch.save, got {type(error).__name__}"
        ) from error
    shape = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != layer.top_k or not len(ids):
        raise ValueError(f"--routing {path} must hold topk_ids [tokens, {layer.top_k}], got {shape}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"--routing {path} must hold int32 or int64, got {ids.dtype}")
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= layer.num_experts:
        raise ValueError(f"--routing {path} must hold ids in [-1, {layer.num_experts}), got {low} to {high}")
    return ids


def _rule(request: Request, num_tokens: int) -> RuleChoice | None:
    device, topology = request.device, request.topology
    if device is None:
        return None
    capacity = request.capacity
    if capacity is None:
        has_mc2 = device is not DeviceFamily.ASCEND_310P
        capacity = mc2_capacity(device, max(request.tokens), tp_size=topology.tp) if has_mc2 else 0
    return select_by_device(
        device,
        num_tokens=num_tokens,
        capacity=capacity,
        num_experts=request.layer.num_experts,
        top_k=request.layer.top_k,
        ep_size=topology.ep,
        world_size=topology.ep,
    )
