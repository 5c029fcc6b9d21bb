"""How the tokens of a layer reach its experts: decided once, when the layer is made."""

from functools import cache
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig

from moe_ops.calibration import calibrate
from moe_ops.cost_types import Calibration, LayerShape, Topology
from moe_ops.groups import Group, ParallelGroups
from moe_ops.integrations.vllm.groups import groups_of
from moe_ops.integrations.vllm.settings import Settings
from moe_ops.selection import select_strategy
from moe_ops.strategies import output_reduction
from moe_ops.types import Dispatch, Layout, Reduction, Strategy


class Plan(NamedTuple):
    """How a layer runs. All of it is decided beforehand, because compiled code reads it.

    Attributes:
        layout: how the stage is laid over ranks.
        overlap_gate: as in `moe_stage`.
        needs_token_counts: whether the stage needs to know token counts: those of other ranks, or what its own pads to.
        is_reduced: whether there is a TP group and the result is already summed over it.
        reason: why this strategy, for people.
    """

    layout: Layout
    overlap_gate: bool
    needs_token_counts: bool
    is_reduced: bool
    reason: str


def plan_for(config: Any, settings: Settings, vllm_config: VllmConfig) -> Plan:
    """The plan of a layer; all ranks make the same.

    Args:
        config: its ``FusedMoEConfig``.
        settings: the user's.
        vllm_config: that of the engine.
    """
    groups = groups_of(config.moe_parallel_config)
    strategy, dispatch, reason = _choose(config, settings, vllm_config, groups)
    is_gathered = strategy is Strategy.ALLGATHER
    layout = Layout(
        strategy,
        groups,
        None if is_gathered else dispatch,
        tokens_are_sharded=config.is_sequence_parallel,
    )
    return Plan(
        layout,
        overlap_gate=is_gathered and not settings.packed_payload,
        needs_token_counts=not is_gathered or layout.tokens_are_sharded or groups.dp.size > 1,
        is_reduced=groups.tp.size > 1 and output_reduction(layout) is Reduction.COMPLETE,
        reason=reason,
    )


def _choose(
    config: Any, settings: Settings, vllm_config: VllmConfig, groups: ParallelGroups
) -> tuple[Strategy, Dispatch | None, str]:
    if groups.ep.size == 1:
        return Strategy.ALLGATHER, None, "its experts are not divided among ranks"
    if config.skip_final_all_reduce:
        return Strategy.ALLGATHER, None, "the model sums over TP later, so the result may not be complete"
    if settings.strategy is not None:
        return settings.strategy, settings.dispatch, "chosen by the user"
    layer = LayerShape(
        config.hidden_dim, num_experts=config.num_experts, top_k=config.experts_per_token, dtype=config.in_dtype
    )
    device = vllm_config.device_config.device
    selection = select_strategy(
        layer,
        Topology.from_groups(groups),
        vllm_config.scheduler_config.max_num_seqs,
        calibration=_calibration(groups.ep, device),
        tokens_are_sharded=config.is_sequence_parallel,
        must_be_capturable=device.type != "cpu",
    )
    return selection.strategy, settings.dispatch or selection.dispatch, selection.reason


@cache
def _calibration(ep: Group, device: torch.device) -> Calibration:
    return calibrate(ep, device=device)
