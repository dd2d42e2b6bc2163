"""The report of a comparison: a page and Markdown for people, CSV and JSON for programs, PNG charts."""

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from visionmtl.benchmark.figures import Cell, Table, markdown, text_of
from visionmtl.config.text_files import read_object
from visionmtl.data.label_spaces import task_of
from visionmtl.io.atomic import write_json, write_text
from visionmtl.metrics.base import Results
from visionmtl.report.charts import Chart, IntervalChart, IntervalRow, line_chart
from visionmtl.report.report import SortableTable, render
from visionmtl.study.affinity import agreement
from visionmtl.study.charts import draw_curves, draw_intervals
from visionmtl.study.comparison import PlannedRuns, Variant, without
from visionmtl.study.costs import Cost, step_ms
from visionmtl.study.statistics import Interval, student_interval
from visionmtl.study.tables import Figures, figures
from visionmtl.study.worker import Result


@dataclass(frozen=True)
class SearchedTrial:
    """One trial of a search for weights."""

    number: int
    weights: Mapping[str, float]  # by task
    delta_m: float | None  # on the held-out images; None: it diverged, or what it is compared with is not finished
    diverged: bool


@dataclass(frozen=True)
class Measured:
    """A variant with its finished runs."""

    variant: Variant
    results: Mapping[int, Result]  # by seed
    trials: Sequence[SearchedTrial]


@dataclass(frozen=True)
class Row:
    """A variant with its figures."""

    measured: Measured
    figures: Figures
    num_seeds: int  # that count: finished, not diverged, and with the references they are compared with

    @property
    def name(self) -> str:
        """Of the variant; with the size of its search."""
        trials = len(self.measured.variant.trials)
        return f"{self.measured.variant.name} ({trials} trials)" if trials else self.measured.variant.name


def make_rows(plan: PlannedRuns, measured: Sequence[Measured]) -> list[Row]:
    """The figures of every variant that has a finished run."""
    of_variant = {one.variant.name: one for one in measured}
    rows = []
    for one in measured:
        results = {seed: result for seed, result in one.results.items() if result.test is not None}
        references = {seed: _references(plan, one.variant, seed, of_variant) for seed in results}
        # with references, only seeds that have all of them: means over different seeds do not compare
        if any(references.values()):
            results = {seed: result for seed, result in results.items() if references[seed]}
        if not results:
            continue
        of_seeds = [result.test for result in results.values() if result.test is not None]
        calculated = figures(of_seeds, [references[seed] for seed in results], plan.metrics, plan.comparison.confidence)
        rows.append(Row(one, calculated, len(results)))
    return rows


def _references(
    plan: PlannedRuns, variant: Variant, seed: int, of_variant: Mapping[str, Measured]
) -> dict[str, Results]:
    """By task the test results of its reference with the same seed; {} where one is missing, or it is one itself."""
    found: dict[str, Results] = {}
    for task in variant.run.tasks:
        name = plan.reference(task, variant.fraction) if task in plan.metrics else None
        if name is None:
            continue
        measured = of_variant.get(name)
        result = measured.results.get(seed) if measured else None
        if name == variant.name or result is None or result.test is None:
            return {}
        found[task] = result.test
    return found


JSON = "comparison.json"
FILES = ("report.html", "report.md", "results.csv", "runs.csv", "delta_m.png")


def check_folder(folder: Path, plan: PlannedRuns) -> None:
    """Raises ValueError where the report would be written over files that are no earlier report of this comparison."""
    if not (folder / JSON).is_file():
        if others := [name for name in FILES if (folder / name).exists()]:
            raise ValueError(
                f"{folder} holds {', '.join(others)} and no {JSON}, so what is there was made by something else; the "
                "report has files of these names, and nothing is written over; choose another --output"
            )
        return
    known = read_object(folder / JSON, {"comparison.config": str})["comparison"]["config"]
    wanted = plan.comparison.config
    # of finished runs it is their folder; a comparison file may be given another config
    if (Path(known).is_dir() or Path(wanted).is_dir()) and Path(known).resolve() != Path(wanted).resolve():
        raise ValueError(
            f"{folder} holds a report on {known}, and this one is on {wanted}; a folder holds one report, and nothing "
            "is written over; choose another --output"
        )


