"""Benchmark of the experts and the whole stage against peers: ``python -m benchmarks.stage``; ``--help`` lists the options."""

from collections.abc import Sequence

from benchmarks import runner
from benchmarks.cases import STAGE

ROUNDS = 11  # a call takes milliseconds here


def main(arguments: Sequence[str] | None = None) -> None:
    runner.run("benchmarks.stage", STAGE, arguments, rounds=ROUNDS)


if __name__ == "__main__":
    main()
