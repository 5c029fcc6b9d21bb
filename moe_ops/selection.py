"""Which strategy: the form of the stage with the least predicted cost.

A pure function: ranks that are given the same choose the same. Nothing is read but the arguments, so whoever calls it passes
what all ranks know (the largest token count of any rank, not its own).
"""

from typing import NamedTuple

from moe_ops.cost_types import Calibration, FormCost, LayerShape, RowCopies, Topology
from moe_ops.costs import predict_costs
from moe_ops.types import Dispatch, Strategy


class Selection(NamedTuple):
    """What `select_strategy` chose: `strategy` and `dispatch` go into a `Layout` as they are.

    Attributes:
        strategy: the choice.
        dispatch: likewise.
        reason: why, for people.
        costs: of every form, those that were not allowed included, in the order of `moe_ops.costs.FORMS`.
    """

    strategy: Strategy
    dispatch: Dispatch
    reason: str
    costs: tuple[FormCost, ...]


def select_strategy(
    layer: LayerShape,
    topology: Topology,
    num_tokens: int,
    *,
    calibration: Calibration,
    tokens_are_sharded: bool = False,
    must_be_capturable: bool = False,
    copies: RowCopies | None = None,
) -> Selection:
    """The form of the stage with the least predicted time; of equal ones the first of `moe_ops.costs.FORMS`.

    Every rank chooses the same if every rank passes the same: `num_tokens` is the largest count of any rank, and `calibration`
    is one that all share, as `calibrate` returns it.

    Args:
        layer: its shape.
        topology: sizes of the axes.
        num_tokens: tokens of the TP group that has most.
        calibration: how long collectives take.
        tokens_are_sharded: as `Layout` has it; each TP rank then brings ``ceil(num_tokens / TP)`` tokens.
        must_be_capturable: leave out ALL_TO_ALL, which reads on the host.
        copies: what the routing really sends (`moe_ops.load.count_copies`); None: what is expected if all choices are equally
            likely.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example: chosen once, for the longest batch of all ranks::

        layer = mo.LayerShape(hidden_size=4096, num_experts=128, top_k=8)
        topology = mo.Topology.from_groups(groups)
        choice = mo.select_strategy(layer, topology, 4096, calibration=mo.calibrate(groups.ep))
        layout = mo.Layout(choice.strategy, groups, choice.dispatch)
    """
    costs = predict_costs(
        layer,
        topology,
        num_tokens,
        calibration=calibration,
        tokens_are_sharded=tokens_are_sharded,
        copies=copies,
    )
    allowed = [cost for cost in costs if cost.is_capturable or not must_be_capturable]
    best = min(allowed, key=lambda cost: cost.seconds)  # the first of equal ones
    reason = _compare(best, [cost for cost in allowed if cost is not best])
    if must_be_capturable:
        reason += "; ALL_TO_ALL cannot be captured"
    return Selection(best.strategy, best.dispatch, reason, costs)


def _compare(best: FormCost, others: list[FormCost]) -> str:
    if not best.collectives:
        return "nothing is sent"
    reason = f"least predicted time, {_microseconds(best)}"
    slower = sorted((cost for cost in others if cost.seconds > best.seconds), key=lambda cost: cost.seconds)
    equal = [_name(cost) for cost in others if cost.seconds == best.seconds]
    if equal:
        reason += f", as {' and '.join(equal)}"
    return f"{reason}; next {_name(slower[0])}, {_microseconds(slower[0])}" if slower else reason


def _name(cost: FormCost) -> str:
    return f"{cost.strategy.name} {cost.dispatch.name}"


def _microseconds(cost: FormCost) -> str:
    return f"{1e6 * cost.seconds:,.1f} us"
