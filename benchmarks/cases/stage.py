"""The whole layer, router included, on two ranks that share the experts out, against TorchTitan's."""

import torch

from benchmarks import ours, peers
from benchmarks.layer import SIZES
from benchmarks.registry import Case, Effort, Table
from benchmarks.standings import Contest, hold, name_of, ratio_table, time_tables

RIVAL = "TorchTitan compiled"
CONTEST = Contest(
    f"Stage, {SIZES}, 2 gloo ranks of T tokens, DP = EP = 2",
    2,
    (*ours.STAGE_ENTRIES, *peers.STAGE_ENTRIES),
    limit=0.9,
    rival=RIVAL,
)


def measure_stage(effort: Effort) -> list[Table]:
    return [*time_tables(CONTEST, effort), ratio_table(CONTEST, effort, _is_aimed), *_traffic_tables(effort)]


def _is_aimed(row: dict[str, str | float]) -> bool:
    return row["dtype"] == name_of(torch.bfloat16) and row["T"] == 256


def _traffic_tables(effort: Effort) -> list[Table]:
    """What a rank sends in a call; eager and compiled alike, or both are shown."""
    answers = hold(CONTEST, effort)
    tokens = list(next(iter(answers.values())).traffic)
    columns = ("contestant", "dtype", "collectives", *(f"kB, T={count}" for count in tokens))
    note = "Collectives as the profiler sees them, bytes as the sockets count them; the rank that sends more."
    table = Table("Sent by a rank in a call", columns, note, num_labels=2)
    for dtype, answer in answers.items():
        for entry in CONTEST.available:
            seen = set()
            for name in entry.contestants():
                sent = [answer.traffic[count][name] for count in tokens]
                if tuple(sent) not in seen:
                    seen.add(tuple(sent))
                    collectives = max(traffic.collectives for traffic in sent)
                    label = name if len(seen) > 1 else entry.name
                    table.add(label, name_of(dtype), collectives, *(traffic.bytes_sent / 1e3 for traffic in sent))
    return [table]


CASE = Case("stage", "Is the whole stage faster than TorchTitan's layer?", measure_stage)
