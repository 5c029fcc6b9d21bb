"""The Mixture-of-Experts stage as pure ``torch.library`` ops that compilers trace whole."""

from moe_ops import reference
from moe_ops.backends import npu_kernels as npu_kernels  # registers them
from moe_ops.calibration import calibrate
from moe_ops.cost_types import Calibration, LayerShape, Link, Topology
from moe_ops.dynamic import mark_token_axes, token_count
from moe_ops.groups import Group, ParallelGroups
from moe_ops.overlap import interleave
from moe_ops.packed_experts import prepack_experts
from moe_ops.quantize import dequantize_activations, quantize_activations
from moe_ops.quantized_weights import dequantize_weights, quantize_weights
from moe_ops.selection import select_strategy
from moe_ops.stage import moe_stage, moe_stage_steps, run_stage
from moe_ops.strategies import finalize, lay_out_like_prepared, output_reduction, prepare
from moe_ops.types import (
    Dispatch,
    ExpertWeights,
    Layout,
    Lengths,
    PrepareOutput,
    Quant,
    Reduction,
    Routing,
    SharedExperts,
    StageOutput,
    Strategy,
    WeightLayout,
)

__all__ = [
    "Calibration",
    "Dispatch",
    "ExpertWeights",
    "Group",
    "LayerShape",
    "Layout",
    "Lengths",
    "Link",
    "ParallelGroups",
    "PrepareOutput",
    "Quant",
    "Reduction",
    "Routing",
    "SharedExperts",
    "StageOutput",
    "Strategy",
    "Topology",
    "WeightLayout",
    "calibrate",
    "dequantize_activations",
    "dequantize_weights",
    "finalize",
    "interleave",
    "lay_out_like_prepared",
    "mark_token_axes",
    "moe_stage",
    "moe_stage_steps",
    "output_reduction",
    "prepack_experts",
    "prepare",
    "quantize_activations",
    "quantize_weights",
    "reference",
    "run_stage",
    "select_strategy",
    "token_count",
]
