"""A run on one page: an HTML file that holds its numbers, curves and pictures, and loads nothing."""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visionmtl.data.label_spaces import task_of
from visionmtl.report.charts import NUM_COLOURS, Points, line_chart
from visionmtl.run import load
from visionmtl.tasks.base import Task

Titled = tuple[str, NDArray[np.uint8]]
PrimaryMetrics = Mapping[str, tuple[str, str]]
"""By task: its primary metric, and "max" or "min"."""

MAX_PICTURE_PX = 1800
_UNITS = {"_m": " m", "_deg": "°", "_s": " s"}


def write_report(
    path: Path, run_dir: Path, results: Mapping[str, Mapping[str, Any]], pictures: Sequence[Titled] = ()
) -> None:
    """Write the page.

    run_dir: where config.yaml, env.json and metrics.jsonl are looked for; the page says which of them are missing.
    results: by task, what its meter computed; pictures: uint8 [H, W, 3] RGB with their titles.
    """
    config, environment = _text(run_dir / "config.yaml"), _text(run_dir / "env.json")
    tasks = load(run_dir / "config.yaml").tasks if config else {}
    primary = {name: _primary(tasks[task_of(name)]) for name in results if task_of(name) in tasks}
    rows = read_rows(run_dir / "metrics.jsonl")
    missing = [name for name in ("config.yaml", "env.json", "metrics.jsonl") if not (run_dir / name).is_file()]

    body = [
        _heading(run_dir, rows, missing),
        _section("Results", _grid("cards", _cards(results, primary))),
        _section("Curves", _grid("charts", [*_charts(rows, list(results), primary), *_precision_charts(results)])),
        _section("Pictures", "".join(_figure(title, picture) for title, picture in pictures)),
        _section("Classes", _grid("tables", _class_tables(results))),
        _section("Settings", _folded("Configuration", config) + _folded("Environment", environment)),
    ]
    head, foot = _PAGE.split("{body}")
    title = escape(f"{run_dir.resolve().name} - visionmtl")
    page = "".join([head.replace("{title}", title), *body, foot])
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


def _heading(run_dir: Path, rows: Sequence[Mapping[str, Any]], missing: Sequence[str]) -> str:
    last = rows[-1] if rows else {}
    facts = [f"{key} {last[key]:,}" for key in ("step", "epoch") if isinstance(last.get(key), int)]
    facts += [f"no {name} in the run's folder" for name in missing]
    return f"<header><h1>{escape(run_dir.resolve().name)}</h1><p>{escape(' · '.join(facts))}</p></header>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _grid(kind: str, cells: Iterable[str]) -> str:
    content = "".join(cells)
    return f'<div class="{kind}">{content}</div>' if content else ""


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>" if text else ""


def _cards(results: Mapping[str, Mapping[str, Any]], primary: PrimaryMetrics) -> Iterator[str]:
    for task, result in results.items():
        numbers = _numbers(result)
        metric, way = primary.get(task, (next(iter(numbers), ""), ""))
        value = format_metric(metric, result[metric]) if result.get(metric) is not None else "no label in this split"
        better = {"max": "higher is better", "min": "lower is better", "": ""}[way]
        rest = "".join(
            f"<tr><td>{escape(name)}</td><td>{format_metric(name, number)}</td></tr>"
            for name, number in numbers.items()
            if name != metric and not isinstance(number, int)
        )
        yield (
            f'<article class="card"><h3>{escape(task)}</h3><p class="big">{value}</p>'
            f'<p class="metric"><code>{escape(metric)}</code> {better}</p><table class="plain">{rest}</table>'
            f'<p class="note">{escape(_note(result))}</p></article>'
        )


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value for name, value in result.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _note(result: Mapping[str, Any]) -> str:
    parts = [f"protocol {result['protocol']}"] if "protocol" in result else []
    parts += [
        f"{value:,} {name.replace('_', ' ')}" for name, value in _numbers(result).items() if isinstance(value, int)
    ]
    if result.get("absent"):
        parts.append(f"classes without truth: {', '.join(result['absent'])}")
    return "; ".join(parts)


