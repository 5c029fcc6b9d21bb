"""The experts of a layer, on one process and one thread, against peers."""

import time

import torch

import moe_ops as mo
from benchmarks import ours, peers
from benchmarks.layer import DECODE, SIZES, make_batch, make_weights, touched_bytes
from benchmarks.ranks import Ranks
from benchmarks.registry import Case, Effort, Table
from benchmarks.standings import Contest, name_of, ratio_table, standings, time_tables

CONTEST = Contest(f"Experts, {SIZES}", 1, (*ours.EXPERTS_ENTRIES, *peers.EXPERTS_ENTRIES), limit=1.0)
READS = 15


def measure_experts(effort: Effort) -> list[Table]:
    return [*time_tables(CONTEST, effort), ratio_table(CONTEST, effort, lambda row: True), _limit_table(effort)]


def _limit_table(effort: Effort) -> Table:
    """Decode can be no faster than the weights of the chosen experts are read."""
    columns = ("dtype", "T", "MB", "GB/s", "read ms", "ours ms", "ours / read", "fastest peer / read")
    note = (
        "MB: weights of the experts that have a token. GB/s: the fastest of several reads of as many bytes, one thread."
    )
    table = Table("Decode: the time that it takes to read the weights", columns, note, num_labels=2)
    with Ranks(1) as ranks:
        for row in standings(CONTEST, effort):
            if row.tokens in DECODE:
                num_bytes, seconds = ranks.run(_time_read, row.dtype, row.tokens)[0]
                best = row.times[row.ours].wall
                rates = (num_bytes / 1e6, num_bytes / seconds / 1e9, 1e3 * seconds)
                rival = row.times[row.rival].wall / seconds if row.rival else "-"
                table.add(name_of(row.dtype), row.tokens, *rates, 1e3 * best, best / seconds, rival)
    return table


def _time_read(_: mo.Group, dtype: torch.dtype, tokens: int) -> tuple[int, float]:
    """Bytes of the weights of the experts that a batch chooses, and seconds to read as many."""
    num_bytes = touched_bytes(make_batch(dtype, tokens, 0), make_weights(dtype))
    matrix, vector = torch.ones(num_bytes // 4096, 1024), torch.ones(1024)
    seconds = []
    for _ in range(READS):
        start = time.perf_counter()
        matrix @ vector
        seconds.append(time.perf_counter() - start)
    return num_bytes, min(seconds)


CASE = Case("experts", "Are the experts as fast as those of peers?", measure_experts)
