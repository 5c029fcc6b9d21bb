"""The demo from start to end: vLLM on one rank, vLLM with the plugin on two, what both generated, and a verdict."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from moe_ops.demo_vllm.checkpoint import write_checkpoint
from moe_ops.demo_vllm.engine import GRAPHS, Job
from moe_ops.demo_vllm.environment import ENVIRONMENT
from moe_ops.integrations.vllm import VARIABLE

LAYERS, EXPERTS, TOP_K = 2, 8, 2
STRATEGIES = "allgather", "all2all"
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12]]
MAX_TOKENS = 12
TIMEOUT = 600  # seconds of an engine, most of which is starting and compiling


class Served(NamedTuple):
    """What an engine generated for each prompt, and the nodes of the graphs that were compiled in any of its processes."""

    tokens: list[list[int]]
    graphs: list[list[str]]


def run() -> int:
    """Serve the model without the plugin, and with it by each strategy, and show what came out.

    Returns:
        0 if the tokens are the same, and each rank with the plugin has one graph, with the stage in it, else 1.
    """
    start = time.perf_counter()
    print(
        f"Qwen3-MoE with random weights: {LAYERS} layers, {EXPERTS} experts, top-{TOP_K}, float32; Inductor\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "model")
        write_checkpoint(
            model,
            "qwen3_moe",
            vocab_size=512,
            hidden_size=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            moe_intermediate_size=64,
            max_position_embeddings=512,
        )
        try:
            stock = _serve(Path(directory, "stock"), model, tp=1, strategy=None)
            _show("vLLM, 1 rank", stock)
            failures = []
            for strategy in STRATEGIES:
                ours = _serve(Path(directory, strategy), model, tp=2, strategy=strategy)
                _show(f"vLLM with moe_ops, 2 ranks, TP2 and EP2, {strategy}", ours)
                failures += [f"{strategy}: {failure}" for failure in _find_failures(stock, ours)]
        except RuntimeError as error:
            print(f"moe-ops demo-vllm: {error}", file=sys.stderr)
            return 1
    verdict = "\n".join([*failures, f"failures: {len(failures)}"]) if failures else "All generate the same tokens"
    print(f"{verdict} ({time.perf_counter() - start:.0f} s)")
    return 1 if failures else 0


def _serve(directory: Path, model: Path, *, tp: int, strategy: str | None) -> Served:
    """Run a program of its own to its end: with the plugin, if it is given a strategy.

    Raises:
        RuntimeError: it failed; the message ends as its log does.
    """
    graphs, answer, log = directory / "graphs", directory / "answer.json", directory / "log"
    graphs.mkdir(parents=True)
    job = Job(str(model), PROMPTS, MAX_TOKENS, tp, str(answer))
    plugin = {VARIABLE: "0"} if strategy is None else {VARIABLE: "1", f"{VARIABLE}_STRATEGY": strategy}
    try:
        with log.open("w") as lines:
            subprocess.run(
                [sys.executable, "-m", "moe_ops.demo_vllm.engine", json.dumps(job._asdict())],
                env={**os.environ, **ENVIRONMENT, **plugin, GRAPHS: str(graphs)},
                stdin=subprocess.DEVNULL,
                stdout=lines,
                stderr=lines,
                timeout=TIMEOUT,
                check=True,
            )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{error}\n{log.read_text()[-4000:]}") from error
    return Served(json.loads(answer.read_text()), [json.loads(path.read_text()) for path in graphs.iterdir()])


def _show(title: str, served: Served) -> None:
    print(title)
    for prompt, tokens in zip(PROMPTS, served.tokens, strict=True):
        print(f"  {len(prompt):2} tokens -> {' '.join(map(str, tokens))}")
    print(f"  graphs compiled: {len(served.graphs)}; custom ops and collectives in each:")
    for graph in served.graphs[:1]:
        for name, count in _count_ops(graph).items():
            print(f"  {count:4} {name}")
    print(flush=True)


def _count_ops(graph: list[str]) -> Counter[str]:
    """How often an op of vLLM's, of this library's or a collective of torch's is a node of the graph."""
    return Counter(name for name in graph if re.match(r"(vllm|_C|moe_ops|_c10d_functional)\.", name))


def _find_failures(stock: Served, ours: Served) -> list[str]:
    failures = []
    if ours.tokens != stock.tokens:
        failures.append("the tokens differ")
    if len(ours.graphs) != 2:
        failures.append(f"2 ranks compiled {len(ours.graphs)} graphs, not 2")
    if any(_count_ops(graph)["moe_ops.route.default"] != LAYERS for graph in ours.graphs):
        failures.append("the stage is not in the graphs")
    return failures
