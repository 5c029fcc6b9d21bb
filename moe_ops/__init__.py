"""The Mixture-of-Experts stage as pure ``torch.library`` ops that compilers trace whole."""

from moe_ops import reference
from moe_ops.dynamic import mark_token_axes, token_count
from moe_ops.groups import Group, ParallelGroups
from moe_ops.quantize import dequantize_activations, quantize_activations
from moe_ops.stage import moe_stage
from moe_ops.strategies import finalize, lay_out_like_prepared, output_reduction, prepare
from moe_ops.types import ExpertWeights, PrepareOutput, Quant, Reduction, Routing, Strategy

__all__ = [
    "ExpertWeights",
    "Group",
    "ParallelGroups",
    "PrepareOutput",
    "Quant",
    "Reduction",
    "Routing",
    "Strategy",
    "dequantize_activations",
    "finalize",
    "lay_out_like_prepared",
    "mark_token_axes",
    "moe_stage",
    "output_reduction",
    "prepare",
    "quantize_activations",
    "reference",
    "token_count",
]
