"""What a network forgot of its old tasks: each metric before and after, on the same split."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from visionmtl.data.label_spaces import task_of
from visionmtl.io.atomic import write_json, write_text
from visionmtl.metrics.base import Results, declared, numbers
from visionmtl.tasks.base import Task

BEFORE = "eval/before.json"
"""Below a run folder: the results of the old tasks before the first step."""


def forgetting(before: Results, after: Results, tasks: Mapping[str, Task], old: Sequence[str]) -> dict[str, Any]:
    """By name of a result of an old task, then by metric: before, after, change, and whether it got better or worse.

    Classes one by one are left out. A metric that the split cannot tell is None.
    """
    report: dict[str, Any] = {}
    for name, result in before.items():
        if task_of(name) not in old:
            continue
        directions = tasks[task_of(name)].meter_type.metrics
        later = dict(numbers(after.get(name, {})))
        report[name] = {
            metric: _change(value, later.get(metric), direction)
            for metric, value in numbers(result)
            if "/" not in metric
            and (pattern := declared(directions, metric)) is not None
            and (direction := directions[pattern]) is not None
        }
    return report


def _change(before: float | None, after: float | None, direction: str) -> dict[str, Any]:
    change = None if before is None or after is None else after - before
    gain = change if change is None or direction == "max" else -change
    verdict = "unknown" if gain is None else "better" if gain > 0 else "worse" if gain < 0 else "same"
    return {"before": before, "after": after, "change": change, "best": direction, "verdict": verdict}


def markdown(report: Mapping[str, Any], new: Results, tasks: Mapping[str, Task], title: str) -> str:
    """Two tables: the old tasks before and after, and the primary metrics of the new ones."""
    lines = [f"# {title}", "", "| old task | metric | better is | before | after | change | |",
             "|---|---|---|---:|---:|---:|---|"]  # fmt: skip
    for name, metrics in report.items():
        for metric, row in metrics.items():
            lines.append(
                f"| {name} | {metric} | {'more' if row['best'] == 'max' else 'less'} | {_text(row['before'])} | "
                f"{_text(row['after'])} | {_text(row['change'], signed=True)} | {row['verdict']} |"
            )
    lines += ["", "| new task | metric | after |", "|---|---|---:|"]
    lines += [f"| {name} | {metric} | {_text(value)} |" for name, metric, value in _primary(new, tasks)]
    return "\n".join(lines) + "\n"


def _primary(results: Results, tasks: Mapping[str, Task]) -> Iterator[tuple[str, str, float | None]]:
    for name, result in results.items():
        metric = tasks[task_of(name)].primary_metric
        yield name, metric, dict(numbers(result)).get(metric)


def _text(value: float | None, signed: bool = False) -> str:
    return "-" if value is None else f"{value:+.4f}" if signed else f"{value:.4f}"


def write_report(
    folder: Path, header: Mapping[str, Any], before: Results, after: Results, tasks: Mapping[str, Task],
    old: Sequence[str],
) -> str:  # fmt: skip
    """forgetting.json and forgetting.md of a run folder; returns the Markdown."""
    report = forgetting(before, after, tasks, old)
    new = {name: result for name, result in after.items() if task_of(name) not in old}
    title = f"Forgetting by {header['method']}: {', '.join(old)} before and after learning {', '.join(new)}"
    text = markdown(report, new, tasks, title)
    write_json(folder / "forgetting.json", {"header": header, "old": report, "new": new})
    write_text(folder / "forgetting.md", text)
    return text
