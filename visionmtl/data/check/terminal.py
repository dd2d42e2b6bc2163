"""A check on the terminal: its progress, the numbers of each data set, then the findings, the worst first."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from visionmtl.config.console import Console
from visionmtl.config.text_files import printable
from visionmtl.data.check.rules import SEVERITIES, Finding, Severity
from visionmtl.data.check.tally import Numbers, charts, sentences

EVERY_S = 20.0  # between lines where there is no terminal
_MAX_CLASSES = 20
_BAR = 30  # characters
_SHOWN = {"error": 3, "warning": 2, "note": 8}  # findings of a group that are written out
_MORE_FILES = 5
_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what is to be called with the number of images read since: a bar on a terminal, else a line at times."""
    begin = told = time.monotonic()
    done = 0
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def count(images: int) -> None:
            nonlocal done, told
            done += images
            bar.update(task, completed=done)
            if not console.is_terminal and time.monotonic() - told >= EVERY_S:
                told = time.monotonic()
                console.print(f"read {done} of {total} images")

        yield count
    seconds = time.monotonic() - begin
    console.print(f"read {done} images in {seconds:.1f} s, {done / max(seconds, 1e-9):.0f} images/s", highlight=False)


def count_all(findings: Sequence[Finding]) -> dict[Severity, int]:
    """Findings by severity."""
    return {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}


def print_result(console: Console, data_sets: Sequence[Numbers], findings: Sequence[Finding]) -> None:
    """The whole result. data_sets: see `Checked.numbers`."""
    for numbers in data_sets:
        _print_data_set(console, numbers)
    groups = defaultdict(list)
    for finding in sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)):
        problem = finding.problem
        groups[finding.severity, problem.rule, finding.role, finding.data_set, problem.field].append(finding)
    for (severity, rule, role, data_set, _), group in groups.items():
        count = f" ({len(group)} times)" if len(group) > 1 else ""
        console.print(f"\n{severity}: {rule}, {role} {data_set}{count}", style=_COLOURS[severity])
        shown = _SHOWN[severity]
        for finding in group[:shown]:
            console.print(f"  {printable(finding.text)}", soft_wrap=True)
        if places := [finding.place for finding in group[shown:]]:
            more = f" and {len(places) - _MORE_FILES} more" if len(places) > _MORE_FILES else ""
            console.print(f"  also {printable(', '.join(places[:_MORE_FILES]))}{more}", soft_wrap=True)
    if any(numbers["asked"] < (numbers["images"] or 0) for numbers in data_sets):
        console.print("\nonly some images were read; what is absent, or twice, can be told of these alone")
    train, val = (sum(n["read"] for n in data_sets if n["role"] == role) for role in ("train", "val"))
    counts = [f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in count_all(findings).items()]
    console.print(f"\n{train} train + {val} val images read: {', '.join(counts)}")


def _print_data_set(console: Console, numbers: Numbers) -> None:
    console.print(f"\n{numbers['role']} {numbers['name']} ({numbers['type']})", style="bold")
    if numbers["images"] is None:
        console.print("  could not be opened, see below")
        return
    for line in sentences(numbers):
        console.print(f"  {printable(line)}", soft_wrap=True)
    for chart in charts(numbers, _MAX_CLASSES):
        table = Table(chart.title, *chart.columns, "share", "", box=None, padding=(0, 0, 0, 2))
        for column in table.columns[1:-1]:
            column.justify = "right"
        longest = max((row["share"] for row in chart.rows), default=0) or 1
        for row in chart.rows:
            counts = ["" if row[column] is None else f"{row[column]:,}" for column in chart.columns]
            bar = "|" + "#" * round(row["share"] / longest * _BAR)
            table.add_row(printable(row["name"]), *counts, f"{row['share']:.2%}", bar)
        console.print(table)
