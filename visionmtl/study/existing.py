"""Runs that lie in a folder already, however they were trained, read as a comparison."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from visionmtl import run as config
from visionmtl.config.text_files import read_object
from visionmtl.engine.evaluator import read_results
from visionmtl.metrics.base import Direction
from visionmtl.run import Run
from visionmtl.study.comparison import Comparison, PlannedRuns, RunEntry, Variant, key_of, settings_of
from visionmtl.study.report import Measured
from visionmtl.study.worker import Result, load_result

_HEADER: Mapping[str, type] = {"header.step": int, "header.epoch": int}


def read_existing(folder: Path, confidence: float = 0.95) -> tuple[PlannedRuns, list[Measured]]:
    """Every run folder below `folder` with an evaluation; runs that differ in the seed alone make one row.

    Figures are those of each run's last evaluation, on its own validation data. Each task's reference is the row that
    learns it alone. Raises ValueError where there is no run, and where runs do not compare.
    """
    found = list(_runs(folder))
    if not found:
        raise ValueError(
            f"{folder} holds no run with config.yaml and eval/step-*.json; a folder of finished runs is needed; train "
            "some, or name a comparison file"
        )
    _check_same_data(found)
    rows: dict[str, dict[int, tuple[Path, Run, Result]]] = {}
    for where, run, result in found:
        row = rows.setdefault(key_of(run.model_copy(update={"seed": 0})), {})
        if run.seed in row:
            raise ValueError(
                f"{where} and {row[run.seed][0]} are one run twice: the same settings and seed {run.seed}; each seed "
                "counts once; move one of them away"
            )
        row[run.seed] = where, run, result
    named = {_name(folder, [where for where, _, _ in row.values()]): row for row in rows.values()}
    variants = {name: _variant(name, next(iter(row.values()))[1]) for name, row in named.items()}
    metrics: dict[str, dict[str, Direction]] = {}
    for variant in variants.values():
        for name, task in variant.run.tasks.items():
            direction = task.meter_type.metrics[task.primary_metric]
            assert direction is not None
            metrics[name] = {task.primary_metric: direction}
    comparison = Comparison(
        config=str(folder),
        seeds=tuple(sorted({seed for row in named.values() for seed in row})),
        runs={name: RunEntry() for name in named},
        confidence=confidence,
    )
    origin = "Figures are those of each run's last evaluation on its own validation data, which nothing kept unseen."
    plan = PlannedRuns(comparison, variants, metrics, _references(variants), frozenset(variants), origin)
    return plan, [
        Measured(variants[name], {seed: result for seed, (_, _, result) in row.items()}, ())
        for name, row in named.items()
    ]


def _runs(folder: Path) -> Iterator[tuple[Path, Run, Result]]:
    """Folder, settings and last evaluation of each run, or why it diverged. Raises ValueError for an unfinished one."""
    for where in sorted(file.parent for file in folder.rglob("config.yaml")):
        evaluations = sorted((where / "eval").glob("step-*.json"))
        if not evaluations and not (where / "metrics.jsonl").is_file():
            continue  # a config.yaml of something else
        run = config.load_recorded(where)
        known = load_result(where)
        if known and known.diverged:
            yield where, run, known
            continue
        header = read_object(evaluations[-1], _HEADER)["header"] if evaluations else {}
        if not header or header["epoch"] < run.train.epochs:
            last = (
                f"last evaluated after epoch {header['epoch']} of {run.train.epochs}" if header else "never evaluated"
            )
            raise ValueError(
                f"{where} was {last}; a comparison takes runs that have ended; finish it (visionmtl train --resume "
                f"{where}), or move it away"
            )
        results = read_results(evaluations[-1])
        yield where, run, Result(settings_of(run), None, header["step"], {}, results, (), 0, 0.0, 0.0)


def _check_same_data(found: Sequence[tuple[Path, Run, Result]]) -> None:
    (first, run, _), *others = found
    for where, other, _ in others:
        if settings_of(other)["data"]["val"] != settings_of(run)["data"]["val"]:
            raise ValueError(
                f"{where} was evaluated on other data (data.val) than {first}; figures on different data do not "
                "compare; move one of them away"
            )


def _name(folder: Path, places: Sequence[Path]) -> str:
    """NAME of NAME/SEED for several seeds, or of a folder alone."""
    relative = [place.relative_to(folder) for place in places]
    parents = {path.parent for path in relative}
    if len(relative) > 1 and len(parents) == 1 and parents != {Path(".")}:
        return ".".join(parents.pop().parts)
    return ".".join(relative[0].parts) or folder.name


def _variant(name: str, run: Run) -> Variant:
    return Variant(name, name, run, tuple(run.data.val))


def _references(variants: dict[str, Variant]) -> dict[tuple[str, float | None], str]:
    references: dict[tuple[str, float | None], str] = {}
    for name, variant in variants.items():
        if len(variant.run.tasks) == 1:
            key = (next(iter(variant.run.tasks)), None)
            if key in references:
                raise ValueError(
                    f"{references[key]} and {name} both learn {key[0]!r} alone; one is the reference; move the other "
                    "away, or write a comparison file with `references`"
                )
            references[key] = name
    return references