def write_report(
    folder: Path,
    plan: PlannedRuns,
    measured: Sequence[Measured],
    costs: Mapping[str, Cost],
    affinity: Sequence[Sequence[Sequence[float]]] = (),
) -> None:
    """Write report.html, report.md, results.csv, runs.csv, comparison.json and the charts into the folder.

    affinity: of each seed of the run that it was asked of, [T][T], see `study.affinity`
    """
    rows = make_rows(plan, measured)
    tables = [
        *_against_baseline(plan, measured),
        *_leave_one_out(plan, measured),
        *_gradient_tables(plan, measured),
        *_affinity_tables(plan, affinity),
    ]
    write_json(folder / JSON, {**_plain(plan, measured, rows, costs), "tables": [vars(t) for t in tables]})
    write_text(folder / "results.csv", _csv(_result_records(plan, rows, costs)))
    write_text(folder / "runs.csv", _csv(_run_records(measured)))
    charts = list(_draw(folder, plan, rows))
    content = list(_content(plan, measured, rows, costs, charts, tables))
    lines = [f"\n{markdown(part)}\n" if isinstance(part, Table) else part for part in content]
    write_text(folder / "report.md", re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip("\n")) + "\n")
    _write_page(folder / "report.html", plan, rows, content)


# ---- text and tables ----


def _content(
    plan: PlannedRuns,
    measured: Sequence[Measured],
    rows: Sequence[Row],
    costs: Mapping[str, Cost],
    charts: Sequence[str],
    tables: Sequence[Table],
) -> Iterator[str | Table]:
    """Lines of Markdown, and tables, in the order in which they are read."""
    settings = plan.comparison
    planned, finished = len(settings.seeds) * len(measured), sum(len(one.results) for one in measured)
    percent = f"{100 * settings.confidence:g} %"
    yield f"# Comparison on {Path(settings.config).resolve().name}"
    yield ""
    yield (
        f"{finished} of {planned} runs are finished. Each row is one way to train over "
        f"{len(settings.seeds)} seed{'s' * (len(settings.seeds) > 1)}; "
        f"mean ± half-width of the {percent} Student-t interval over seeds. {plan.origin}"
    )
    if diverged := [
        f"{one.variant.name}, seed {seed}: {result.diverged}"
        for one in measured
        for seed, result in one.results.items()
        if result.diverged
    ]:
        yield "\n**Diverged**\n"
        yield from (f"- {text}" for text in diverged)
    if not rows:
        return
    yield _results_table(plan, rows)
    yield ""
    compared = [row for row in rows if row.figures.transfer]
    if compared:
        yield (
            "Δm is the mean relative change against single-task runs of the same command and seed, in percent; "
            "positive is better. **Per task** takes each task's mean over its metrics first; **over metrics** takes "
            "all metrics in one mean, so that a task with more metrics counts more. An interval that contains 0 shows "
            "no difference."
        )
        yield _transfer_table(plan, compared)
        num_intervals = sum(len(row.figures.transfer) for row in compared)
        by_chance = (1 - settings.confidence) * num_intervals
        yield ""
        yield (
            f"Transfer is called positive or negative only where the {percent} interval excludes zero. These are "
            f"{num_intervals} intervals: about {by_chance:.1f} of them would exclude zero by chance alone if nothing "
            "differed. All rows share the same references, so their intervals are not independent."
        )
    if any(row.measured.variant.name in costs for row in rows):
        yield _cost_table(rows, costs)
        baseline = next(iter(costs.values())).baseline
        yield ""
        yield (
            f"Steps are whole training steps, timed in turns with `{baseline}`; their milliseconds are the ratio "
            f"times the least that `{baseline}` took, so that other load on the machine falls on none; GFLOP are of a "
            "forward pass on one image, a multiply-add as two; memory is the peak of the whole training process (of "
            "its device on CUDA). Runs counts what had to be trained for one seed, trials included."
        )
    for one in measured:
        if one.trials:
            yield _trial_table(one)
            yield ""
            yield f"{len(one.trials)} of {len(one.variant.trials)} trials; the best Δm on held-out images is taken."
    yield from tables
    for name in charts:
        yield f"\n![{name}]({name})"


