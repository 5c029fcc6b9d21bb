"""Benchmark of vLLM with the plugin against vLLM without: ``python -m benchmarks.vllm``; ``--help`` lists the options."""

from collections.abc import Sequence

from benchmarks import runner
from benchmarks.cases import SERVING

ROUNDS = 7


def main(arguments: Sequence[str] | None = None) -> None:
    runner.run("benchmarks.vllm", SERVING, arguments, rounds=ROUNDS)


if __name__ == "__main__":
    main()
