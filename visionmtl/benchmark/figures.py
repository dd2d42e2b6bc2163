"""What a benchmark yields: rows with limits, tables and notes; printed at once and kept as JSON and Markdown."""

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from visionmtl.engine.environment import environment

Cell = str | float | None


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


@dataclass(frozen=True)
class Table:
    """Figures that are read side by side; a cell that is None was not measured."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Note:
    """A sentence about what was measured, or why something was not."""

    text: str


Figure = Row | Table | Note

_ROW_COLUMNS, _ROW_WIDTHS = ("figure", "value", "limit", ""), (58, 16, 14, 6)
"""Rows are printed one by one, so their columns cannot wait for the longest cell."""


class Report:
    """Prints each figure at once and writes the files anew with it, so that an interrupted run keeps its figures."""

    def __init__(
        self, command: str, verb: str, settings: Mapping[str, Any], json_file: Path | None, text_file: Path | None
    ) -> None:
        self._json, self._text = json_file, text_file
        self._figures: list[Figure] = []
        self._lines: list[str] = []
        for file in (json_file, text_file):
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        machine = environment()
        machine["packages"] |= {"segmentation-models-pytorch": version("segmentation-models-pytorch")}
        machine["cpu"] = _cpu()
        self._head = {"command": command, "date": date, "verb": verb, "settings": settings, "machine": machine}
        packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
        gpus = ", ".join(machine["gpus"]) + f", CUDA {machine['cuda']}" if machine["gpus"] else "no GPU"
        self._print(
            f"`{command}` on {date}, commit {machine['commit']}: {machine['cpu']}, {machine['torch_threads']} of "
            f"{machine['cpu_cores']} cores; {gpus}; Python {machine['python']}, {packages}."
        )

    def add(self, figure: Figure) -> None:
        """Print and keep."""
        self._print(markdown(figure, self._figures[-1] if self._figures else None))
        self._figures.append(figure)
        if self._json:
            rows, tables, notes = ([f for f in self._figures if isinstance(f, kind)] for kind in (Row, Table, Note))
            content = {
                **self._head,
                "rows": [{**asdict(row), "kept": row.kept} for row in rows if isinstance(row, Row)],
                "tables": [asdict(table) for table in tables],
                "notes": [note.text for note in notes if isinstance(note, Note)],
            }
            self._json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @property
    def kept(self) -> bool:
        """Whether no figure misses its limit so far."""
        return all(figure.kept for figure in self._figures if isinstance(figure, Row))

    def _print(self, text: str) -> None:
        self._lines.append(text)
        if self._text:
            self._text.write_text("\n".join(self._lines) + "\n", encoding="utf-8")
        print(text, flush=True)


def _cpu() -> str:
    """The processor's name where the system tells, else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown(figure: Figure, previous: Figure | None = None) -> str:
    """The figure as Markdown. Rows that follow each other make one table."""
    if isinstance(figure, Note):
        return figure.text if isinstance(previous, Note) else f"\n{figure.text}"
    if isinstance(figure, Row):
        limits = [f"<= {figure.limit:g}"] if figure.limit is not None else []
        limits += [f">= {figure.least:g}"] if figure.least is not None else []
        limit = " ".join([*limits, figure.unit]).strip() if limits else ""
        cells = (figure.name, f"{_text(figure.value)} {figure.unit}".strip(), limit, "" if figure.kept else "MISSED")
        lines = _lines(_ROW_COLUMNS, [cells], _ROW_WIDTHS)
        return lines[-1] if isinstance(previous, Row) else "\n".join(["", *lines])
    rows = [[_text(cell) for cell in row] for row in figure.rows]
    widths = [max(map(len, column)) for column in zip(figure.columns, *rows, strict=True)]
    return "\n".join(["", f"**{figure.title}**", "", *_lines(figure.columns, rows, widths)])


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    head, *body = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (columns, *rows)
    ]
    return [head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body]


def _text(cell: Cell) -> str:
    """Numbers with three to four digits, without an exponent."""
    if cell is None or isinstance(cell, str):
        return cell or ""
    digits = 0 if abs(cell) >= 1000 else 1 if abs(cell) >= 100 else 2 if abs(cell) >= 1 else 3
    return f"{cell:,.{digits}f}"
