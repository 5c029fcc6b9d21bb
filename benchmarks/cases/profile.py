"""Where the time goes in the rows that we lose, ours beside the rival."""

import re

from benchmarks.cases import experts, stage, training
from benchmarks.contest import profile
from benchmarks.ranks import Ranks
from benchmarks.registry import Case, Effort, Table
from benchmarks.standings import Contest, Standing, name_of, standings

OPS = 8
CALLS = 9
COMPILED_GRAPH = re.compile(r"## Call CompiledFxGraph \w+ ##")


def measure_profile(effort: Effort) -> list[Table]:
    """A table for each contest, which measures first what has not been measured in this run, and one for training."""
    return [*(_profile_lost(contest, effort) for contest in (experts.CONTEST, stage.CONTEST)), _profile_training()]


def _profile_training() -> Table:
    columns = ("row", "op of ours", "ms", "op of the rival", "rival ms")
    note = "Forward and backward, eager, with the thread that runs the backward; otherwise as above."
    table = Table(f"Training in bfloat16: the {OPS} ops that take most", columns, note)
    with Ranks(2) as ranks:
        found = ranks.run(training.profile_step, training.TOKENS[0], CALLS)[0]
        if len(found) == 2:
            _add_pair(table, f"T={training.TOKENS[0]}", *found.items())
    return table


def _profile_lost(contest: Contest, effort: Effort) -> Table:
    columns = ("row", "op of ours", "ms", "op of the rival", "rival ms")
    note = (
        f"Rows whose ratio is above {contest.limit:g}. Time in an op itself, without the ops that it calls; what a compiler "
        "fused is in the compiled graph; waiting for the other rank is in the collective. Medians of rank 0, under the "
        "profiler, which slows short ops."
    )
    table = Table(f"{contest.name}: the {OPS} ops that take most", columns, note)
    lost = [row for row in standings(contest, effort) if (row.ratio or 0) > contest.limit]
    for dtype in dict.fromkeys(row.dtype for row in lost):
        with Ranks(contest.num_ranks) as ranks:
            for row in (row for row in lost if row.dtype == dtype):
                names = (row.ours, row.rival)
                found = ranks.run(profile, contest.available, dtype, row.tokens, names, CALLS)[0]
                _add(table, row, found[row.ours], found[row.rival])
    return table


def _add(table: Table, row: Standing, ours: dict[str, float], rival: dict[str, float]) -> None:
    _add_pair(table, f"{name_of(row.dtype)}, T={row.tokens}", (row.ours, ours), (row.rival, rival))


def _add_pair(
    table: Table, label: str, ours: tuple[str, dict[str, float]], rival: tuple[str, dict[str, float]]
) -> None:
    (our_name, our_ops), (its_name, its_ops) = ours, rival
    table.add(label, our_name, 1e3 * sum(our_ops.values()), its_name, 1e3 * sum(its_ops.values()))
    for (our_op, our_time), (op, its_time) in zip(_largest(our_ops), _largest(its_ops), strict=True):
        table.add("", our_op, our_time, op, its_time)


def _largest(seconds: dict[str, float]) -> list[tuple[str, float | str]]:
    found = sorted(seconds.items(), key=lambda item: -item[1])[:OPS]
    return [(COMPILED_GRAPH.sub("compiled graph", name), 1e3 * time) for name, time in found] + [("", "")] * (
        OPS - len(found)
    )


CASE = Case("profile", "Where does the time go in the rows that we lose?", measure_profile)
