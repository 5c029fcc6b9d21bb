"""What each form of the stage sends, and how long that takes: bytes from shapes, seconds from a calibration.

Pure functions of integers and floats: ranks that are given the same get the same, to the bit. What is not a collective of the
routed experts is left out: routing, packing and permuting rows, the experts' products, shared experts. `shared_expert_dp`,
where each TP rank exchanges all T tokens, is not modelled; nor are fused exchanges of a device.

A strategy has a row in the table `COSTS`: the function that gives its collectives.

T tokens of a TP group, N rows of an EP rank, W ranks of EP, H hidden, E experts, K top-k.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fake_impls.experts import sum_dtype
from fake_impls.layout import ceil_div, rows_per_rank
from fake_impls.quantize import BLOCK
from moe_ops.cost_types import Calibration, Collective, CollectiveKind, FormCost, LayerShape, Link, RowCopies, Topology
from moe_ops.strategies import STRATEGIES
from moe_ops.types import Dispatch, Quant, Strategy

ROUTE_BYTES = 8
"""Of each choice of a row that travels: an int32 id and a float32 weight."""

COUNT_BYTES = 8
"""Of each rank in the exchange of the counts: int64."""


def payload_bytes(layer: LayerShape) -> int:
    """Bytes of a row's hidden states as they travel to the experts, scales included.

    Example::

        payload_bytes(mo.LayerShape(7168, 256, 8, quant=mo.Quant.W8A8))  # 7168 + 4
    """
    width = layer.hidden_size
    if layer.quant is Quant.NONE:
        return width * layer.dtype.itemsize
    if layer.quant in (Quant.W8A8, Quant.W4A8):
        return width + torch.float32.itemsize
    return (width if layer.quant is Quant.MXFP8 else ceil_div(width, 2)) + ceil_div(width, BLOCK)


def result_bytes(layer: LayerShape) -> int:
    """Bytes of a row of results, of which those of float16 are summed, and so travel, in float32.

    Example::

        result_bytes(mo.LayerShape(7168, 256, 8, dtype=torch.float16))  # 4 * 7168
    """
    return layer.hidden_size * sum_dtype(layer.dtype).itemsize


def _route_bytes(layer: LayerShape) -> int:
    """Bytes of a row's ids and weights."""
    return ROUTE_BYTES * layer.top_k


