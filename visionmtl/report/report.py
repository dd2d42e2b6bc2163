"""A run on one page: an HTML file that holds its numbers, curves and pictures, and loads nothing."""

import base64
import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from numpy.typing import NDArray

from visionmtl.config.text_files import check_object, read_object, read_text
from visionmtl.datasets import name_all, shortened
from visionmtl.engine.logging import parse_row
from visionmtl.io.atomic import write_text
from visionmtl.metrics.distance import DistanceMeter
from visionmtl.report.charts import Chart, line_chart
from visionmtl.report.evidence import Confusion, Evidence, ImagePanels
from visionmtl.run import Run, dump, load_recorded
from visionmtl.tasks.base import Task
from visionmtl.visualization.draw import to_cell

Titled = tuple[str, NDArray[np.uint8]]
PrimaryMetrics = Mapping[str, tuple[str, str]]
"""By task: its primary metric, and "max" or "min"."""

MAX_PICTURE_PX = 1800
MAX_CONFUSED_CLASSES = 60
"""A table of more classes cannot be read; the page says in words which are confused most."""
_GRADIENT_CHARTS = (
    ("cosine", "cosines of the tasks' gradients", "cosine", False),
    ("conflict", "share of steps in conflict", "share of steps", False),
    ("norm_ratio", "ratios of the gradients' lengths", "ratio", True),
    ("magnitude_similarity", "similarity of the gradients' lengths", "similarity", False),
)
"""Figure of `balance.conflict`, title, name of its axis, and whether that is logarithmic."""
_UNITS = {"_m": " m", "_deg": "°", "_s": " s"}
_WORDS = {
    "ap": "average precision over IoU .5 to .95", "ap50": "average precision at IoU .5",
    "miou": "mean intersection over union", "rmse_m": "root mean square error", "abs_rel": "mean relative error",
    "delta1": "share of pixels within 25 % of the truth", "accuracy": "accuracy", "map": "mean average precision",
    "mean_deg": "mean angle to the truth", "within_11_25": "share of pixels within 11.25° of the truth",
}  # fmt: skip
_AXES = {
    "lr": "learning rate", "grad_norm": "norm of the gradient", "images_per_s": "images per second",
    "rmse_m": "RMSE in m", "miou": "mIoU", "ap": "AP",
}  # fmt: skip


def format_metric(name: str, value: float | None) -> str:
    """The number as the page shows it: a count in full, anything else with four digits and the unit of its name."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    unit = next((unit for ending, unit in _UNITS.items() if name.endswith(ending)), "")
    return f"{value:.4f}{unit}" if abs(value) < 10 else f"{value:.2f}{unit}"


@dataclass(frozen=True)
class SortableTable:
    """Columns and rows; the first cell of a row is its name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    show: Callable[[str, float | None], str] = format_metric
    """How a number is written, by its column."""
    bars: bool = True
    """Behind floats in 0..1."""


