"""A check on the terminal: how far it has come, what there is, then what was found, the worst first."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from visionmtl.data.check.rules import SEVERITIES, Finding, Severity
from visionmtl.data.check.tally import UNITS, Numbers, most_frequent, range_name, sentences

EVERY_S = 20.0  # between lines where there is no terminal
_MAX_CLASSES = 20
_BAR = 30  # characters
_SHOWN = {"error": 3, "warning": 2, "note": 8}  # texts of a group of findings
_MORE_FILES = 5
_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what is to be called with the number of images read since: a bar on a terminal, else a line at times."""
    begin = told = time.monotonic()
    done = 0
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("", total=total)

        def advance(images: int) -> None:
            nonlocal done, told
            done += images
            shown.update(task, completed=done)
            if not console.is_terminal and time.monotonic() - told >= EVERY_S:
                told = time.monotonic()
                console.print(f"read {done} of {total} images")

        yield advance
    seconds = time.monotonic() - begin
    console.print(f"read {done} images in {seconds:.1f} s, {done / max(seconds, 1e-9):.0f} images/s", highlight=False)


def count_all(findings: Sequence[Finding]) -> dict[Severity, int]:
    """Findings by severity."""
    return {severity: sum(one.severity == severity for one in findings) for severity in SEVERITIES}


def print_result(console: Console, data_sets: Sequence[Numbers], findings: Sequence[Finding]) -> None:
    """The whole result. data_sets: see `Checked.numbers`."""
    for numbers in data_sets:
        _print_data_set(console, numbers)
    groups = defaultdict(list)
    for finding in sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)):
        groups[finding.problem.rule, finding.problem.field, finding.role, finding.data_set].append(finding)
    for group in groups.values():
        _print_group(console, group)
    if any(one["asked"] < (one["images"] or 0) for one in data_sets):
        console.print("\nonly some images were read; what is absent, or twice, can be told of these alone")
    read = {role: sum(one["read"] for one in data_sets if one["role"] == role) for role in ("train", "val")}
    counts = [f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in count_all(findings).items()]
    console.print(f"\n{read['train']} train + {read['val']} val images read: {', '.join(counts)}")


def _print_group(console: Console, group: Sequence[Finding]) -> None:
    """The findings of one rule in one field of one data set."""
    first = group[0]
    count = f" ({len(group)} times)" if len(group) > 1 else ""
    title = f"\n{first.severity}: {first.problem.rule}, {first.role} {first.data_set}{count}"
    console.print(title, style=_COLOURS[first.severity])
    shown = _SHOWN[first.severity]
    for finding in group[:shown]:
        console.print(f"  {finding.text}", soft_wrap=True)
    places = [finding.place for finding in group[shown:]]
    if places:
        more = f" and {len(places) - _MORE_FILES} more" if len(places) > _MORE_FILES else ""
        console.print(f"  also {', '.join(places[:_MORE_FILES])}{more}", soft_wrap=True)


def _print_data_set(console: Console, numbers: Numbers) -> None:
    console.print(f"\n{numbers['role']} {numbers['name']} ({numbers['type']})", style="bold")
    if numbers["images"] is None:
        console.print("  could not be opened, see below")
        return
    for line in sentences(numbers):
        console.print(f"  {line}", soft_wrap=True)
    for field, unit in UNITS.items():
        if field in numbers:
            known = numbers[field]
            rows: list[tuple] = [
                (one["name"], one["share"], f"{one[unit]:,}", "" if one["images"] is None else f"{one['images']:,}")
                for one in most_frequent(known["classes"], unit, _MAX_CLASSES)
            ]
            never = sum(not one[unit] for one in known["classes"])
            rows += [(f"{never} never", 0.0, "0", "0")] if never else []
            console.print(_table(f"{field}: {known['space']}", rows, unit, "images"))
    if "histogram" in numbers.get("depth_m", {}):
        rows = [(range_name(one), one["share"]) for one in numbers["depth_m"]["histogram"]]
        console.print(_table("depth_m", rows))


def _table(title: str, rows: Sequence[tuple], *columns: str) -> Table:
    """rows: name, share, then a text for each of the columns; the share gets a bar."""
    longest = max((row[1] for row in rows), default=0) or 1
    table = Table(title, *columns, "share", "", box=None, padding=(0, 0, 0, 2))
    for column in table.columns[1:-1]:
        column.justify = "right"
    for name, share, *texts in rows:
        table.add_row(name, *texts, f"{share:.2%}", "|" + "#" * round(share / longest * _BAR))
    return table
