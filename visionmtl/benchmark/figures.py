"""What a benchmark yields: rows with limits, tables and notes; printed at once and kept as JSON and Markdown."""

import datetime
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from visionmtl.engine.environment import environment
from visionmtl.io.atomic import write_json, write_text

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


class Report:
    """Prints each figure at once and writes the files anew with it, so that an interrupted run keeps its figures."""

    def __init__(
        self, command: str, verb: str, settings: Mapping[str, Any], json_file: Path | None, text_file: Path | None
    ) -> None:
        self._json_file, self._text_file = json_file, text_file
        self._text = ""
        self._previous: type[Figure] | None = None
        self.kept = True
        """Whether no figure misses its limit so far."""
        for file in (json_file, text_file):
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        machine = environment()
        machine["packages"] |= {"segmentation-models-pytorch": version("segmentation-models-pytorch")}
        machine["cpu"] = _cpu()
        self._content: dict[str, Any] = {
            "command": command, "date": date, "verb": verb, "settings": settings, "machine": machine,
            "rows": [], "tables": [], "notes": [],
        }  # fmt: skip
        packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
        gpus = ", ".join(machine["gpus"]) + f", CUDA {machine['cuda']}" if machine["gpus"] else "no GPU"
        self._print(
            f"`{command}` on {date}, commit {machine['commit']}: {machine['cpu']}, {machine['torch_threads']} of "
            f"{machine['cpu_cores']} cores; {gpus}; Python {machine['python']}, {packages}."
        )

    def add(self, figure: Figure) -> None:
        """Print and keep."""
        between = "\n" if isinstance(figure, Table) or type(figure) is not self._previous else ""
        self._print(between + markdown(figure))
        self._previous = type(figure)
        if isinstance(figure, Row):
            self._content["rows"].append(asdict(figure) | {"kept": figure.kept})
            self.kept &= figure.kept
        elif isinstance(figure, Table):
            self._content["tables"].append(asdict(figure))
        else:
            self._content["notes"].append(figure.text)
        if self._json_file:
            write_json(self._json_file, self._content)

    def _print(self, text: str) -> None:
        self._text += f"{text}\n"
        if self._text_file:
            write_text(self._text_file, self._text)
        print(text, flush=True)


def _cpu() -> str:
    """The processor's name where the system tells, else its architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def markdown(figure: Figure) -> str:
    """The figure as Markdown: a sentence, an item of a list, or a table."""
    if isinstance(figure, Note):
        return figure.text
    if isinstance(figure, Row):
        limits = [f"limit <= {figure.limit:g}"] if figure.limit is not None else []
        limits += [f"limit >= {figure.least:g}"] if figure.least is not None else []
        limits += [] if figure.kept else ["MISSED"]
        return f"- {figure.name}: {text_of(figure.value)} {figure.unit}".rstrip() + ", ".join(["", *limits])
    rows = [[text_of(cell).replace("|", "\\|") for cell in row] for row in (figure.columns, *figure.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([f"**{figure.title}**", "", *lines])


def text_of(cell: Cell) -> str:
    """Numbers with three to four digits, without an exponent."""
    if cell is None or isinstance(cell, str):
        return cell or ""
    digits = 0 if abs(cell) >= 1000 else 1 if abs(cell) >= 100 else 2 if abs(cell) >= 1 else 3
    return f"{cell:,.{digits}f}"
