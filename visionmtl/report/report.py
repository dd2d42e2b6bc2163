"""A run on one page: an HTML file that holds its numbers, curves and pictures, and loads nothing."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from numpy.typing import NDArray

from visionmtl.data.label_spaces import task_of
from visionmtl.datasets import name_all
from visionmtl.report import charts
from visionmtl.report.charts import Chart, line_chart
from visionmtl.run import Run, load
from visionmtl.tasks.base import Task

Titled = tuple[str, NDArray[np.uint8]]
PrimaryMetrics = Mapping[str, tuple[str, str]]
"""By task: its primary metric, and "max" or "min"."""

MAX_PICTURE_PX = 1800
NUM_COLOURS = 6
_GRADIENT_CHARTS = (
    ("cosine", "cosines of the tasks' gradients", False),
    ("conflict", "share of steps in conflict", False),
    ("norm_ratio", "ratios of the gradients' lengths", True),
    ("magnitude_similarity", "similarity of the gradients' lengths", False),
)
"""Figure of `balance.conflict`, title, and whether its axis is logarithmic."""
_UNITS = {"_m": " m", "_deg": "°", "_s": " s"}


def write_report(
    path: Path, run_dir: Path, results: Mapping[str, Mapping[str, Any]], pictures: Sequence[Titled] = ()
) -> None:
    """Write the page.

    run_dir: where config.yaml, env.json and metrics.jsonl are looked for; the page says which of them are missing.
    results: by task, what its meter computed; pictures: uint8 [H, W, 3] RGB with their titles.
    """
    texts = {name: _text(run_dir / name) for name in ("config.yaml", "env.json")}
    run = load(run_dir / "config.yaml") if texts["config.yaml"] else None
    tasks = run.tasks if run else {}
    primary = {name: _primary(tasks[task_of(name)]) for name in results if task_of(name) in tasks}
    rows = read_rows(run_dir / "metrics.jsonl")

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters["metric"] = lambda value, name: format_metric(name, value)
    page = pages.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        facts=list(_facts(run, texts["env.json"], rows)),
        missing=[name for name in (*texts, "metrics.jsonl") if not (run_dir / name).is_file()],
        cards=[_card(task, result, primary) for task, result in results.items()],
        charts=[*_curves(rows, list(results), primary), *_precision_curves(results)],
        paper=charts,
        num_colours=NUM_COLOURS,
        pictures=[(title, _as_jpeg(picture)) for title, picture in pictures],
        tables=[_class_table(task, result["per_class"]) for task, result in results.items() if result.get("per_class")],
        texts={"Configuration": texts["config.yaml"], "Environment": texts["env.json"]},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _primary(task: Task) -> tuple[str, str]:
    return task.primary_metric, task.meter_type.metrics[task.primary_metric] or ""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, [] without one; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}:{number} is not JSON ({error}); every line holds one object; repair or delete that line"
            ) from error
    return rows


def _facts(run: Run | None, environment: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """What the head of the page says of the run: name and value."""
    yield "written", f"{datetime.now():%Y-%m-%d %H:%M}"
    if run:
        yield "encoder", run.model.encoder.name
        yield "tasks", ", ".join(run.tasks)
        yield "trained on", ", ".join(name_all(run.data.train))
        yield "input", "{} x {} px".format(*run.data.input_size)
    if environment:
        machine = json.loads(environment)
        gpus, versions = machine.get("gpus", []), machine.get("packages", {})
        yield "device", " + ".join(gpus) or f"CPU, {machine.get('cpu_cores', '?')} cores"
        if "torch" in versions:
            yield "torch", versions["torch"]
    last = rows[-1] if rows else {}
    for key in ("step", "epoch"):
        if isinstance(last.get(key), int):
            yield key, f"{last[key]:,}"


def _card(task: str, result: Mapping[str, Any], primary: PrimaryMetrics) -> dict[str, Any]:
    """The primary metric of a task, its other numbers, and under which conditions they hold."""
    numbers = _numbers(result)
    metric, direction = primary.get(task, (next(iter(numbers), ""), ""))
    notes = [f"protocol {result['protocol']}"] if "protocol" in result else []
    notes += [f"{value:,} {name.replace('_', ' ')}" for name, value in numbers.items() if isinstance(value, int)]
    if result.get("absent"):
        notes.append(f"classes without truth: {', '.join(result['absent'])}")
    if result.get("not_annotated"):
        notes.append(f"classes that this data set does not annotate: {', '.join(result['not_annotated'])}")
    return {
        "task": task,
        "metric": metric,
        "value": result.get(metric),
        "better": {"max": "higher is better", "min": "lower is better", "": ""}[direction],
        "others": {name: value for name, value in numbers.items() if name != metric and not isinstance(value, int)},
        "note": "; ".join(notes),
    }


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value for name, value in result.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def format_metric(name: str, value: float | None) -> str:
    """The number as the page shows it: a count in full, anything else with four digits and the unit of its name."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    unit = next((unit for ending, unit in _UNITS.items() if name.endswith(ending)), "")
    return f"{value:.4f}{unit}" if abs(value) < 10 else f"{value:.2f}{unit}"