def _results_table(plan: PlannedRuns, rows: Sequence[Row]) -> Table:
    columns = _metric_columns(plan, rows)
    heads = [f"{name} {metric} {_ARROW[plan.metrics[task_of(name)][metric]]}" for name, metric in columns]
    has_delta = any(row.figures.per_task for row in rows)
    deltas = ["Δm per task, %", "Δm over metrics, %"] if has_delta else []
    body: list[list[Cell]] = []
    for row in rows:
        cells: list[Cell] = [row.name, str(row.num_seeds)]
        cells += [_mean(row.figures.metrics.get(column)) for column in columns]
        cells += [_percent(of) for of in (row.figures.per_task, row.figures.over_metrics)] if has_delta else []
        body.append(cells)
    return Table("Results", ("run", "seeds", *heads, *deltas), body)


_ARROW = {"max": "↑", "min": "↓"}


def _transfer_table(plan: PlannedRuns, rows: Sequence[Row]) -> Table:
    tasks = [task for task in plan.metrics if any(task in row.figures.transfer for row in rows)]
    heads = [text for task in tasks for text in (f"{task}, %", "transfer")]
    body: list[list[Cell]] = []
    for row in rows:
        cells: list[Cell] = [row.name]
        for task in tasks:
            of = row.figures.transfer.get(task)
            cells += [_percent(of), of.verdict if of else None]
        body.append(cells)
    return Table("Transfer by task, against its single-task run", ("run", *heads), body)


def _cost_table(rows: Sequence[Row], costs: Mapping[str, Cost]) -> Table:
    body: list[list[Cell]] = []
    milliseconds = step_ms(costs)
    for row in rows:
        cost = costs.get(row.measured.variant.name)
        if cost is None:
            continue
        memory = max((result.peak_memory_mb for result in row.measured.results.values()), default=0.0)
        num_runs = 1.0 + max(0, len(row.measured.variant.trials) - 1)
        body.append(
            [
                row.name,
                milliseconds[row.measured.variant.name],
                cost.ratio,
                memory,
                cost.num_parameters / 1e6,
                cost.gflop,
                f"{num_runs:.0f}",
            ]
        )
    baseline = next(iter(costs.values())).baseline
    heads = ("run", "ms a step", f"x {baseline}", "peak MiB", "M parameters", "GFLOP an image", "runs")
    return Table("Cost", heads, body)


def _trial_table(one: Measured) -> Table:
    tasks = list(one.trials[0].weights)
    body: list[list[Cell]] = [
        [str(trial.number), *(f"{trial.weights[task]:g}" for task in tasks), _score(trial)] for trial in one.trials
    ]
    heads = ("trial", *(f"weight of {task}" for task in tasks), "Δm per task on held-out images, %")
    return Table(f"Search of {one.variant.name}", heads, body)


def _mean(of: Interval | None) -> str | None:
    if of is None:
        return None
    width = f" ± {of.half_width:.4f}" if math.isfinite(of.half_width) else ""
    return f"{of.mean:.4f}{width}"


def _percent(of: Interval | None) -> str | None:
    if of is None:
        return None
    ends = f" [{100 * of.low:+.1f}, {100 * of.high:+.1f}]" if math.isfinite(of.low) else ""
    return f"{100 * of.mean:+.2f}{ends}"


def _score(trial: SearchedTrial) -> str:
    if trial.delta_m is not None:
        return f"{100 * trial.delta_m:+.2f}"
    return "diverged" if trial.diverged else "nothing to compare with"


