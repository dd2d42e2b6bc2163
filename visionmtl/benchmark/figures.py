"""What a benchmark gives: rows with limits, tables and notes; printed as they come and kept in JSON and Markdown."""

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from visionmtl.engine.environment import environment

_CPU_INFO = Path("/proc/cpuinfo")


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
        limit = " ".join([*limits, self.unit]).strip() if limits else ""
        return self.name, f"{_number(self.value)} {self.unit}".strip(), limit, "" if self.kept else "MISSED"


@dataclass(frozen=True)
class Table:
    """Figures that are read side by side; a cell that is None was not measured."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str | float | None]]


@dataclass(frozen=True)
class Note:
    """A sentence about what was measured, or why something was not."""

    text: str


Figure = Row | Table | Note
"""What a verb yields, as soon as it knows it."""

_ROW_COLUMNS, _ROW_WIDTHS = ("figure", "value", "limit", ""), (58, 16, 14, 6)
"""Rows come one by one, so their columns cannot wait for the longest cell."""


class Report:
    """Prints figures as they come; files are written anew with each, so that a run cut short leaves what it found."""

    def __init__(
        self, command: str, verb: str, settings: Mapping[str, Any], json_file: Path | None, text_file: Path | None
    ) -> None:
        self._json, self._text = json_file, text_file
        self._figures: list[Figure] = []
        self._lines: list[str] = []
        for file in (json_file, text_file):
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        machine = environment()
        machine["packages"] |= {"segmentation-models-pytorch": version("segmentation-models-pytorch")}
        machine["cpu"] = _cpu()
        self._head = {"command": command, "date": today, "verb": verb, "settings": settings, "machine": machine}
        self._say(_introduction(self._head))

    def add(self, figure: Figure) -> None:
        """Print and keep."""
        self._say(markdown(figure, self._figures[-1] if self._figures else None))
        self._figures.append(figure)
        if self._json:
            content = {
                **self._head,
                "rows": [{**asdict(one), "kept": one.kept} for one in self._figures if isinstance(one, Row)],
                "tables": [asdict(one) for one in self._figures if isinstance(one, Table)],
                "notes": [one.text for one in self._figures if isinstance(one, Note)],
            }
            self._json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @property
    def kept(self) -> bool:
        """Whether no figure misses its limit so far."""
        return all(one.kept for one in self._figures if isinstance(one, Row))

    def _say(self, text: str) -> None:
        self._lines.append(text)
        if self._text:
            self._text.write_text("\n".join(self._lines) + "\n", encoding="utf-8")
        print(text, flush=True)


def _introduction(head: Mapping[str, Any]) -> str:
    """What the figures were measured with, in one paragraph."""
    machine = head["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    gpus = ", ".join(machine["gpus"]) + f", CUDA {machine['cuda']}" if machine["gpus"] else "no GPU"
    return (
        f"`{head['command']}` on {head['date']}, commit {machine['commit']}: {machine['cpu']}, "
        f"{machine['torch_threads']} of {machine['cpu_cores']} cores; {gpus}; Python {machine['python']}, {packages}."
    )


def _cpu() -> str:
    """The processor's name where the system tells, else its architecture."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown(figure: Figure, previous: Figure | None = None) -> str:
    """The figure as Markdown that is also readable as it is. Rows that follow each other make one table."""
    if isinstance(figure, Note):
        return figure.text if isinstance(previous, Note) else f"\n{figure.text}"
    if isinstance(figure, Row):
        head = [] if isinstance(previous, Row) else ["", *_head(_ROW_COLUMNS, _ROW_WIDTHS)]
        return "\n".join([*head, _line(figure.cells(), _ROW_WIDTHS)])

    cells = [[one if isinstance(one, str) else _number(one) for one in row] for row in figure.rows]
    widths = [max(map(len, column)) for column in zip(figure.columns, *cells, strict=True)]
    lines = [_line(row, widths) for row in cells]
    return "\n".join(["", f"**{figure.title}**", "", *_head(figure.columns, widths), *lines])


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
