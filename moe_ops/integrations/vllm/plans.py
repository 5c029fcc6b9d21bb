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
from moe_ops.types import Dispatch, Reduction, Strategy


class Plan(NamedTuple):
    """The form of the stage in which a layer runs.

    Attributes:
        strategy: how tokens reach the ranks of their experts.
        dispatch: likewise; None: the strategy's own.
        groups: the ranks.
        tokens_are_sharded: whether the model hands each TP rank its own part of the tokens.
        overlap_gate: as in `moe_stage`.
        reason: why this strategy, for people.
    """

    strategy: Strategy
    dispatch: Dispatch | None
    groups: ParallelGroups
    tokens_are_sharded: bool
    overlap_gate: bool
    reason: str

    @property
    def needs_token_counts(self) -> bool:
        """Whether the stage depends on token counts: of other ranks, or on its own beyond the number of rows."""
        return self.strategy is not Strategy.ALLGATHER or self.groups.dp.size > 1

    @property
    def is_reduced(self) -> bool:
        """Whether the result is complete where a sum over TP could be open."""
        reduction = output_reduction(
            strategy=self.strategy, groups=self.groups, tokens_are_sharded=self.tokens_are_sharded
        )
        return self.groups.tp.size > 1 and reduction is Reduction.COMPLETE


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
    return Plan(
        strategy,
        None if is_gathered else dispatch,
        groups,
        config.is_sequence_parallel,
        is_gathered and not settings.packed_payload,
        reason,
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
