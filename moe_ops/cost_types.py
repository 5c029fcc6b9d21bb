"""What the cost model takes and returns: shapes, topologies, calibrations, and the costs themselves."""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe_ops.groups import ParallelGroups
from moe_ops.types import Dispatch, Quant, Strategy


class LayerShape(NamedTuple):
    """What of a layer decides the bytes that it sends.

    Attributes:
        hidden_size: H.
        num_experts: E; with redundant experts, the number of slots.
        top_k: K.
        dtype: of the activations.
        quant: as `moe_stage` has it; NONE where weights go on the input, since rows travel as they are then.
    """

    hidden_size: int
    num_experts: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16
    quant: Quant = Quant.NONE


class Topology(NamedTuple):
    """Sizes of the axes that a layer spans; EP is their product."""

    tp: int = 1
    dp: int = 1
    pcp: int = 1

    @property
    def ep(self) -> int:
        """Ranks of EP."""
        return self.tp * self.dp * self.pcp

    @classmethod
    def from_groups(cls, groups: ParallelGroups) -> "Topology":
        """The sizes of these groups.

        Raises:
            ValueError: EP is not DP x PCP x TP.

        Example::

            topology = mo.Topology.from_groups(mo.ParallelGroups.from_device_mesh(mesh))
        """
        topology = cls(groups.tp.size, groups.dp.size, groups.pcp.size)
        if groups.ep.size != topology.ep:
            raise ValueError(
                f"Topology.from_groups: ep must have DP * PCP * TP = {topology.ep} ranks, got {groups.ep.size}"
            )
        return topology


class CollectiveKind(enum.Enum):
    """What a collective does."""

    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    ALL_REDUCE = "all_reduce"


class Link(NamedTuple):
    """The time of a collective: ``latency + bytes / bandwidth`` (Hockney's model).

    Attributes:
        latency: seconds.
        bandwidth: bytes a second, of the bytes that a rank sends in a ring (or to each rank directly, in an all-to-all). A
            backend that sends more than that, as gloo's reduce-scatter does (twice), has a lower one.
    """

    latency: float
    bandwidth: float


class Calibration(NamedTuple):
    """A link for each kind of collective, the same on every rank: `moe_ops.calibrate` measures it."""

    all_gather: Link
    reduce_scatter: Link
    all_to_all: Link
    all_reduce: Link

    @classmethod
    def uniform(cls, *, latency: float, bandwidth: float) -> "Calibration":
        """The same link for every kind.

        Example: 20 us and 400 Gb/s::

            calibration = mo.Calibration.uniform(latency=20e-6, bandwidth=50e9)
        """
        return cls(*[Link(latency, bandwidth)] * len(cls._fields))


class RowCopies(NamedTuple):
    """Copies of rows that each EP rank sends to, and receives from, other ranks: `moe_ops.load.count_copies`."""

    sent: Sequence[float]
    received: Sequence[float]


class Collective(NamedTuple):
    """One collective of a form.

    Attributes:
        step: the step of the stage that it belongs to.
        kind: what it does.
        axis: the group that it spans.
        rows: what the rank that sends most sends; an expectation where the routing is not known.
        bytes_sent: likewise.
        bytes_received: of the rank that receives most.
        seconds: predicted, from the larger of the two.
    """

    step: str
    kind: CollectiveKind
    axis: str
    rows: float
    bytes_sent: float
    bytes_received: float
    seconds: float


class FormCost(NamedTuple):
    """What one form of the stage costs.

    Attributes:
        strategy: of the form.
        dispatch: of the form.
        collectives: in order.
        bytes_sent: of all of them, by the rank that sends most in all.
        seconds: of all of them, predicted.
    """

    strategy: Strategy
    dispatch: Dispatch
    collectives: tuple[Collective, ...]
    bytes_sent: float
    seconds: float

    @property
    def is_capturable(self) -> bool:
        """Whether a device graph can hold it."""
        return self.dispatch is not Dispatch.ALL_TO_ALL
