"""What a step's forward context says, as arguments: read once a call of a layer, by one function, and passed on from there.

vllm-ascend's communication methods and the strategies of this library:

| ``MoECommType`` | strategy | rows |
|---|---|---|
| ALLGATHER | ALLGATHER, DP form | padded to ``max_tokens_across_dp`` |
| ALLGATHER, sequence parallel | ALLGATHER, EP form | those of each EP rank: the ``local_sizes`` of vLLM's ``DPMetadata`` |
| ALLTOALL | ALL2ALL | ``ceil(T / TP)`` |
| MC2 | MC2 | ``padded_num_tokens / TP``, with ``mc2_mask`` |
| FUSED_MC2 | none: it holds the experts, too | |
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from vllm.forward_context import get_forward_context
from vllm_ascend.ascend_forward_context import _EXTRA_CTX, MoECommType

from moe_ops.types import Lengths, Strategy

STRATEGIES = {
    MoECommType.ALLGATHER: Strategy.ALLGATHER,
    MoECommType.ALLTOALL: Strategy.ALL2ALL,
    MoECommType.MC2: Strategy.MC2,
}


class Step(NamedTuple):
    """What changes from step to step."""

    strategy: Strategy
    lengths: Lengths


def read_step(*, tokens_are_sharded: bool) -> Step:
    """The strategy of this step, and what is known of token counts.

    All that makes ranks agree is vllm-ascend's: it chooses the method, and the lengths, by what all of them know.

    Args:
        tokens_are_sharded: whether the model hands each TP rank its own part of the tokens; a property of the layer.

    Raises:
        ValueError: the step's method has no strategy here.
    """
    method = _EXTRA_CTX.moe_comm_type
    if method not in STRATEGIES:
        raise ValueError(f"moe_ops: moe_comm_type must be one of {[m.name for m in STRATEGIES]}, got {method}")
    lengths = Lengths()
    if method is MoECommType.MC2:
        lengths = Lengths(mask=_whole_mask(_EXTRA_CTX.mc2_mask, _EXTRA_CTX.padded_num_tokens))
    elif method is MoECommType.ALLGATHER and not tokens_are_sharded:
        lengths = Lengths(longest=_EXTRA_CTX.max_tokens_across_dp)
    elif method is MoECommType.ALLGATHER:
        lengths = _lengths_of_shards()
    return Step(STRATEGIES[method], lengths)


def _whole_mask(mask: torch.Tensor, padded_num_tokens: int) -> torch.Tensor:
    """The mask of all rows: it is a slice of a buffer, which may end before the last row. What is beyond it is padding."""
    missing = padded_num_tokens - mask.shape[0]
    return F.pad(mask, (0, missing)) if missing > 0 else mask


def _lengths_of_shards() -> Lengths:
    """vLLM keeps the sizes only where there are several DP ranks; the shards of one have equal sizes."""
    metadata = get_forward_context().dp_metadata
    if metadata is None or metadata.local_sizes is None:
        return Lengths(equal=True)
    return Lengths(per_rank=[int(size) for size in metadata.local_sizes])