def write_report(
    path: Path,
    run_dir: Path,
    results: Mapping[str, Mapping[str, Any]],
    pictures: Sequence[Titled] = (),
    *,
    run: Run | None = None,
    evidence: Evidence | None = None,
    confusions: Mapping[str, Confusion] | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write the page.

    run_dir: where config.yaml, env.json and metrics.jsonl are looked for; the page says which of them are missing,
        unless it is `run` that says what was trained.
    results: by task, what its meter computed; pictures: uint8 [H, W, 3] RGB with their titles.
    run: its settings, for a network without config.yaml beside it.
    evidence, confusions: what was collected on the way; facts: further lines of the head, by name.
    """
    files = {name: run_dir / name for name in ("config.yaml", "env.json")}
    texts = {name: read_text(file) if file.is_file() else "" for name, file in files.items()}
    recorded = bool(texts["config.yaml"])
    alone = run is not None and not recorded
    run = load_recorded(run_dir) if recorded else run
    machine = read_object(files["env.json"]) if texts["env.json"] else {}
    tasks = run.tasks if run else {}
    primary = {name: _primary(tasks[name.partition("@")[0]]) for name in results if name.partition("@")[0] in tasks}
    rows = read_rows(run_dir / "metrics.jsonl")
    charts, conflicts = list(_curves(rows, list(results), primary)), list(_conflicts(rows))
    charts += _precision_curves(results)
    charts += _distance_charts(evidence.depth_by_distance() if evidence else {})
    confusions = confusions or {}
    named: dict[str, Any] = {
        "summary": list(_summary(run, results, primary, rows, confusions)),
        "cards": [_card(task, result, primary) for task, result in results.items()],
        "charts": charts,
        "conflicts": conflicts,
        "tables": [
            _class_table(task, result["per_class"]) for task, result in results.items() if result.get("per_class")
        ],
        "confusions": [
            {
                "title": name,
                "classes": of.classes,
                "rows": [[None if np.isnan(share) else share for share in row] for row in of.shares.tolist()],
            }
            for name, of in confusions.items()
            if len(of.classes) <= MAX_CONFUSED_CLASSES
        ],
        "images": [_embedded(of) for of in evidence.images()] if evidence else [],
        "pictures": [(title, data_uri(to_cell(picture, MAX_PICTURE_PX))) for title, picture in pictures],
        "texts": {
            "Configuration": texts["config.yaml"] or (dump(run) if run else ""),
            "Environment": texts["env.json"],
        },
    }
    titles = {
        "Results": "cards", "Curves": "charts", "Task conflicts": "conflicts", "Classes": "tables",
        "Confusions": "confusions", "Settings": "texts",
    }  # fmt: skip
    shown = {title for title, key in titles.items() if named[key]}
    render(
        path,
        "report.html.j2",
        name=run_dir.resolve().name,
        facts=[*_facts(run, machine, rows), *(facts or {}).items()],
        missing=[name for name in (*texts, "metrics.jsonl") if not alone and not (run_dir / name).is_file()],
        shown=shown | ({"Pictures"} if named["images"] or named["pictures"] else set()),
        **named,
    )


def _inline(text: str) -> str:
    """Markdown's **strong** words and `code` as HTML, the rest escaped."""
    strong = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", strong)


def render(path: Path, template: str, **names: Any) -> None:
    """Write a page of this folder's templates; what they show is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"metric": lambda value, name: format_metric(name, value), "plain": asdict, "inline": _inline}
    page = pages.get_template(template).render(**names)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def _primary(task: Task) -> tuple[str, str]:
    return task.primary_metric, task.meter_type.metrics[task.primary_metric] or ""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, [] without one; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    lines = read_text(path).removesuffix("\n").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse_row(line, f"{path}:{number}"))
        except ValueError:
            if number < len(lines):
                raise
    return rows


_ENVIRONMENT = {"gpus": list, "packages": dict}


def _facts(run: Run | None, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """What the head of the page says of the run: name and value."""
    yield "written", f"{datetime.now():%Y-%m-%d %H:%M}"
    if run:
        yield "encoder", run.model.encoder.name
        yield "tasks", ", ".join(run.tasks)
        yield "trained on", ", ".join(name_all(run.data.train))
        yield "validated on", ", ".join(name_all(run.data.val))
        yield "input", "{} x {} px".format(*run.data.input_size)
    if machine:
        check_object(machine, "env.json", {name: kind for name, kind in _ENVIRONMENT.items() if name in machine})
        gpus, versions = machine.get("gpus", []), machine.get("packages", {})
        yield "device of the training", " + ".join(map(str, gpus)) or f"CPU, {machine.get('cpu_cores', '?')} cores"
        yield from ((name, str(versions[name])) for name in ("torch",) if name in versions)
        if machine.get("commit"):
            yield "commit", str(machine["commit"])[:12]
    last = rows[-1] if rows else {}
    for key in ("step", "epoch"):
        if isinstance(last.get(key), int):
            yield key, f"{last[key]:,}"


def _summary(
    run: Run | None,
    results: Mapping[str, Mapping[str, Any]],
    primary: PrimaryMetrics,
    rows: Sequence[Mapping[str, Any]],
    confusions: Mapping[str, Confusion],
) -> Iterator[str]:
    """The results in sentences."""
    for name, result in results.items():
        metric, direction = primary.get(name, ("abs_rel", "min"))
        numbers = _numbers(result)
        value = numbers.get(metric)
        if value is None:
            continue
        if name not in primary:
            if "matched" not in result:  # of a run whose config is missing
                continue
            yield f"{name}: distances are off by {value:.1%} on average, of {result['matched']} boxes."
            continue
        better = {"max": "higher is better", "min": "lower is better", "": ""}[direction]
        yield (
            f"{name}: {_WORDS.get(metric, metric)} is {format_metric(metric, value)} ({better}) on "
            f"{result.get('images', '?')} images."
        )
        if metric != "rmse_m" and isinstance(per_class := result.get("per_class"), Mapping):
            known = {c: row[k] for c, row in per_class.items() for k in ("ap", "iou") if k in _numbers(row)}
            if len(known) > 1:
                best, worst = max(known, key=lambda c: known[c]), min(known, key=lambda c: known[c])
                missed = [c for c in known if not known[c]]
                none = f"finds none of {shortened(missed)}"
                last = none if len(missed) > 1 else f"worst at {worst} ({known[worst]:.2f})"
                yield f"{name} is best at {best} ({known[best]:.2f}) and {last}."
        if {"delta1", "abs_rel"} <= numbers.keys():
            yield (
                f"{name} is off by {numbers['abs_rel']:.1%} on average; {numbers['delta1']:.1%} are within 25 % of the "
                "truth."
            )
    for name, of in confusions.items():
        pairs = [f"{true} for {taken} ({share:.0%} of its pixels)" for true, taken, share in of.largest(3)]
        if pairs:
            yield f"{name} most often takes {', '.join(pairs)}."
    yield from _trend(results, primary, rows)
    for pair, share in _last_conflicts(rows).items():
        yield f"The gradients of {pair} pointed against each other in {share:.0%} of the steps looked at last."


def _trend(
    results: Mapping[str, Mapping[str, Any]], primary: PrimaryMetrics, rows: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Whether the last of several evaluations was the best."""
    val = _series([row for row in rows if row.get("kind") == "val"])
    for name in results:
        metric, direction = primary.get(name, ("", ""))
        points = val.get(f"results/{name}/{metric}", [])
        if len(points) > 2 and direction:
            at, best = (max if direction == "max" else min)(points, key=lambda point: point[1])
            late = at == points[-1][0]
            yield (
                f"{name}: the best of {len(points)} evaluations was at step {at:,.0f} "
                f"({format_metric(metric, best)})"
                + (", the last one: a longer training may give more." if late else f" of {points[-1][0]:,.0f}.")
            )


def _last_conflicts(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By pair of tasks the share of steps in conflict that was logged last."""
    series = _series([row for row in rows if row.get("kind") == "train"])
    start = "gradients/conflict/"
    return {path.removeprefix(start): points[-1][1] for path, points in series.items() if path.startswith(start)}


def _card(task: str, result: Mapping[str, Any], primary: PrimaryMetrics) -> dict[str, Any]:
    """The primary metric of a task, its other numbers, and under which conditions they hold."""
    numbers = _numbers(result)
    first = next((name for name, value in numbers.items() if not isinstance(value, int)), "")
    of_distances = DistanceMeter.metrics.get(first) if "matched" in result else None
    metric, direction = primary.get(task, (first, of_distances or ""))
    notes = [f"protocol {result['protocol']}"] if "protocol" in result else []
    notes += [f"{value:,} {name.replace('_', ' ')}" for name, value in numbers.items() if isinstance(value, int)]
    if result.get("absent"):
        notes.append(f"classes without truth: {', '.join(map(str, result['absent']))}")
    if result.get("not_annotated"):
        notes.append(f"classes that this data set does not annotate: {', '.join(map(str, result['not_annotated']))}")
    return {
        "task": task,
        "metric": metric,
        "value": numbers.get(metric),
        "better": {"max": "higher is better", "min": "lower is better", "": ""}[direction],
        "others": {name: value for name, value in numbers.items() if name != metric and not isinstance(value, int)},
        "note": "; ".join(notes),
    }


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value for name, value in result.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _curves(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], primary: PrimaryMetrics) -> Iterator[Chart]:
    """Per task its loss parts and its primary metric; then what the whole run has in common."""
    train = _series([row for row in rows if row.get("kind") == "train"])
    val = _series([row for row in rows if row.get("kind") == "val"])
    steps = (0.0, max((float(row["step"]) for row in rows), default=1.0))
    drawn: list[Chart | None] = []
    for task in tasks:
        parts = {_last(name): points for name, points in train.items() if _belongs(name, task) and "loss" in name}
        drawn.append(line_chart(f"{task}: training loss", parts, y_name="loss", log=True, x_range=steps))
        measured = {_last(name): points for name, points in val.items() if _belongs(name, task)}
        metric = primary[task][0] if task in primary else next(iter(measured), "")
        shown = {metric: measured[metric]} if metric in measured else dict(list(measured.items())[:1])
        name = next(iter(shown), "")
        drawn.append(line_chart(f"{task}: validation", shown, y_name=_AXES.get(name, name), x_range=steps))
    weights = {_last(name): points for name, points in train.items() if "weight" in name}
    if all(value == points[0][1] for points in weights.values() for _, value in points):
        weights = {}  # fixed
    drawn.append(line_chart("weights of the tasks", weights, y_name="weight", x_range=steps))
    for title, key in (("learning rate", "lr"), ("gradient norm", "grad_norm"), ("speed", "images_per_s")):
        series = {key: train.get(key, [])}
        drawn.append(line_chart(title, series, y_name=_AXES[key], log=key == "grad_norm", x_range=steps))
    yield from (chart for chart in drawn if chart)


def _conflicts(rows: Sequence[Mapping[str, Any]]) -> Iterator[Chart]:
    """What `balance.conflict` logged of each pair of tasks."""
    train = _series([row for row in rows if row.get("kind") == "train"])
    steps = (0.0, max((float(row["step"]) for row in rows), default=1.0))
    drawn: list[Chart | None] = []
    for name, title, axis, log in _GRADIENT_CHARTS:
        of_pairs = {_last(path): points for path, points in train.items() if path.startswith(f"gradients/{name}/")}
        drawn.append(line_chart(title, of_pairs, y_name=axis, log=log, x_range=steps))
    for level in sorted({path.split("/")[1] for path in train if path.startswith("gradients/level")}):
        prefix = f"gradients/{level}/cosine/"
        of_pairs = {_last(path): points for path, points in train.items() if path.startswith(prefix)}
        title = f"cosines of the tasks' gradients, {level}"
        drawn.append(line_chart(title, of_pairs, y_name="cosine", x_range=steps))
    yield from (chart for chart in drawn if chart)


def _precision_curves(results: Mapping[str, Mapping[str, Any]]) -> Iterator[Chart]:
    for task, result in results.items():
        curves = {
            f"IoU .{name[-2:]}": [(at / 100, value) for at, value in enumerate(curve) if value is not None]
            for name, curve in result.get("pr_curves", {}).items()
        }
        chart = line_chart(
            f"{task}: precision over recall, mean over classes", curves, x_name="recall", y_name="precision"
        )
        if chart:
            yield chart


def _distance_charts(by_distance: Mapping[str, Sequence[tuple[float, float, float]]]) -> Iterator[Chart]:
    for task, bins in by_distance.items():
        error = {"mean relative error": [(metres, value) for metres, value, _ in bins]}
        shares = {"share of pixels": [(metres, share) for metres, _, share in bins]}
        titles = ((f"{task}: error by true distance", "mean relative error", error),
                  (f"{task}: how often each distance occurs", "share of pixels", shares))  # fmt: skip
        for title, axis, series in titles:
            chart = line_chart(title, series, x_name="true distance in m", y_name=axis)
            if chart:
                yield chart


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Every number of the rows by its path ("losses/depth/silog"), as (step, value)."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in _leaves(row):
            series.setdefault(name, []).append((float(row["step"]), value))
    return series


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{path}{key}/")
        elif isinstance(inner, int | float) and not isinstance(inner, bool):
            yield f"{path}{key}", float(inner)


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _belongs(name: str, task: str) -> bool:
    return task in name.split("/")[:-1]


def _class_table(task: str, table: Mapping[str, Mapping[str, Any]]) -> SortableTable:
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    rows = [[name, *(row.get(column) for column in columns)] for name, row in table.items()]
    return SortableTable(task, ["class", *columns], rows)


def _embedded(of: ImagePanels) -> dict[str, Any]:
    panels = {task: {row: data_uri(picture) for row, picture in rows.items()} for task, rows in of.panels.items()}
    return {"title": of.title, "image": data_uri(of.image), "panels": panels}


def data_uri(picture: NDArray[np.uint8]) -> str:
    """The picture as WebP inside a URI."""
    written, webp = cv2.imencode(".webp", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, 82])
    assert written
    return f"data:image/webp;base64,{base64.b64encode(webp.tobytes()).decode('ascii')}"
