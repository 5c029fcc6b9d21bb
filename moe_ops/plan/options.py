"""The options of `moe-ops plan`, and what is asked by them."""

import argparse
from pathlib import Path

import torch

from moe_ops.backends.ascend_rules import DeviceFamily
from moe_ops.cost_types import Calibration, LayerShape, Topology
from moe_ops.costs import check_shapes
from moe_ops.plan.models import PRESETS, Model, read_config
from moe_ops.plan.plans import Request
from moe_ops.plan.ranks import calibrate_here
from moe_ops.types import Quant

LATENCY_US, BANDWIDTH_GBPS = 20.0, 400.0
"""Round numbers for one 400 Gb/s port a rank; nothing that was measured."""

SIZES = ("hidden_size", "intermediate_size", "num_experts", "top_k")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them to the parser of the subcommand."""
    _add_model_options(parser.add_argument_group("the layer: --model, --config, or its four sizes"))
    where = parser.add_argument_group("the topology: EP is the product of its axes")
    for axis, meaning in {"tp": "tensor", "dp": "data", "pcp": "prefill context"}.items():
        where.add_argument(f"--{axis}", type=int, default=1, metavar="N", help=f"{meaning} parallelism (default: 1)")
    where.add_argument(
        "--sharded", action="store_true", help="tokens are a sequence-parallel shard on each TP rank already"
    )
    what = parser.add_argument_group("the batch")
    what.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[64, 4096],
        metavar="N",
        help="tokens of a TP group; a table for each (default: 64 4096)",
    )
    what.add_argument(
        "--routing",
        default="uniform",
        metavar="HOW",
        help="uniform, zipf:EXPONENT (both drawn, always the same), or a file with a saved tensor of topk_ids "
        "[tokens, top-k] (default: %(default)s)",
    )
    time = parser.add_argument_group("how long collectives take")
    time.add_argument("--calibrate", type=int, metavar="N", help="measure it on N gloo ranks of this machine")
    time.add_argument("--latency-us", type=float, metavar="US", help=f"of each (default: {LATENCY_US:g}, nominal)")
    time.add_argument(
        "--bandwidth-gbps",
        type=float,
        metavar="GBPS",
        help=f"gigabits a second that a rank sends (default: {BANDWIDTH_GBPS:g}, nominal)",
    )
    choice = parser.add_argument_group("the choice")
    choice.add_argument("--capturable", action="store_true", help="choose among forms that a device graph can hold")
    choice.add_argument(
        "--device", choices=[family.value for family in DeviceFamily], help="show vllm-ascend's rule for it, too"
    )
    choice.add_argument(
        "--mc2-capacity",
        type=int,
        metavar="N",
        help="tokens of a TP group that MC2 holds, for that rule (default: the most of --tokens that its kernel takes)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw times and bytes over tokens (matplotlib)")


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", choices=list(PRESETS))
    group.add_argument("--config", type=Path, metavar="PATH", help="a Hugging Face config.json")
    for name in SIZES:
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    group.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the activations (default: %(default)s)",
    )
    group.add_argument(
        "--quant",
        choices=[quant.value for quant in Quant],
        default="none",
        help="of activations that travel (default: %(default)s)",
    )


def read_request(options: argparse.Namespace) -> Request:
    """What the options ask for; with ``--calibrate`` this measures.

    Raises:
        ValueError: options do not go together, or one is out of range.
        OSError: a file cannot be read.
    """
    model = _model(options)
    layer = LayerShape(
        hidden_size=model.hidden_size,
        num_experts=model.num_experts,
        top_k=model.top_k,
        dtype=getattr(torch, options.dtype),
        quant=Quant(options.quant),
    )
    topology, tokens = Topology(tp=options.tp, dp=options.dp, pcp=options.pcp), tuple(sorted(set(options.tokens)))
    check_shapes("plan", layer, topology, tokens[0])
    _check_capacity(options)
    calibration, source = _calibration(options)
    return Request(
        model=model,
        layer=layer,
        topology=topology,
        tokens=tokens,
        calibration=calibration,
        calibration_source=source,
        routing=options.routing,
        tokens_are_sharded=options.sharded,
        must_be_capturable=options.capturable,
        device=None if options.device is None else DeviceFamily(options.device),
        capacity=options.mc2_capacity,
    )


def _model(options: argparse.Namespace) -> Model:
    sizes = {name: getattr(options, name) for name in SIZES}
    given = [f"--{name.replace('_', '-')}" for name, size in sizes.items() if size is not None]
    ways = [f"--{name}" for name in ("model", "config") if getattr(options, name) is not None]
    if len(ways) + bool(given) != 1:
        got = ", ".join(ways + given) or "none of them"
        raise ValueError(f"the layer must be given by --model, --config or its four sizes, got {got}")
    if options.model is not None:
        return PRESETS[options.model]
    if options.config is not None:
        return read_config(options.config)
    if len(given) < len(SIZES):
        missing = ", ".join(f"--{name.replace('_', '-')}" for name, size in sizes.items() if size is None)
        raise ValueError(f"all four sizes must be given, got no {missing}")
    if sizes["intermediate_size"] < 1:
        raise ValueError(f"--intermediate-size must be at least 1, got {sizes['intermediate_size']}")
    return Model("layer", **sizes)


def _check_capacity(options: argparse.Namespace) -> None:
    capacity = options.mc2_capacity
    if capacity is not None and options.device is None:
        raise ValueError(f"--mc2-capacity must go with --device, got {capacity} without it")
    if capacity is not None and capacity < 0:
        raise ValueError(f"--mc2-capacity must be 0 or more, got {capacity}")


def _calibration(options: argparse.Namespace) -> tuple[Calibration, str]:
    latency, bandwidth = options.latency_us, options.bandwidth_gbps
    if options.calibrate is not None:
        if latency is not None or bandwidth is not None:
            raise ValueError("--calibrate measures what --latency-us and --bandwidth-gbps say, got both")
        if options.calibrate < 2:
            raise ValueError(f"--calibrate must be 2 ranks or more, got {options.calibrate}")
        return calibrate_here(options.calibrate), f"measured on {options.calibrate} gloo ranks of this machine"
    source = "nominal, not measured" if latency is None and bandwidth is None else "as given"
    latency = LATENCY_US if latency is None else latency
    bandwidth = BANDWIDTH_GBPS if bandwidth is None else bandwidth
    if not 0 <= latency < float("inf"):
        raise ValueError(f"--latency-us must be 0 or more, got {latency:g}")
    if not 0 < bandwidth < float("inf"):
        raise ValueError(f"--bandwidth-gbps must be more than 0, got {bandwidth:g}")
    return Calibration.uniform(latency=latency * 1e-6, bandwidth=bandwidth * 1e9 / 8), source
