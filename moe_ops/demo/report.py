"""What the demo shows: a line and a bar while it works, a table of each family and a verdict in the end."""

import time
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from moe_ops.demo.cases import DP, EP, EXPERTS, FORMS, HIDDEN, TOP_K, TP, Family, Form, tolerance
from moe_ops.demo.ranks import Measurement

PLAIN_WIDTH = 100


def make_console() -> Console:
    """Standard output; wide enough for the table where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


class Watch:
    """Progress: a line for each form that all ranks have finished and, on a terminal, a bar."""

    def __init__(self, console: Console, families: list[Family], total: int) -> None:
        self._console = console
        self._remaining = [(family, form) for family in families for form in FORMS]
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("starting the ranks", total=total)
        self._start = time.perf_counter()

    def __enter__(self) -> "Watch":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, measurements: list[Measurement]) -> None:
        """Show how far all that was measured up to now gets."""
        family, form = self._remaining[0]
        found = _of(measurements, family, form)
        if len(found) == EP * len(family.cases(form)):
            seconds = time.perf_counter() - self._start
            error, graphs = max(m.error for m in found), _graphs(found)
            line = f"  {family.name} {form.label}: graphs {graphs}, largest error {error:.1e}, {seconds:.1f} s"
            self._console.print(line, highlight=False)
            self._remaining.pop(0)
            self._start = time.perf_counter()
        name = f"{self._remaining[0][0].name} {self._remaining[0][1].label}" if self._remaining else "ending"
        self._bar.update(self._task, completed=len(measurements), description=name)


def find_failures(families: list[Family], measurements: list[Measurement]) -> list[str]:
    """What disagrees, one line each."""
    failures = []
    for family in families:
        limit = tolerance(family.gate.dtype)
        for form in FORMS:
            found = _of(measurements, family, form)
            if _graphs(found) != "1":
                failures.append(f"{family.name} {form.label}: compiled {_graphs(found)} graphs on a rank, not 1")
            for index, case in enumerate(family.cases(form)):
                errors = [m.error for m in found if m.case == index]
                if len(errors) != EP:
                    failures.append(
                        f"{family.name} {form.label}, tokens {case.counts}: {len(errors)} of {EP} ranks answered"
                    )
                elif max(errors) > limit:
                    failures.append(f"{family.name} {form.label}, tokens {case.counts}: error {max(errors):.1e}")
    return failures


def make_table(family: Family, measurements: list[Measurement]) -> Table:
    """What was measured of a family, one row a call."""
    limit, dtype = tolerance(family.gate.dtype), str(family.gate.dtype).removeprefix("torch.")
    title = f"\n{family.name}: hidden {HIDDEN}, {EXPERTS} experts, top-{TOP_K}, {dtype}; DP {DP} x TP {TP}, EP {EP}"
    caption = (
        f"Error: as a share of the largest value expected, on the worst rank;\n{limit:.1e} would still be rounding. "
        "Graphs: of a form, on each rank.\nCollectives, bytes, ms: of one call, on the rank that has most."
    )
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.collapse_padding, table.pad_edge = True, False  # it fits in 80 columns
    for name in ("strategy", "form", "tokens\nper rank"):
        table.add_column(name)
    for name in ("largest\nerror", "graphs", "collectives", "bytes\nsent", "ms"):
        table.add_column(name, justify="right")
    for form in FORMS:
        found = _of(measurements, family, form)
        for index, case in enumerate(family.cases(form)):
            table.add_row(*_cells(form, case.counts, limit, [m for m in found if m.case == index]))
        table.add_section()
    return table


def summarize(families: list[Family], failures: list[str], seconds: float) -> str:
    """The verdict."""
    if failures:
        return "\n".join([*failures, f"failures: {len(failures)} ({seconds:.0f} s)"])
    calls = sum(len(family.cases(form)) for family in families for form in FORMS)
    return f"All {calls} calls agree with transformers on all {EP} ranks, one graph a form ({seconds:.0f} s)"


def _cells(form: Form, counts: list[int], limit: float, found: list[Measurement]) -> list[str]:
    error, graphs = max(m.error for m in found), _graphs(found)
    return [
        form.strategy.name,
        form.name,
        " ".join(map(str, counts)),
        f"{error:.1e}" if error <= limit else f"[bold red]{error:.1e} WRONG",
        graphs if graphs == "1" else f"[bold red]{graphs} WRONG",
        f"{max(m.collectives for m in found)}",
        f"{max(m.bytes_sent for m in found):,}",
        f"{1000 * max(m.seconds for m in found):.1f}",
    ]


def _graphs(found: list[Measurement]) -> str:
    """Compilations on each rank: one number where all ranks have the same."""
    return "-".join(str(graphs) for graphs in sorted({found.graphs for found in found}))


def _of(measurements: list[Measurement], family: Family, form: Form) -> list[Measurement]:
    return [m for m in measurements if m.family == family.name and m.form == form]
