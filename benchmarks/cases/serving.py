"""vLLM with the plugin against vLLM without, on the same model: engines that live side by side, and are asked in turn."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.engines import (
    LONGEST,
    Load,
    Memory,
    Serving,
    end_engine,
    make_engine,
    read_memory,
    run_load,
)
from benchmarks.layer import DTYPES, EXPERTS, HIDDEN, INTERMEDIATE, SIZES, TOP_K
from benchmarks.ranks import Ranks
from benchmarks.registry import Aim, Case, Effort, Table
from benchmarks.standings import name_of
from benchmarks.timing import Timing, median, slowest
from moe_ops.demo_vllm.checkpoint import write_checkpoint
from moe_ops.demo_vllm.environment import ENVIRONMENT, IN_PROCESS

LAYERS = 4
STOCK = Serving("vLLM", plugin=False)
AGAIN = Serving("vLLM again", plugin=False)
PLUGIN = Serving("plugin", plugin=True)
ENGINES = {1: (STOCK, AGAIN, PLUGIN), 2: (STOCK, AGAIN, PLUGIN, Serving("plugin, EP", plugin=True, ep=True))}
"""By TP ranks. A second engine like the first shows by how much equal ones differ. vLLM has no EP on a CPU."""
LOADS = {
    "decode, 1 request": Load(1, 8, 16),
    "decode, 8 requests": Load(8, 8, 16),
    "prefill, 64 tokens": Load(1, 64, 0),
    "prefill, 512 tokens": Load(1, 512, 0),
}
MODES = ("eager", "compiled")


class Setting(NamedTuple):
    """What engines that are compared have in common."""

    ranks: int
    dtype: torch.dtype
    mode: str


class Answer(NamedTuple):
    """What one engine took, by load: the rank that took longest, and the one that has most in memory."""

    timings: dict[str, Timing]
    memory: Memory


def measure_serving(effort: Effort) -> list[Table]:
    answers = _answers(effort)
    model = f"Qwen3-MoE, {LAYERS} layers, {SIZES}; one thread a rank"
    columns = ("TP ranks", "dtype", "mode", "load", "engine", "vLLM ms", "ms", "ratio", "CPU ratio")
    note = "Of a step, wall time. vLLM: without the plugin; again: a second engine of that kind."
    times = Table(f"Time: {model}", columns, note, num_labels=5, aim=Aim("ratio", 1.0), is_aimed=_is_plugin)
    memory = Table(
        f"Memory: {model}",
        ("TP ranks", "dtype", "mode", "engine", "vLLM MB", "MB", "ratio", "vLLM peak MB", "peak MB", "peak ratio"),
        "Resident in a rank after its work, and at most; most of it is weights, vLLM and torch.",
        num_labels=4,
        aim=Aim("ratio", 1.0),
        is_aimed=_is_plugin,
    )
    for (ranks, dtype, mode), (stock, *others) in answers.items():
        for serving, answer in zip(ENGINES[ranks][1:], others, strict=True):
            for load, ours in answer.timings.items():
                theirs = stock.timings[load]
                ratios = ours.wall / theirs.wall, ours.cpu / theirs.cpu
                times.add(ranks, name_of(dtype), mode, load, serving.name, theirs.wall * 1e3, ours.wall * 1e3, *ratios)
            cells = []
            for before, now in zip(stock.memory, answer.memory, strict=True):
                cells += [before / 1e6, now / 1e6, now / before]
            memory.add(ranks, name_of(dtype), mode, serving.name, *cells)
    return [times, memory]


def _is_plugin(row: dict[str, str | float]) -> bool:
    return row["engine"] != AGAIN.name


def _answers(effort: Effort) -> dict[Setting, list[Answer]]:
    """Of the engines of each setting."""
    answers = {}
    os.environ.update(ENVIRONMENT | IN_PROCESS)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "model")
        write_checkpoint(
            model,
            "qwen3_moe",
            torch.bfloat16,
            vocab_size=512,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            moe_intermediate_size=INTERMEDIATE,
            norm_topk_prob=True,
            max_position_embeddings=LONGEST,
        )
        for ranks in ENGINES:
            for dtype in DTYPES[: 1 if effort.is_quick else None]:
                for mode in MODES:
                    setting = Setting(ranks, dtype, mode)
                    answers[setting] = _compare(str(model), setting, effort)
    return answers


def _compare(model: str, setting: Setting, effort: Effort) -> list[Answer]:
    engines = ENGINES[setting.ranks]
    with ExitStack() as stack:
        pools = [stack.enter_context(Ranks(setting.ranks)) for _ in engines]
        for number, (pool, serving) in enumerate(zip(pools, engines, strict=True)):
            pool.run(make_engine, model, serving, name_of(setting.dtype), setting.mode == "eager", number)
        rounds: list[dict[str, list[Timing]]] = [{name: [] for name in LOADS} for _ in engines]
        turn = list(zip(pools, rounds, strict=True))
        for number in range(effort.rounds + 1):
            for name, load in LOADS.items():
                for pool, timings in turn:
                    found = slowest([{name: timing} for timing in pool.run(run_load, load)])
                    if number > 0:  # the first warms up
                        timings[name].append(found[name])
            turn.append(turn.pop(0))  # so that each has each place
        answers = [
            Answer({name: median(of_load) for name, of_load in timings.items()}, _most(pool.run(read_memory)))
            for pool, timings in zip(pools, rounds, strict=True)
        ]
        for pool in pools:
            pool.run(end_engine)
    return answers


def _most(memory: list[Memory]) -> Memory:
    return Memory(max(rank.now for rank in memory), max(rank.peak for rank in memory))


CASE = Case("serving", "Is vLLM with the plugin as fast as without, and no larger?", measure_serving)
