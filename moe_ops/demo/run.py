"""The demo from start to end: expected results, four ranks, a verdict."""

import os
import sys
import tempfile
import time

import torch
from rich.console import Console
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessException, spawn

from moe_ops.demo import report
from moe_ops.demo.cases import DP, EP, FORMS, TP, Family
from moe_ops.demo.families import build_families
from moe_ops.demo.ranks import Measurement, run_rank


def run(*, backend: str, dtype: str) -> int:
    """Build the families, run them on the ranks, show what they found. Returns the exit status."""
    console = report.make_console()
    console.print(
        f"Computing the blocks of Qwen3-MoE, Mixtral and DeepSeek-V3 ({dtype}) with transformers, on one process",
        highlight=False,
    )
    return run_families(build_families(getattr(torch, dtype)), backend=backend, console=console)


def run_families(families: list[Family], *, backend: str, console: Console) -> int:
    """Run the families on the ranks and show what they found.

    Returns:
        0 if every rank agrees with every expected result and compiled each form once, else 1.
    """
    console.print(
        f"Running them on {EP} gloo ranks: DP {DP} x TP {TP}, EP {EP}; torch.compile, {backend}, fullgraph=True",
        highlight=False,
    )
    start = time.perf_counter()
    try:
        measurements = _measure(families, backend, console)
    except ProcessException as error:
        print(f"moe-ops demo: rank {error.error_index} failed: {error}", file=sys.stderr)
        return 1
    failures = report.find_failures(families, measurements)
    for family in families:
        console.print(report.make_table(family, measurements))
    verdict = report.summarize(families, failures, time.perf_counter() - start)
    console.print(verdict, style="bold red" if failures else "bold green", markup=False, highlight=False)
    return 1 if failures else 0


def _measure(families: list[Family], backend: str, console: Console) -> list[Measurement]:
    """Start the ranks and collect what they send until they end.

    Raises:
        ProcessException: a rank raised or died; the others have been ended.
    """
    total = EP * sum(len(family.cases(form)) for family in families for form in FORMS)
    sink = get_context("spawn").SimpleQueue()
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory() as folder, report.Watch(console, families, total) as watch:
        ranks = spawn(run_rank, (families, backend, os.path.join(folder, "store"), sink), nprocs=EP, join=False)
        try:
            is_over = False
            while not is_over:
                is_over = ranks.join(timeout=0.1, grace_period=2)
                while not sink.empty():
                    measurements.append(sink.get())
                    watch.show(measurements)
        finally:
            for process in ranks.processes:
                process.kill()  # does nothing to those that have ended
    return measurements
