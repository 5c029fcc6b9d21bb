"""Who is how fast: contests over all sizes and dtypes, and the tables that they end in."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from benchmarks.contest import COMPILED, Answer, Entry, measure, merge
from benchmarks.layer import DTYPES, TOKENS
from benchmarks.ranks import Ranks
from benchmarks.registry import Aim, Chart, Effort, Table
from benchmarks.timing import Timing

FAILS = "fails"
CHARTED = (8, 256)


@dataclass(frozen=True)
class Contest:
    """What runs against what.

    Attributes:
        name: for titles.
        num_ranks: gloo ranks, one thread each.
        entries: ours and peers'; those whose package is not installed are left out.
        limit: what the ratio of our best time to the rival's should stay within.
        rival: the contestant that ours are compared with; empty: the fastest of all that compute in the dtype.
    """

    name: str
    num_ranks: int
    entries: tuple[Entry, ...]
    limit: float
    rival: str = ""

    @property
    def available(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.is_available)

    @property
    def note(self) -> str:
        """What is left out, and what computes in a dtype of its own."""
        missing = [entry.name for entry in self.entries if not entry.is_available]
        fixed = [f"{entry.name} computes in {name_of(entry.dtype)} always." for entry in self.available if entry.dtype]
        return " ".join(fixed + ([f"Left out, for it is not installed: {', '.join(missing)}."] if missing else []))


class Standing(NamedTuple):
    """The fastest of ours and the rival at one size; `rival` is empty where there is none."""

    dtype: torch.dtype
    tokens: int
    ours: str
    rival: str
    times: dict[str, Timing]

    @property
    def ratio(self) -> float | None:
        return self.times[self.ours].wall / self.times[self.rival].wall if self.rival else None

    @property
    def cpu_ratio(self) -> float | None:
        return self.times[self.ours].cpu / self.times[self.rival].cpu if self.rival else None


@cache
def hold(contest: Contest, effort: Effort) -> dict[torch.dtype, Answer]:
    """Measure all sizes, each dtype in processes of its own. Once in a run: the profile asks for it again."""
    answers = {}
    for dtype in DTYPES[: 1 if effort.is_quick else None]:
        with Ranks(contest.num_ranks) as ranks:
            answers[dtype] = merge(ranks.run(measure, contest.available, dtype, effort.pick(TOKENS), effort.rounds))
    return answers


def standings(contest: Contest, effort: Effort) -> list[Standing]:
    found = []
    for dtype, answer in hold(contest, effort).items():
        ours = [name for entry in contest.available if entry.is_ours for name in entry.contestants()]
        rivals = [contest.rival] if contest.rival else _peers(contest, dtype)
        for tokens, times in answer.timings.items():
            found.append(Standing(dtype, tokens, _fastest(ours, times), _fastest(rivals, times), times))
    return found


def time_tables(contest: Contest, effort: Effort) -> list[Table]:
    """All contestants: wall time, and CPU time of the calling thread. Of the former, one size of decode and one of prefill
    are drawn."""
    wall = _time_table(contest, effort, "wall time", lambda timing: timing.wall)
    tokens = list(next(iter(hold(contest, effort).values())).timings)
    wall.chart = Chart(tuple(f"T={count}" for count in tokens if count in CHARTED) or wall.columns[2:3], "ms")
    return [wall, _time_table(contest, effort, "CPU time of the calling thread", lambda timing: timing.cpu)]


def ratio_table(contest: Contest, effort: Effort, is_aimed: Callable[[dict[str, str | float]], bool]) -> Table:
    """The fastest of ours against the rival."""
    columns = ("dtype", "T", "ours", "ours ms", "rival", "rival ms", "ratio", "CPU ratio")
    table = Table(
        f"{contest.name}: our fastest against {contest.rival or 'the fastest peer that computes in the dtype'}",
        columns,
        contest.note,
        num_labels=2,
        aim=Aim("ratio", contest.limit),
        is_aimed=is_aimed,
        chart=Chart(("ours ms", "rival ms"), "ms"),
    )
    for row in standings(contest, effort):
        ours = 1e3 * row.times[row.ours].wall
        rival = 1e3 * row.times[row.rival].wall if row.rival else "-"
        ratios = [ratio or "-" for ratio in (row.ratio, row.cpu_ratio)]
        table.add(name_of(row.dtype), row.tokens, row.ours, ours, row.rival or "-", rival, *ratios)
    return table


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _time_table(contest: Contest, effort: Effort, what: str, pick: Callable[[Timing], float]) -> Table:
    answers = hold(contest, effort)
    tokens = list(next(iter(answers.values())).timings)
    table = Table(
        f"{contest.name}: {what} of a call, ms",
        ("contestant", "dtype", *(f"T={count}" for count in tokens), "graphs"),
        contest.note,
        num_labels=2,
    )
    for dtype, answer in answers.items():
        for name, mode in _contestants(contest).items():
            if name in answer.failures:
                table.note += f" {name}, {name_of(dtype)}: {answer.failures[name]}"
                table.add(name, name_of(dtype), *[FAILS] * len(tokens), FAILS)
                continue
            times = [1e3 * pick(answer.timings[count][name]) for count in tokens]
            table.add(name, name_of(dtype), *times, answer.graphs[name] if mode == COMPILED else "-")
    return table


def _contestants(contest: Contest) -> dict[str, str]:
    return {name: mode for entry in contest.available for name, mode in entry.contestants().items()}


def _peers(contest: Contest, dtype: torch.dtype) -> list[str]:
    peers = [entry for entry in contest.available if not entry.is_ours and entry.dtype in (None, dtype)]
    return [name for entry in peers for name in entry.contestants()]


def _fastest(names: list[str], times: dict[str, Timing]) -> str:
    measured = [name for name in names if name in times]
    return min(measured, key=lambda name: times[name].wall) if measured else ""
