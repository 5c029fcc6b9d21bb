"""The command line that the benchmarks have in common."""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.registry import Case, Effort, Table

ROUNDS, QUICK_ROUNDS = 41, 7


def run(
    program: str, cases: Mapping[str, Case], arguments: Sequence[str] | None = None, *, rounds: int = ROUNDS
) -> None:
    """Answer the cases that the arguments name, or all, and show the tables; ``--help`` lists the options."""
    options = _parser(program, cases).parse_args(arguments)
    effort = Effort(QUICK_ROUNDS if options.quick else rounds, options.quick)
    console = report.make_console()
    answers: list[tuple[Case, list[Table]]] = []
    for name in options.only or cases:
        case = cases[name]
        start = time.perf_counter()
        console.rule(f"{case.name}: {case.question}")
        found = case.function(effort)  # no spinner: it would take time of a core that the ranks need
        for table in found:
            report.show(console, table)
        console.print(f"{time.perf_counter() - start:.0f} s\n", highlight=False)
        answers.append((case, found))
    if options.markdown is not None:
        report.write_markdown(options.markdown, f"python -m {program}", answers)
    if options.plot is not None:
        drawn = report.plot(options.plot, [table for _, found in answers for table in found])
        console.print(f"plot: {options.plot if drawn else 'these cases have nothing to draw'}", highlight=False)


def _parser(program: str, cases: Mapping[str, Case]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the times")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="also write the tables as a page")
    parser.add_argument("--quick", action="store_true", help="few rounds and the smallest sizes alone")
    parser.add_argument("--only", action="append", choices=list(cases), help="run this case; may be repeated")
    return parser
