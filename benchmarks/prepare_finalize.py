"""Benchmark of prepare and finalize: ``python -m benchmarks.prepare_finalize``; ``--help`` lists the options."""

from collections.abc import Sequence

from benchmarks import runner
from benchmarks.cases import PREPARE_FINALIZE


def main(arguments: Sequence[str] | None = None) -> None:
    runner.run("benchmarks.prepare_finalize", PREPARE_FINALIZE, arguments)


if __name__ == "__main__":
    main()
