"""What a step's forward context says, as arguments: read once a layer, by one function, and passed on from there.

vllm-ascend's communication methods and the strategies of this library:

| ``MoECommType`` | strategy | rows |
|---|---|---|
| ALLGATHER | ALLGATHER, DP form | padded to ``max_tokens_across_dp`` |
| ALLGATHER, sequence parallel | ALLGATHER, EP form | those of each EP rank: the ``local_sizes`` of vLLM's ``DPMetadata`` |
| ALLTOALL | ALL2ALL | ``ceil(T / TP)`` |
| MC2 | MC2 | ``padded_num_tokens / TP``, with ``mc2_mask`` |
| FUSED_MC2 | none: it holds the experts, too | |
"""

from typing import Any

import torch
import torch.nn.functional as F
from vllm.forward_context import get_forward_context
from vllm_ascend.ascend_forward_context import _EXTRA_CTX, MoECommType

from moe_ops.types import Strategy

STRATEGIES = {
    MoECommType.ALLGATHER: Strategy.ALLGATHER,
    MoECommType.ALLTOALL: Strategy.ALL2ALL,
    MoECommType.MC2: Strategy.MC2,
}


def step_arguments(*, tokens_are_sharded: bool) -> dict[str, Any]:
    """The arguments of `moe_ops.prepare` and `moe_ops.moe_stage` that change from step to step.

    All that makes ranks agree is vllm-ascend's: it chooses the method, and the lengths, by what all of them know.

    Args:
        tokens_are_sharded: whether the model hands each TP rank its own part of the tokens; a property of the layer.

    Raises:
        ValueError: the step's method has no strategy here.
    """
    method = _EXTRA_CTX.moe_comm_type
    if method not in STRATEGIES:
        raise ValueError(f"moe_ops: moe_comm_type must be one of {[m.name for m in STRATEGIES]}, got {method}")
    arguments = {"strategy": STRATEGIES[method], "tokens_are_sharded": tokens_are_sharded}
    if method is MoECommType.MC2:
        return {**arguments, **_mc2_arguments(_EXTRA_CTX.padded_num_tokens, _EXTRA_CTX.mc2_mask)}
    if method is MoECommType.ALLGATHER and not tokens_are_sharded:
        return {**arguments, "max_tokens_across_dp": _EXTRA_CTX.max_tokens_across_dp}
    if method is MoECommType.ALLGATHER:
        metadata = get_forward_context().dp_metadata
        sizes = None if metadata is None else metadata.local_sizes
        return {**arguments, "num_tokens_across_ep": None if sizes is None else [int(size) for size in sizes]}
    return arguments


def _mc2_arguments(padded_num_tokens: int, mask: torch.Tensor | None) -> dict[str, Any]:
    """The mask is a slice of a buffer, which may end before the padded length: what is beyond it is padding."""
    if mask is not None and mask.shape[0] < padded_num_tokens:
        mask = F.pad(mask, (0, padded_num_tokens - mask.shape[0]))
    return {"padded_num_tokens": padded_num_tokens, "mc2_mask": mask}
