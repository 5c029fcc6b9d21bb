"""Experts on weights that a faster kernel has packed, once, when the model is loaded."""

from moe_ops.backends import packer_for
from moe_ops.types import ExpertWeights


def prepack_experts(experts: ExpertWeights) -> ExpertWeights:
    """The same experts, packed for the fastest kernel that there is for them; as they are, where that reads plain weights.

    Packed weights take about as much memory as plain ones, and only the experts read them: drop the others. They have no
    gradient. Which weights are packed where is said in docs/experts.md.

    Args:
        experts: in any dtype that experts have.

    Returns:
        The experts; `layout` says how they lie in memory.

    Example::

        experts = mo.prepack_experts(mo.ExpertWeights(w13, w2))
    """
    pack = packer_for(experts)
    return experts if pack is None else pack(experts)