def expected_copies(*, num_experts: int, top_k: int, ep_size: int) -> float:
    """Copies of a row that go to other ranks, one for each rank that has an expert of it, if all choices are equally likely.

    ``(W - 1) * (1 - C(E - E / W, K) / C(E, K))``: the second factor is the probability that a rank has one.

    Example::

        expected_copies(num_experts=256, top_k=8, ep_size=32)  # 7.0
    """
    absent = math.comb(num_experts - num_experts // ep_size, top_k) / math.comb(num_experts, top_k)
    return (ep_size - 1) * (1 - absent)


def predict_costs(
    layer: LayerShape,
    topology: Topology,
    num_tokens: int,
    *,
    calibration: Calibration,
    tokens_are_sharded: bool = False,
    copies: RowCopies | None = None,
) -> tuple[FormCost, ...]:
    """The cost of each form in `FORMS`, in that order, for a finished result: a sum that is open over TP is closed.

    Args:
        layer: its shape.
        topology: sizes of the axes.
        num_tokens: T of the TP group that has most, known to all ranks.
        calibration: how long collectives take.
        tokens_are_sharded: each TP rank brings ``ceil(T / TP)`` tokens and gets as many back: ALLGATHER takes its EP form, and
            no form gathers over TP. Otherwise each brings, and gets, all T.
        copies: what the routing really sends, for the ragged exchange; None: what is expected if all choices are equally
            likely.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example::

        layer = mo.LayerShape(hidden_size=4096, num_experts=128, top_k=8)
        costs = predict_costs(layer, mo.Topology(tp=2, dp=4), 512, calibration=mo.calibrate(groups.ep))
        by_bytes = sorted(costs, key=lambda cost: cost.bytes_sent)
    """
    check_shapes("predict_costs", layer, topology, num_tokens)
    for kind, link in zip(Calibration._fields, calibration, strict=True):
        if link.latency < 0 or not link.bandwidth > 0:
            raise ValueError(f"predict_costs: calibration.{kind} must have latency >= 0 and bandwidth > 0, got {link}")
    rows = rows_per_rank(num_tokens, topology.tp)
    if copies is None:
        expected = rows * expected_copies(num_experts=layer.num_experts, top_k=layer.top_k, ep_size=topology.ep)
        copies = RowCopies([expected], [expected])
    elif len(copies.sent) != topology.ep or len(copies.received) != topology.ep:
        got = len(copies.sent), len(copies.received)
        raise ValueError(f"predict_costs: copies must be of EP = {topology.ep} ranks, got {got}")
    elif max(copies.sent) > rows * (topology.ep - 1):
        raise ValueError(
            f"predict_costs: copies must be at most {rows} rows to each of {topology.ep - 1} ranks, got {max(copies.sent)}"
        )
    subject = Subject(layer, topology, num_tokens, calibration, tokens_are_sharded, copies)
    return tuple(_form_cost(subject, *form) for form in FORMS)


def check_shapes(op: str, layer: LayerShape, topology: Topology, num_tokens: int) -> None:
    """Raise ValueError unless sizes are positive and fit each other."""
    sizes = {"hidden_size": layer.hidden_size, "num_experts": layer.num_experts, "top_k": layer.top_k}
    for name, size in (sizes | topology._asdict()).items():
        if size < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {size}")
    if num_tokens < 0:
        raise ValueError(f"{op}: num_tokens must be at least 0, got {num_tokens}")
    if layer.top_k > layer.num_experts:
        raise ValueError(f"{op}: top_k must be at most num_experts = {layer.num_experts}, got {layer.top_k}")
    if layer.num_experts % topology.ep:
        raise ValueError(f"{op}: num_experts must be a multiple of EP = {topology.ep}, got {layer.num_experts}")


class Subject(NamedTuple):
    """The arguments of `predict_costs`, checked."""

    layer: LayerShape
    topology: Topology
    num_tokens: int
    calibration: Calibration
    tokens_are_sharded: bool
    copies: RowCopies


def _gather(subject: Subject, dispatch: Dispatch) -> list[Collective]:
    """The collectives of ALLGATHER."""
    return _ep_form(subject) if subject.tokens_are_sharded else _dp_form(subject)


def _ep_form(subject: Subject) -> list[Collective]:
    layer, topology = subject.layer, subject.topology
    sent = (topology.ep - 1) * rows_per_rank(subject.num_tokens, topology.tp)
    if topology.ep == 1:
        return []
    packed = payload_bytes(layer) + _route_bytes(layer)
    return [
        _collective(subject, "prepare", CollectiveKind.ALL_GATHER, "EP", sent, packed),
        _collective(subject, "finalize", CollectiveKind.REDUCE_SCATTER, "EP", sent, result_bytes(layer)),
    ]


def _dp_form(subject: Subject) -> list[Collective]:
    """Quantised after the gather. PCP is the outer gather, and its reduce-scatter the first."""
    layer, (tp, dp, pcp), num_tokens = subject.layer, subject.topology, subject.num_tokens
    axes = [("DP", dp, (dp - 1) * num_tokens), ("PCP", pcp, (pcp - 1) * dp * num_tokens)]
    axes = [(axis, size, rows) for axis, size, rows in axes if size > 1]
    packed, result = payload_bytes(layer._replace(quant=Quant.NONE)) + _route_bytes(layer), result_bytes(layer)
    gather, reduce = CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER
    collectives = [_collective(subject, "prepare", gather, axis, rows, packed) for axis, _, rows in axes]
    collectives += [_collective(subject, "finalize", reduce, axis, rows, result) for axis, _, rows in axes[::-1]]
    if tp > 1:  # a ring reduces and gathers: two times all but one of TP blocks
        rows_sent = 2 * (tp - 1) * num_tokens / tp
        collectives.append(_collective(subject, "finalize", CollectiveKind.ALL_REDUCE, "TP", rows_sent, result))
    return collectives


def _exchange(subject: Subject, dispatch: Dispatch) -> list[Collective]:
    """The collectives of ALL2ALL and MC2."""
    layer, topology, kind = subject.layer, subject.topology, CollectiveKind.ALL_TO_ALL
    rows, peers = rows_per_rank(subject.num_tokens, topology.tp), topology.ep - 1
    packed, result = payload_bytes(layer) + _route_bytes(layer), result_bytes(layer)
    collectives = []
    if peers and dispatch is Dispatch.ALL_TO_ALL:
        there, back = subject.copies
        collectives.append(_collective(subject, "counts", kind, "EP", peers, COUNT_BYTES))
        collectives.append(_collective(subject, "dispatch", kind, "EP", max(there), packed, max(back)))
        collectives.append(_collective(subject, "combine", kind, "EP", max(back), result, max(there)))
    elif peers:  # a fixed capacity: the rows of a rank, to each other rank
        collectives.append(_collective(subject, "dispatch", kind, "EP", peers * rows, packed))
        collectives.append(_collective(subject, "combine", kind, "EP", peers * rows, result))
    if topology.tp > 1 and not subject.tokens_are_sharded:
        chunks = (topology.tp - 1) * rows
        collectives.append(_collective(subject, "finalize", CollectiveKind.ALL_GATHER, "TP", chunks, result))
    return collectives


COSTS: dict[Strategy, Callable[[Subject, Dispatch], list[Collective]]] = {
    Strategy.ALLGATHER: _gather,
    Strategy.MC2: _exchange,
    Strategy.ALL2ALL: _exchange,
}
"""What each strategy sends by a kind of dispatch, in order."""

FORMS = tuple(
    sorted(
        ((strategy, dispatch) for strategy in COSTS for dispatch in STRATEGIES[strategy].dispatches),
        key=lambda form: STRATEGIES[form[0]].dispatches.index(form[1]),
    )
)
"""What `moe_stage` accepts, each strategy with its own dispatch first; of forms that cost the same the first is chosen."""


def _form_cost(subject: Subject, strategy: Strategy, dispatch: Dispatch) -> FormCost:
    collectives = COSTS[strategy](subject, dispatch)
    bytes_sent = sum(one.bytes_sent for one in collectives)
    if dispatch is Dispatch.ALL_TO_ALL and collectives:
        bytes_sent -= _excess(subject, collectives)
    return FormCost(strategy, dispatch, tuple(collectives), bytes_sent, sum(one.seconds for one in collectives))


def _excess(subject: Subject, collectives: Sequence[Collective]) -> float:
    """Bytes counted too much: the rank that sends most on the way there may send less on the way back."""
    packed, result = payload_bytes(subject.layer) + _route_bytes(subject.layer), result_bytes(subject.layer)
    each = zip(*subject.copies, strict=True)
    most = max(sent * packed + received * result for sent, received in each)
    return sum(one.bytes_sent for one in collectives if one.step in ("dispatch", "combine")) - most


def _collective(
    subject: Subject,
    step: str,
    kind: CollectiveKind,
    axis: str,
    rows: float,
    row_bytes: int,
    rows_received: float | None = None,
) -> Collective:
    """A collective; without `rows_received`, each rank receives as many rows as it sends."""
    link: Link = getattr(subject.calibration, kind.value)
    bytes_sent = rows * row_bytes
    bytes_received = bytes_sent if rows_received is None else rows_received * row_bytes
    seconds = link.latency + max(bytes_sent, bytes_received) / link.bandwidth
    return Collective(step, kind, axis, rows, bytes_sent, bytes_received, seconds)
