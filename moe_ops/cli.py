"""The console script `moe-ops`."""

import argparse
import logging
import sys
from collections.abc import Sequence

from moe_ops.plan.options import add_options

# Packages that the library does without: the extra that brings each.
EXTRAS = {
    "rich": {"demo": "demo", "plan": "plan"},
    "transformers": {"demo": "demo", "demo-vllm": "vllm"},
    "vllm": {"demo-vllm": "vllm"},
    "matplotlib": {"plan": "plot"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except ImportError as error:  # a package is missing or too old
        extra = EXTRAS.get((error.name or "").partition(".")[0], {}).get(options.command)
        if extra is None:
            raise
        print(
            f"moe-ops {options.command}: {error}. Get what it needs with: pip install moe-ops[{extra}]",
            file=sys.stderr,
        )
        return 2


def _demo(options: argparse.Namespace) -> int:
    try:
        logging.disable(logging.WARNING)  # transformers loads what it finds, and some of that complains
        from moe_ops.demo import run  # needs more packages than the library does
    finally:
        logging.disable(logging.NOTSET)
    return run.run(backend=options.backend, dtype=options.dtype)


def _demo_vllm(options: argparse.Namespace) -> int:
    import vllm  # noqa: F401  # or the first engine would say that it is missing

    from moe_ops.demo_vllm import run

    return run.run()


def _plan(options: argparse.Namespace) -> int:
    from moe_ops.plan import run

    return run.run(options)


COMMANDS = {"demo": _demo, "demo-vllm": _demo_vllm, "plan": _plan}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moe-ops", description="Mixture-of-Experts stages as pure PyTorch ops.")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    about = (
        "run the MoE blocks of Qwen3-MoE, Mixtral and DeepSeek-V3 on 4 gloo ranks and compare them with transformers"
    )
    demo = commands.add_parser("demo", help=about, description=f"{about[0].upper()}{about[1:]}.")
    demo.add_argument(
        "--backend",
        choices=("inductor", "aot_eager", "eager"),
        default="inductor",
        help="backend of torch.compile (default: %(default)s)",
    )
    demo.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights and tokens (default: %(default)s)",
    )
    about = "serve a tiny Qwen3-MoE by vLLM on 2 ranks with the plugin, and compare it with vLLM on one"
    commands.add_parser("demo-vllm", help=about, description=f"{about[0].upper()}{about[1:]}.")
    about = "print what each strategy sends for a model on a topology, how long that takes, and which to choose"
    add_options(commands.add_parser("plan", help=about, description=f"{about[0].upper()}{about[1:]}."))
    return parser


if __name__ == "__main__":
    sys.exit(main())
