"""What a benchmark is made of: a case asks one question, and answers it in tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Aim:
    """A number that one column should stay within: `limit` at most, or exactly it."""

    column: str
    limit: float
    is_exact: bool = False

    def is_met(self, value: float) -> bool:
        return value == self.limit if self.is_exact else value <= self.limit


@dataclass(frozen=True)
class Chart:
    """How a table is plotted: one group of bars a row, one bar for each of `series`."""

    series: tuple[str, ...]
    unit: str


@dataclass
class Table:
    """An answer: rows of text, integers and floats; text stands where there is no number.

    The first `num_labels` columns say what a row is. The aim holds for the rows that have a number and that `is_aimed`
    accepts.
    """

    title: str
    columns: tuple[str, ...]
    note: str = ""
    num_labels: int = 1
    aim: Aim | None = None
    is_aimed: Callable[[dict[str, str | float]], bool] = lambda row: True
    chart: Chart | None = None
    rows: list[tuple[str | float, ...]] = field(default_factory=list)

    def add(self, *cells: str | float) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"Table.add: cells must be {len(self.columns)}, one for each column, got {len(cells)}")
        self.rows.append(cells)

    def as_dict(self, row: tuple[str | float, ...]) -> dict[str, str | float]:
        return dict(zip(self.columns, row, strict=True))

    def aimed(self) -> list[tuple[str | float, ...]]:
        """The rows that the aim holds for."""
        if self.aim is None:
            return []
        index = self.columns.index(self.aim.column)
        return [row for row in self.rows if not isinstance(row[index], str) and self.is_aimed(self.as_dict(row))]

    def missed(self) -> list[tuple[str | float, ...]]:
        """The rows that miss the aim."""
        if self.aim is None:
            return []
        index, aim = self.columns.index(self.aim.column), self.aim
        return [row for row in self.aimed() if not aim.is_met(float(row[index]))]


@dataclass(frozen=True)
class Effort:
    """How long to measure: `rounds` rounds, and whether to leave the slower sizes out."""

    rounds: int
    is_quick: bool = False

    def pick(self, values: Sequence[int]) -> tuple[int, ...]:
        """All values, or the first alone in a quick run."""
        return tuple(values[:1] if self.is_quick else values)


@dataclass(frozen=True)
class Case:
    """One question, and the function that answers it."""

    name: str
    question: str
    function: Callable[[Effort], list[Table]]