def _metric_columns(plan: PlannedRuns, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Names of results and metrics in the order of the plan."""
    present = list(dict.fromkeys(column for row in rows for column in row.figures.metrics))
    ordered = [(task, metric) for task, metrics in plan.metrics.items() for metric in metrics]
    return sorted(present, key=lambda column: ordered.index((task_of(column[0]), column[1])))


# ---- between runs and between tasks ----


def _against_baseline(plan: PlannedRuns, measured: Sequence[Measured]) -> Iterator[Table]:
    """What each run changes of the baseline, paired by seed."""
    name = plan.comparison.baseline
    baseline = next((one for one in measured if one.variant.name == name), None)
    if baseline is None:
        return
    for images, results_of in (("the held-out images", attrgetter("held_out")), ("the test data", attrgetter("test"))):
        body: list[list[Cell]] = []
        for one in measured:
            pairs = [] if one is baseline else _paired(one, baseline, results_of)
            if not pairs:
                continue
            of = _paired_figures(plan, pairs, list(baseline.variant.run.tasks))
            mean = of.per_task if len(of.transfer) > 1 else None
            compared = [*(of.transfer.get(task) for task in plan.metrics), mean]
            body.append([one.variant.name, str(len(pairs)), *map(_verdict, compared)])
        if body:
            heads = ("run", "seeds", *plan.metrics, "mean of tasks")
            yield Table(f"Change against {name}, %, on {images}", heads, body)


def _paired(
    one: Measured, other: Measured, results_of: Callable[[Result], Results | None] = attrgetter("test")
) -> list[tuple[Results, Results]]:
    """The results of both for each seed that both have."""
    pairs = [
        (results_of(result), results_of(other.results[seed]))
        for seed, result in one.results.items()
        if seed in other.results
    ]
    return [(result, reference) for result, reference in pairs if result and reference]


def _paired_figures(plan: PlannedRuns, pairs: Sequence[tuple[Results, Results]], tasks: Sequence[str]) -> Figures:
    """The first of each pair against the second, in these tasks."""
    against = [dict.fromkeys(tasks, reference) for _, reference in pairs]
    return figures([result for result, _ in pairs], against, plan.metrics, plan.comparison.confidence)


def _leave_one_out(plan: PlannedRuns, measured: Sequence[Measured]) -> Iterator[Table]:
    """What the presence of one task does to the others: the whole run against the run without it."""
    name = plan.comparison.leave_one_out
    of_variant = {one.variant.name: one for one in measured}
    if name is None or name not in of_variant:
        return
    whole = of_variant[name]
    tasks = [task for task in plan.metrics if task in whole.variant.run.tasks]
    body: list[list[Cell]] = []
    for task in tasks:
        other = of_variant.get(without(name, task))
        pairs = _paired(whole, other) if other else []
        if not pairs:
            continue
        of = _paired_figures(plan, pairs, [one for one in tasks if one != task])
        body.append([task, *(_verdict(of.transfer.get(one)) for one in tasks)])
    if body:
        yield Table(f"What adding a task does to the others in {name}, % (leave one out)", ("added", *tasks), body)


def _verdict(of: Interval | None) -> str | None:
    return None if of is None else f"{_percent(of)} {of.verdict}"


def _gradient_tables(plan: PlannedRuns, measured: Sequence[Measured]) -> Iterator[Table]:
    """Cosines and conflict between tasks over training, for the methods that see gradients."""
    for figure, title in (("cosine", "Cosine of the tasks' gradients"), ("conflict", "Share of steps in conflict")):
        seen = [(one, [r.gradients[figure] for r in one.results.values() if figure in r.gradients]) for one in measured]
        seen = [(one, of_seeds) for one, of_seeds in seen if of_seeds]
        pairs = list(dict.fromkeys(pair for _, of_seeds in seen for of_seed in of_seeds for pair in of_seed))
        body: list[list[Cell]] = []
        for one, of_seeds in seen:
            cells: list[Cell] = [one.variant.name]
            for pair in pairs:
                values = [of_seed[pair] for of_seed in of_seeds if pair in of_seed]
                cells.append(_mean(student_interval(values, plan.comparison.confidence)) if values else None)
            in_all = [pair for pair in pairs if all(pair in of_seed for of_seed in of_seeds)]
            alike = agreement([[of_seed[pair] for pair in in_all] for of_seed in of_seeds])
            body.append([*cells, None if alike is None else f"{alike:+.2f}"])
        if body:
            yield Table(f"{title}, mean over training", ("run", *pairs, "agreement of seeds"), body)


def _affinity_tables(plan: PlannedRuns, affinity: Sequence[Sequence[Sequence[float]]]) -> Iterator[Table]:
    """The matrix over seeds; a row is the task that steps."""
    name = plan.comparison.affinity
    if name is None or not affinity:
        return
    tasks = list(plan.variants[name].run.tasks)
    seeds = np.array(affinity, np.float64)  # [seeds, T, T], NaN where no batch had labels of both tasks
    body: list[list[Cell]] = []
    for i, task in enumerate(tasks):
        known = [of_pair[np.isfinite(of_pair)] for of_pair in 100 * seeds[:, i].T]
        of_row = [student_interval(of.tolist(), plan.comparison.confidence) if len(of) else None for of in known]
        body.append([task, *map(_mean, of_row)])
    between = seeds[:, ~np.eye(len(tasks), dtype=bool)]
    alike = agreement(between[:, np.isfinite(between).all(axis=0)].tolist())
    told = "" if alike is None else f"; rank correlation between seeds {alike:+.2f}"
    yield Table(
        f"Look-ahead affinity in {name}: a step for one task (row) lowers a loss by %{told}", ("step", *tasks), body
    )


# ---- charts ----


def _write_page(file: Path, plan: PlannedRuns, rows: Sequence[Row], content: Sequence[str | Table]) -> None:
    """The same as a page whose tables sort and whose charts tell their numbers."""
    title, *parts = content
    blocks: list[str | list[str] | SortableTable] = []
    for part in parts:
        if isinstance(part, Table):
            blocks.append(SortableTable(part.title, part.columns, part.rows, _shown, bars=False))
        elif part.startswith("- "):
            if not (items := blocks[-1] if blocks and isinstance(blocks[-1], list) else []):
                blocks.append(items)
            items.append(part.removeprefix("- "))
        elif (text := part.strip("\n")) and not text.startswith("!["):
            blocks.append(text)
    charts: list[IntervalChart | Chart] = []
    for name, of_rows in _interval_charts(plan, rows):
        lines = [_interval_row(row, of) for row, of in of_rows]
        charts.append(IntervalChart(name, "change in %; right is better", tuple(lines)))
    for _, name, y_name, curves in _label_curves(plan, rows):
        points = {of: [(100 * fraction, one.mean) for fraction, one in curve] for of, curve in curves.items()}
        if chart := line_chart(name, points, x_name="labels in %", y_name=y_name):
            charts.append(chart)
    render(file, "comparison.html.j2", name=str(title).removeprefix("# "), blocks=blocks, charts=charts)


def _shown(column: str, value: float | None) -> str:
    return "–" if value is None else text_of(value)


def _interval_row(name: str, of: Interval) -> IntervalRow:
    low, high = (100 * end if math.isfinite(end) else None for end in (of.low, of.high))
    return IntervalRow(name, 100 * of.mean, low, high, tuple(100 * value for value in of.values), of.verdict)


def _interval_charts(plan: PlannedRuns, rows: Sequence[Row]) -> Iterator[tuple[str, list[tuple[str, Interval]]]]:
    """Titles, and rows with their intervals: the mean over tasks, then each task."""
    deltas = [(row.name, row.figures.per_task) for row in rows if row.figures.per_task]
    if deltas:
        yield "mean relative change per task against single-task runs", deltas
    for task in plan.metrics:
        changes = [(row.name, row.figures.transfer[task]) for row in rows if task in row.figures.transfer]
        if changes:
            yield f"{task}: change against its single-task run", changes


_Curves = dict[str, list[tuple[float, Interval]]]


def _label_curves(plan: PlannedRuns, rows: Sequence[Row]) -> Iterator[tuple[str, str, str, _Curves]]:
    """File, title, name of the y axis, and by entry the metric over the fraction of labels."""
    thinned = plan.comparison.label_fractions
    if thinned is None:
        return
    for name, metric in _metric_columns(plan, rows):
        if task_of(name) != thinned.task:
            continue
        curves: _Curves = {}
        for row in sorted(rows, key=lambda row: row.measured.variant.fraction or 0):
            fraction = row.measured.variant.fraction
            if fraction is not None and (name, metric) in row.figures.metrics:
                entry = row.measured.variant.entry
                curves.setdefault(entry, []).append((fraction, row.figures.metrics[name, metric]))
        if curves:
            file = re.sub(r"[/@]", "_", f"labels_{name}_{metric}.png")
            yield file, f"over the fraction of {thinned.task} labels", f"{name} {metric}", curves


def _draw(folder: Path, plan: PlannedRuns, rows: Sequence[Row]) -> Iterator[str]:
    for title, of_rows in _interval_charts(plan, rows):
        task = title.partition(":")[0]
        name = f"transfer_{task}.png" if task in plan.metrics else "delta_m.png"
        draw_intervals(folder / name, title, of_rows)
        yield name
    for file, title, y_name, curves in _label_curves(plan, rows):
        draw_curves(folder / file, title, curves, y_name)
        yield file


# ---- CSV and JSON ----


def _result_records(plan: PlannedRuns, rows: Sequence[Row], costs: Mapping[str, Cost]) -> Iterator[dict[str, Any]]:
    """One line a variant and figure."""
    for row in rows:
        of: dict[str, Interval] = {
            f"{name}/{metric}": row.figures.metrics[name, metric]
            for name, metric in _metric_columns(plan, rows)
            if (name, metric) in row.figures.metrics
        }
        of |= {f"transfer/{task}": one for task, one in row.figures.transfer.items()}
        if row.figures.per_task and row.figures.over_metrics:
            of |= {"delta_m/per_task": row.figures.per_task, "delta_m/over_metrics": row.figures.over_metrics}
        for figure, interval in of.items():
            yield {
                "run": row.measured.variant.name, "label_fraction": row.measured.variant.fraction, "figure": figure,
                "mean": interval.mean, "low": interval.low, "high": interval.high, "seeds": row.num_seeds,
            }  # fmt: skip
        cost = costs.get(row.measured.variant.name)
        of_step = step_ms(costs).get(row.measured.variant.name)
        named = {"step_ms": of_step, "x_baseline": cost.ratio, "parameters": cost.num_parameters} if cost else {}
        for figure, value in (named | {"gflop": cost.gflop} if cost else {}).items():
            yield {
                "run": row.measured.variant.name, "label_fraction": row.measured.variant.fraction,
                "figure": f"cost/{figure}", "mean": value, "low": None, "high": None, "seeds": None,
            }  # fmt: skip


def _run_records(measured: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    """One line a run and number of its test results."""
    for one in measured:
        for seed, result in one.results.items():
            for name, of_name in (result.test or {}).items():
                for metric, value in of_name.items():
                    if isinstance(value, int | float) and not isinstance(value, bool):
                        yield {"run": one.variant.name, "seed": seed, "task": name, "metric": metric, "value": value}


def _csv(records: Iterator[dict[str, Any]]) -> str:
    table = list(records)
    text = io.StringIO()
    if table:
        writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return text.getvalue()


def _plain(
    plan: PlannedRuns, measured: Sequence[Measured], rows: Sequence[Row], costs: Mapping[str, Cost]
) -> dict[str, Any]:
    def interval(of: Interval | None) -> dict[str, Any] | None:
        return None if of is None else {**vars(of), "verdict": of.verdict}

    return {
        "comparison": plan.comparison.model_dump(mode="json"),
        "rows": [
            {
                "run": row.measured.variant.name,
                "label_fraction": row.measured.variant.fraction,
                "seeds": row.num_seeds,
                "metrics": {f"{n}/{m}": interval(of) for (n, m), of in row.figures.metrics.items()},
                "transfer": {task: interval(of) for task, of in row.figures.transfer.items()},
                "delta_m_per_task": interval(row.figures.per_task),
                "delta_m_over_metrics": interval(row.figures.over_metrics),
                "cost": vars(costs[name]) if (name := row.measured.variant.name) in costs else None,
            }
            for row in rows
        ],
        "trials": {one.variant.name: [vars(trial) for trial in one.trials] for one in measured if one.trials},
    }