def format_metric(name: str, value: float | None) -> str:
    """The number as the page shows it: a count in full, anything else with four digits and the unit of its name."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    unit = next((unit for ending, unit in _UNITS.items() if name.endswith(ending)), "")
    return f"{value:.4f}{unit}" if abs(value) < 10 else f"{value:.2f}{unit}"


def _charts(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], primary: PrimaryMetrics) -> Iterator[str]:
    """Per task its loss parts and its primary metric; then what the whole run has in common."""
    train = _series([row for row in rows if row.get("kind") == "train"])
    val = _series([row for row in rows if row.get("kind") == "val"])
    for task in tasks:
        parts = {name: points for name, points in train.items() if _belongs(name, task) and "loss" in name}
        yield _chart(f"{task}: training loss", parts, log=True)
    for task in tasks:
        measured = {name: points for name, points in val.items() if _belongs(name, task)}
        metric = primary[task][0] if task in primary else ""
        shown = {name: points for name, points in measured.items() if name.split("/")[-1] == metric}
        yield _chart(f"{task}: validation", shown or dict(list(measured.items())[:1]))
    yield _chart("weights of the tasks", {name: points for name, points in train.items() if "weight" in name})
    for title, key in (("learning rate", "lr"), ("gradient norm", "grad_norm"), ("images per second", "images_per_s")):
        yield _chart(title, {key: train.get(key, [])}, log=key == "grad_norm")


def _precision_charts(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for task, result in results.items():
        curves = {
            f"IoU .{name[-2:]}": [(at / 100, value) for at, value in enumerate(curve) if value is not None]
            for name, curve in result.get("pr_curves", {}).items()
        }
        yield _chart(f"{task}: precision over recall, mean over classes", curves, last_values=False)


def _chart(title: str, series: Mapping[str, Points], log: bool = False, last_values: bool = True) -> str:
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    legend = "".join(
        f'<span class="key line{i % NUM_COLOURS}">{escape(name.split("/")[-1])}'
        + (f" <b>{points[-1][1]:.4g}</b></span>" if last_values else "</span>")
        for i, (name, points) in enumerate(series.items())
    )
    svg = line_chart(series, log=log)
    return f'<figure class="chart"><figcaption>{escape(title)}<br>{legend}</figcaption>{svg}</figure>'


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


def _belongs(name: str, task: str) -> bool:
    return task in name.split("/")[:-1]


def _class_tables(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for task, result in results.items():
        if result.get("per_class"):
            yield _class_table(task, result["per_class"])


def _class_table(task: str, table: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a class; shares (floats in 0..1) get a bar."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = []
    for name, row in table.items():
        cells = []
        for column in columns:
            value = row.get(column)
            bar = f' style="--share:{value:.3f}" class="bar"' if isinstance(value, float) and 0 <= value <= 1 else ""
            cells.append(f"<td{bar}>{format_metric(column, value)}</td>")
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    return (
        f'<table class="classes"><caption>{escape(task)}</caption><thead><tr><th>class</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _figure(title: str, picture: NDArray[np.uint8]) -> str:
    if picture.shape[1] > MAX_PICTURE_PX:
        height = round(picture.shape[0] * MAX_PICTURE_PX / picture.shape[1])
        picture = np.asarray(cv2.resize(picture, (MAX_PICTURE_PX, height), interpolation=cv2.INTER_AREA), np.uint8)
    written, jpeg = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert written
    data = base64.b64encode(jpeg.tobytes()).decode("ascii")
    image = f'<img alt="{escape(title)}" src="data:image/jpeg;base64,{data}">'
    return f"<figure><figcaption>{escape(title)}</figcaption>{image}</figure>"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2129; --faint: #667085; --rim: #e3e6eb; --card: #f8f9fb;
  --bar: #cfe3ff; --c0: #2563eb; --c1: #d9480f; --c2: #16803c; --c3: #a21caf; --c4: #b58900; --c5: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #e6e8ec; --faint: #98a2b3; --rim: #2c313a;
  --card: #1b1e24; --bar: #1e3a66; --c0: #6ea8fe; --c1: #ff922b; --c2: #51cf66; --c3: #da77f2; --c4: #ffd43b;
  --c5: #3bc9db; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header { border-bottom: 1px solid var(--rim); margin-bottom: 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .9rem; }
h3 { margin: 0; font-size: 1rem; }
header p, .metric, .note, figcaption { color: var(--faint); } header p { margin: .2rem 0 1rem; }
code, pre { font: .86em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.cards, .charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr));
  align-items: start; }
.card, .chart { background: var(--card); border: 1px solid var(--rim); border-radius: 10px; padding: 1rem 1.2rem; }
.big { font-size: 2.3rem; line-height: 1.15; font-weight: 650; margin: .35rem 0 0; font-variant-numeric: tabular-nums; }
.metric { margin: 0 0 .7rem; } .note { font-size: .82rem; margin: .8rem 0 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.plain { width: 100%; font-size: .88rem; } .plain td { padding: .12rem 0; border-top: 1px solid var(--rim); }
td:not(:first-child), th:not(:first-child) { text-align: right; }
.tables { display: flex; flex-wrap: wrap; gap: 2rem 3rem; align-items: flex-start; }
.classes { flex: 1 1 24rem; font-size: .88rem; }
.classes caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
.classes th { color: var(--faint); font-weight: 500; } .classes th:first-child { text-align: left; }
.classes th, .classes td { padding: .2rem .5rem; border-bottom: 1px solid var(--rim); }
.bar { background: linear-gradient(to right, var(--bar) calc(var(--share) * 100%), transparent 0) no-repeat; }
figure { margin: 0 0 1.4rem; } .chart { margin: 0; } figcaption { font-size: .88rem; margin-bottom: .4rem; }
img { max-width: 100%; border: 1px solid var(--rim); border-radius: 8px; display: block; }
svg { width: 100%; display: block; } svg text { font-size: 10.5px; fill: var(--faint); } .grid { stroke: var(--rim); }
polyline { fill: none; stroke-width: 1.7; stroke-linejoin: round; }
.key { margin-right: .9em; white-space: nowrap; } .key b { color: var(--ink); font-weight: 600; }
.key::before { content: ""; display: inline-block; width: 1em; height: 3px; margin-right: .35em; vertical-align: .22em;
  border-radius: 2px; background: currentColor; }
{lines}
details { border: 1px solid var(--rim); border-radius: 10px; padding: .6rem 1rem; margin-bottom: .7rem;
  background: var(--card); }
summary { cursor: pointer; font-weight: 550; } pre { overflow-x: auto; white-space: pre-wrap; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } .card, .chart, figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; } .bar { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
</style>
</head>
<body>
{body}
</body>
</html>
""".replace(
    "{lines}",
    "\n".join(
        f"polyline.line{i} {{ stroke: var(--c{i}); }} circle.line{i} {{ fill: var(--c{i}); }} .key.line{i}::before "
        f"{{ background: var(--c{i}); }}"
        for i in range(NUM_COLOURS)
    ),
)
