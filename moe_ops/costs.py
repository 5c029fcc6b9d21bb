"""What each form of the stage sends, and how long that takes: bytes from shapes, seconds from a calibration.

Pure functions of integers and floats: ranks that are given the same get the same, to the bit. What is not a collective of the
routed experts is left out: routing, packing and permuting rows, the experts' products, shared experts. `shared_expert_dp`,
where each TP rank exchanges all T tokens, is not modelled.

T tokens of a TP group, N rows of an EP rank, W ranks of EP, H hidden, E experts, K top-k.
"""

import math
from typing import NamedTuple

import torch

from fake_impls.layout import ceil_div, rows_per_rank
from fake_impls.quantize import BLOCK
from moe_ops.cost_types import Calibration, Collective, CollectiveKind, FormCost, LayerShape, Link, RowCopies, Topology
from moe_ops.types import Dispatch, Quant, Strategy

ROUTE_BYTES = 8
"""Of each choice of a row that travels: an int32 id and a float32 weight."""

COUNT_BYTES = 8
"""Of each rank in the exchange of the counts: int64."""

FORMS = (
    (Strategy.ALLGATHER, Dispatch.LOCAL),
    (Strategy.MC2, Dispatch.FIXED_CAPACITY),
    (Strategy.ALL2ALL, Dispatch.ALL_TO_ALL),
    (Strategy.ALL2ALL, Dispatch.FIXED_CAPACITY),
    (Strategy.MC2, Dispatch.ALL_TO_ALL),
)
"""What `moe_stage` accepts; of forms that cost the same the first is chosen."""


def payload_bytes(layer: LayerShape) -> int:
    """Bytes of a row's hidden states as they travel, scales included."""
    width = layer.hidden_size
    if layer.quant is Quant.NONE:
        return width * layer.dtype.itemsize
    if layer.quant in (Quant.W8A8, Quant.W4A8):
        return width + torch.float32.itemsize
    return (width if layer.quant is Quant.MXFP8 else ceil_div(width, 2)) + ceil_div(width, BLOCK)


def expected_copies(*, num_experts: int, top_k: int, ep_size: int) -> float:
    """Copies of a row that go to other ranks, one for each rank that has an expert of it, if all choices are equally likely.

    ``(W - 1) * (1 - C(E - E / W, K) / C(E, K))``: the second factor is the probability that a rank has one.
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
    model = _Model(layer, topology, num_tokens, calibration, tokens_are_sharded, copies)
    return tuple(model.cost(*form) for form in FORMS)


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


class _Model(NamedTuple):
    """The arguments of `predict_costs`, and what each step sends."""

    layer: LayerShape
    topology: Topology
    num_tokens: int
    calibration: Calibration
    tokens_are_sharded: bool
    copies: RowCopies

    @property
    def plain(self) -> int:
        """Bytes of a row of results."""
        return self.layer.hidden_size * self.layer.dtype.itemsize

    @property
    def routes(self) -> int:
        """Bytes of a row's ids and weights."""
        return ROUTE_BYTES * self.layer.top_k

    def cost(self, strategy: Strategy, dispatch: Dispatch) -> FormCost:
        if strategy is Strategy.ALLGATHER:
            collectives = self._gather_over_ep() if self.tokens_are_sharded else self._gather_over_dp()
        else:
            collectives = self._exchange(dispatch)
        total = sum(collective.bytes_sent for collective in collectives)
        if dispatch is Dispatch.ALL_TO_ALL and collectives:  # who sends most there is not who sends most back
            packed = payload_bytes(self.layer) + self.routes
            each = zip(self.copies.sent, self.copies.received, strict=True)
            total -= sum(one.bytes_sent for one in collectives if one.step in ("dispatch", "combine"))
            total += max(sent * packed + received * self.plain for sent, received in each)
        return FormCost(strategy, dispatch, collectives, total, sum(one.seconds for one in collectives))

    def _gather_over_ep(self) -> tuple[Collective, ...]:
        peers, rows = self.topology.ep - 1, rows_per_rank(self.num_tokens, self.topology.tp)
        if not peers:
            return ()
        packed = payload_bytes(self.layer) + self.routes
        return (
            self._one("prepare", CollectiveKind.ALL_GATHER, "EP", peers * rows, packed),
            self._one("finalize", CollectiveKind.REDUCE_SCATTER, "EP", peers * rows, self.plain),
        )

    def _gather_over_dp(self) -> tuple[Collective, ...]:
        """Quantised after the gather. PCP is the outer gather, and its reduce-scatter the first."""
        tp, dp, pcp = self.topology
        axes = [("DP", (dp - 1) * self.num_tokens), ("PCP", (pcp - 1) * dp * self.num_tokens)]
        axes = [(axis, rows) for (axis, rows), size in zip(axes, (dp, pcp), strict=True) if size > 1]
        packed = self.plain + self.routes
        gathers = [self._one("prepare", CollectiveKind.ALL_GATHER, axis, rows, packed) for axis, rows in axes]
        reduces = [
            self._one("finalize", CollectiveKind.REDUCE_SCATTER, axis, rows, self.plain) for axis, rows in axes[::-1]
        ]
        if tp > 1:  # a ring reduces and gathers: two times all but one of TP blocks
            rows_sent = 2 * (tp - 1) * self.num_tokens / tp
            reduces.append(self._one("finalize", CollectiveKind.ALL_REDUCE, "TP", rows_sent, self.plain))
        return (*gathers, *reduces)

    def _exchange(self, dispatch: Dispatch) -> tuple[Collective, ...]:
        topology, kind = self.topology, CollectiveKind.ALL_TO_ALL
        rows, peers = rows_per_rank(self.num_tokens, topology.tp), topology.ep - 1
        collectives = []
        if peers:
            sent = received = float(peers * rows)  # a fixed capacity: the rows of a rank, to each other rank
            if dispatch is Dispatch.ALL_TO_ALL:
                collectives.append(self._one("counts", kind, "EP", peers, COUNT_BYTES))
                sent, received = max(self.copies.sent), max(self.copies.received)
            packed = payload_bytes(self.layer) + self.routes
            collectives.append(self._one("dispatch", kind, "EP", sent, packed, received))
            collectives.append(self._one("combine", kind, "EP", received, self.plain, sent))
        if topology.tp > 1 and not self.tokens_are_sharded:
            collectives.append(
                self._one("finalize", CollectiveKind.ALL_GATHER, "TP", (topology.tp - 1) * rows, self.plain)
            )
        return tuple(collectives)

    def _one(
        self, step: str, kind: CollectiveKind, axis: str, rows: float, row_bytes: int, received: float | None = None
    ) -> Collective:
        """A collective; without `received`, each rank receives as many rows as it sends."""
        link: Link = getattr(self.calibration, kind.value)
        bytes_sent = rows * row_bytes
        bytes_received = bytes_sent if received is None else received * row_bytes
        seconds = link.latency + max(bytes_sent, bytes_received) / link.bandwidth
        return Collective(step, kind, axis, rows, bytes_sent, bytes_received, seconds)
