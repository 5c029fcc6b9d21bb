"""Benchmark of prepare and finalize: ``python -m benchmarks.prepare_finalize``; ``--help`` lists the options."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.cases import CASES
from benchmarks.registry import Effort, Table

ROUNDS, QUICK_ROUNDS = 41, 7


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    effort = Effort(QUICK_ROUNDS if options.quick else ROUNDS, options.quick)
    console = report.make_console()
    tables: list[Table] = []
    for name in options.only or CASES:
        case = CASES[name]
        start = time.perf_counter()
        console.rule(f"{case.name}: {case.question}")
        found = case.function(effort)  # no spinner: it would take time of a core that the ranks need
        for table in found:
            report.show(console, table)
        console.print(f"{time.perf_counter() - start:.0f} s\n", highlight=False)
        tables += found
    if options.plot is not None:
        drawn = options.plot if report.plot(options.plot, tables) else "these cases have nothing to draw"
        console.print(f"plot: {drawn}", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare_finalize")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the times")
    parser.add_argument("--quick", action="store_true", help="few rounds and the smallest sizes alone")
    parser.add_argument("--only", action="append", choices=list(CASES), help="run this case; may be repeated")
    return parser


if __name__ == "__main__":
    main()