def _curves(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], primary: PrimaryMetrics) -> Iterator[Chart]:
    """Per task its loss parts and its primary metric; then what the whole run has in common."""
    train = _series([row for row in rows if row.get("kind") == "train"])
    val = _series([row for row in rows if row.get("kind") == "val"])
    drawn: list[Chart | None] = []
    for task in tasks:
        parts = {_last(name): points for name, points in train.items() if _belongs(name, task) and "loss" in name}
        drawn.append(line_chart(f"{task}: training loss", parts, y_name="loss", log=True))
    for task in tasks:
        measured = {_last(name): points for name, points in val.items() if _belongs(name, task)}
        metric = primary[task][0] if task in primary else next(iter(measured), "")
        shown = {metric: measured[metric]} if metric in measured else dict(list(measured.items())[:1])
        drawn.append(line_chart(f"{task}: validation", shown, y_name=next(iter(shown), "")))
    weights = {_last(name): points for name, points in train.items() if "weight" in name}
    drawn.append(line_chart("weights of the tasks", weights, y_name="weight"))
    for name, title, log in _GRADIENT_CHARTS:
        of_pairs = {_last(path): points for path, points in train.items() if path.startswith(f"gradients/{name}/")}
        drawn.append(line_chart(title, of_pairs, y_name=_last(name), log=log))
    for level in sorted({path.split("/")[1] for path in train if path.startswith("gradients/level")}):
        prefix = f"gradients/{level}/cosine/"
        of_pairs = {_last(path): points for path, points in train.items() if path.startswith(prefix)}
        drawn.append(line_chart(f"cosines of the tasks' gradients, {level}", of_pairs, y_name="cosine"))
    for title, key in (("learning rate", "lr"), ("gradient norm", "grad_norm"), ("images per second", "images_per_s")):
        drawn.append(line_chart(title, {key: train.get(key, [])}, y_name=key, log=key == "grad_norm"))
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


def _class_table(task: str, table: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One row a class; shares (floats in 0..1) get a bar."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    values = {name: [row.get(column) for column in columns] for name, row in table.items()}
    return {"task": task, "columns": columns, "rows": values}


def _as_jpeg(picture: NDArray[np.uint8]) -> str:
    """Base64, at most MAX_PICTURE_PX wide."""
    if picture.shape[1] > MAX_PICTURE_PX:
        height = round(picture.shape[0] * MAX_PICTURE_PX / picture.shape[1])
        picture = np.asarray(cv2.resize(picture, (MAX_PICTURE_PX, height), interpolation=cv2.INTER_AREA), np.uint8)
    written, jpeg = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert written
    return base64.b64encode(jpeg.tobytes()).decode("ascii")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
