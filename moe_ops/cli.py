"""The console script `moe-ops`."""

import argparse
import logging
import sys
from collections.abc import Sequence

DEMO_PACKAGES = ("rich", "transformers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        logging.disable(logging.WARNING)  # transformers loads what it finds, and some of that complains
        from moe_ops.demo import run  # needs more packages than the library does
    except ImportError as error:  # a package is missing or too old
        if (error.name or "").partition(".")[0] not in DEMO_PACKAGES:
            raise
        print(f"moe-ops demo: {error}. Get what it needs with: pip install moe-ops[demo]", file=sys.stderr)
        return 2
    finally:
        logging.disable(logging.NOTSET)
    return run.run(backend=options.backend, dtype=options.dtype)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moe-ops", description="Mixture-of-Experts stages as pure PyTorch ops.")
    commands = parser.add_subparsers(required=True, metavar="command")
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
    return parser


if __name__ == "__main__":
    sys.exit(main())
