"""What a benchmark gives: figures with limits, tables and notes, as Markdown and as plain data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measured figure; `limit` is the most it may be, `least` the least."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    least: float | None = None

    @property
    def kept(self) -> bool:
        """Whether it is within its limits."""
        return (self.limit is None or self.value <= self.limit) and (self.least is None or self.value >= self.least)

    def cells(self) -> tuple[str, str, str, str]:
        """Name, value, limit, and "MISSED" where that is not kept; as text."""
        limits = [f"<= {self.limit:g}"] if self.limit is not None else []
        limits += [f">= {self.least:g}"] if self.least is not None else []
        return (
            self.name,
            f"{_number(self.value)} {self.unit}".strip(),
            " ".join([*limits, self.unit]).strip() if limits else "",
            "" if self.kept else "MISSED",
        )


@dataclass(frozen=True)
class Table:
    """Figures that are read side by side; a cell that is None was not measured."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]


@dataclass(frozen=True)
class Note:
    """A sentence about what was measured, or why something was not."""

    text: str


Figure = Row | Table | Note
"""What a verb yields, as soon as it knows it."""

ROW_WIDTHS = (58, 16, 14, 6)
"""Rows come one by one, so their columns cannot wait for the longest cell."""
ROW_COLUMNS = ("figure", "value", "limit", "")


def markdown(figure: Figure, previous: Figure | None = None) -> str:
    """The figure as Markdown that is also readable as it is. Rows that follow each other make one table."""
    if isinstance(figure, Note):
        return f"\n{figure.text}" if not isinstance(previous, Note) else figure.text
    if isinstance(figure, Row):
        head = [] if isinstance(previous, Row) else ["", *_head(ROW_COLUMNS, ROW_WIDTHS)]
        return "\n".join([*head, _line(figure.cells(), ROW_WIDTHS)])

    cells = [tuple(one if isinstance(one, str) else _number(one) for one in row) for row in figure.rows]
    widths = [max(map(len, column)) for column in zip(figure.columns, *cells, strict=True)]
    return "\n".join(
        ["", f"**{figure.title}**", "", *_head(figure.columns, widths), *(_line(c, widths) for c in cells)]
    )


def plain(figures: Sequence[Figure]) -> dict[str, Any]:
    """The same as plain data: {"rows": [...], "tables": [...], "notes": [...]}."""
    return {
        "rows": [{**asdict(one), "kept": one.kept} for one in figures if isinstance(one, Row)],
        "tables": [asdict(one) for one in figures if isinstance(one, Table)],
        "notes": [one.text for one in figures if isinstance(one, Note)],
    }


def _head(columns: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [_line(columns, widths), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    return "| " + " | ".join(padded) + " |"


def _number(value: float | None) -> str:
    """Three to four digits, without an exponent."""
    if value is None:
        return ""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
