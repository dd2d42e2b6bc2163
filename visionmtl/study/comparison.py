"""What is compared: the settings of a comparison file, and the runs that follow from them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import Self

from visionmtl import run as config
from visionmtl.config import loader
from visionmtl.config.loader import ConfigError
from visionmtl.config.registry import Spec
from visionmtl.config.suggest import did_you_mean
from visionmtl.config.text_files import check_object
from visionmtl.datasets import Dataset, name_all
from visionmtl.datasets.subset import Subset
from visionmtl.metrics.base import Direction, declared
from visionmtl.run import Run

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][\w.+-]*$")]
_DECIDED = ("seed", "output")
"""Settings of a run that the comparison decides."""


class WeightSearch(Spec):
    """Fixed loss weights, tuned: the trial with the best delta_m (tasks first) on the held-out images.

    The first trial has the weights of the config; the others are drawn log-uniformly, always the same ones. All trials
    train with the first seed; the weights chosen then train with all.
    """

    weights: dict[str, tuple[float, float]] = Field(min_length=1)
    """By task: the least and the greatest weight tried. One task may stay out: only ratios of weights matter much."""
    trials: int = Field(ge=2)

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for task, (low, high) in self.weights.items():
            if not 0 < low < high:
                raise ValueError(f"weights.{task} is [{low}, {high}]; allowed is 0 < least < greatest; correct it")
        return self

    def draw(self) -> list[dict[str, float]]:
        """The weights of each trial by task, three digits each; {} for those of the config."""
        rng = np.random.default_rng(0)
        names = list(self.weights)
        low, high = np.log([self.weights[name] for name in names]).T
        drawn = np.exp(rng.uniform(low, high, (self.trials - 1, len(names))))
        return [{}, *({n: float(f"{w:.3g}") for n, w in zip(names, row, strict=True)} for row in drawn)]


class RunEntry(Spec):
    """One way to train, as it differs from the others."""

    tasks: tuple[str, ...] | None = Field(None, min_length=1)
    """The tasks of the config that it learns; None: all. With a single one, it is that task's reference."""
    overrides: tuple[str, ...] = ()
    """`a.b=c` or `~a.b`, as on the command line of `train.py`."""
    random_normals: bool = False
    """Give all training images random normals, for a noise task (see `datasets.subset`); `overrides` adds the task."""
    search: WeightSearch | None = None


class LabelFractions(Spec):
    """Train every run that learns a task once for each fraction of its labels."""

    task: str
    fractions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(min_length=2)
    """Of the training images; larger fractions contain smaller ones."""


class Comparison(Spec):
    """Runs that differ in what is compared and in nothing else, each over the same seeds."""

    config: str
    """What they have in common: a config, relative to this file, or a shipped one."""
    overrides: tuple[str, ...] = ()
    """Settings of all runs that replace those of the config."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1)
    held_out: float = Field(0.1, gt=0, lt=1)
    """Fraction of the training images that no run trains on. They choose checkpoints and searched weights; the
    config's own validation data are read once, at the end of a run."""
    runs: dict[RunName, RunEntry] = Field(min_length=1)
    metrics: dict[str, tuple[str, ...]] = {}
    """By task: what is compared; other tasks of the config count with their primary metric."""
    references: dict[str, str] = {}
    """By task: the run it is compared with; a task left out has the only run that learns it alone."""
    confidence: float = Field(0.95, gt=0, lt=1)
    label_fractions: LabelFractions | None = None
    leave_one_out: str | None = None
    """A run that is also trained without each of its tasks in turn: what each task does to the others."""
    affinity: str | None = None
    """A run whose look-ahead affinity is measured when it is trained, see `study.affinity`."""
    baseline: str | None = None
    """A run that all others are also compared with, on the held-out images and on the test data: what one change of it
    gives."""
    cache: bool = False
    """Keep decoded training images in DIR/cache for all runs; see `data.cache`."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}; each counts once; remove the repeated one")
        for setting in ("leave_one_out", "affinity", "baseline"):
            name = getattr(self, setting)
            if name is None:
                continue
            if name not in self.runs or self.runs[name].search or self.label_fractions:
                raise ValueError(
                    f"{setting} is {name!r}{did_you_mean(name, self.runs)}; allowed is one of the runs "
                    f"({', '.join(self.runs)}) without a search, and no label_fractions in the same file; correct it"
                )
        return self


@dataclass(frozen=True)
class Variant:
    """An entry, or one of its label fractions: the row of a table. `run` has neither seed nor folder yet."""

    name: str
    entry: str
    run: Run
    test: tuple[Dataset, ...]
    fraction: float | None = None  # of the labels of `LabelFractions.task`; None: the entry does not learn it
    trials: tuple[Mapping[str, float], ...] = ()  # of a search, see `WeightSearch.draw`

    def seeded(self, seed: int) -> Run:
        """The run with a seed."""
        return self.run.model_copy(update={"seed": seed})

    def weighted(self, weights: Mapping[str, float]) -> "Variant":
        """The same with the weights of a trial."""
        tasks = {
            name: task.model_copy(update={"weight": weights.get(name, task.weight)})
            for name, task in self.run.tasks.items()
        }
        run = self.run.model_copy(update={"tasks": tasks})
        return Variant(self.name, self.entry, run, self.test, self.fraction)


@dataclass(frozen=True)
class PlannedRuns:
    """All variants of a comparison, and what is read off them."""

    comparison: Comparison
    variants: Mapping[str, Variant]
    metrics: Mapping[str, Mapping[str, Direction]]  # by task of the config and metric
    references: Mapping[tuple[str, float | None], str]  # by task and label fraction: the variant
    selected: frozenset[str]  # the variants that are wanted
    origin: str  # a sentence: where the figures come from

    def reference(self, task: str, fraction: float | None) -> str | None:
        """The variant that a task is compared with; references that do not learn the thinned task have no fraction."""
        return self.references.get((task, fraction)) or self.references.get((task, None))


def read(path: str | Path, overrides: Sequence[str] = (), only: Sequence[str] = ()) -> PlannedRuns:
    """The plan of a comparison file. Raises ConfigError listing what does not fit.

    overrides: settings of all runs, after those of the file; only: names of the entries wanted (and their references);
    all where empty.
    """
    file = loader.find(path)
    tree = loader.read(file)
    if "runs" not in tree.values and "model" in tree.values:
        raise ConfigError(f"{file} is the config of one run; a comparison has `config` and `runs`; see configs/compare")
    comparison = config.checked(Comparison, tree.values, tree, file)  # ${...} in overrides is filled in within each run
    base = loader.find_base(file, comparison.config)
    common = (*comparison.overrides, *overrides)
    whole = config.load(base, common)
    metrics = _metrics(comparison, whole, file)
    references = _references(comparison, list(whole.tasks), file)
    thinned = comparison.label_fractions
    if thinned is not None and thinned.task not in whole.tasks:
        raise ConfigError(
            f"label_fractions.task in {file} is {thinned.task!r}{did_you_mean(thinned.task, whole.tasks)}; the config "
            f"has {', '.join(whole.tasks)}; correct it"
        )
    wanted = _wanted(only, comparison, references)
    variants: dict[str, Variant] = {}
    by_fraction: dict[tuple[str, float | None], str] = {}
    for name, entry in (comparison.runs | _without_each(comparison, list(whole.tasks), file)).items():
        for variant in _variants(name, entry, comparison, whole, base, common, file):
            variants[variant.name] = variant
            by_fraction |= {(task, variant.fraction): variant.name for task, of in references.items() if of == name}
    out_of = comparison.leave_one_out
    selected = frozenset(
        name
        for name, variant in variants.items()
        if variant.entry in wanted or (out_of in wanted and variant.entry not in comparison.runs)
    )
    origin = (
        f"Checkpoints and searched weights were chosen on {100 * comparison.held_out:g} % of the training images, "
        "which no run trained on; the figures are those of the test data, read once."
    )
    return PlannedRuns(comparison, variants, metrics, by_fraction, selected, origin)


def _metrics(comparison: Comparison, whole: Run, file: Path) -> dict[str, dict[str, Direction]]:
    for unknown in comparison.metrics:
        if unknown not in whole.tasks:
            raise ConfigError(
                f"metrics.{unknown} in {file}{did_you_mean(unknown, whole.tasks)}: the config has the tasks "
                f"{', '.join(whole.tasks)}; name one of them"
            )
    chosen: dict[str, dict[str, Direction]] = {}
    for name, task in whole.tasks.items():
        known = task.meter_type.metrics
        chosen[name] = {}
        for metric in comparison.metrics.get(name, (task.primary_metric,)):
            pattern = declared(known, metric)
            direction = known[pattern] if pattern else None
            if direction is None:
                better = [one for one, way in known.items() if way]
                raise ConfigError(
                    f"metrics.{name} in {file} names {metric!r}{did_you_mean(metric, better)}, which has no better "
                    f"direction or is unknown; allowed are {', '.join(better)}; correct it"
                )
            chosen[name][metric] = direction
    return chosen


def _references(comparison: Comparison, tasks: Sequence[str], file: Path) -> dict[str, str]:
    """By task the entry that it is compared with; tasks without one are in no comparison."""
    for task, entry in comparison.references.items():
        if task not in tasks or entry not in comparison.runs:
            raise ConfigError(
                f"references in {file} has {task}: {entry}; a task of the config ({', '.join(tasks)}) and a run "
                f"({', '.join(comparison.runs)}) are needed; correct it"
            )
    found = dict(comparison.references)
    for task in tasks:
        alone = [name for name, entry in comparison.runs.items() if entry.tasks == (task,)]
        if task not in found and len(alone) > 1:
            raise ConfigError(
                f"{' and '.join(alone)} in {file} both learn {task!r} alone; one is the reference; name it under "
                f"`references: {{{task}: {alone[0]}}}`"
            )
        if task not in found and alone:
            found[task] = alone[0]
    return found


def _wanted(only: Sequence[str], comparison: Comparison, references: Mapping[str, str]) -> set[str]:
    for name in only:
        if name not in comparison.runs:
            raise ConfigError(
                f"--only {name}{did_you_mean(name, comparison.runs)}: the runs are {', '.join(comparison.runs)}; "
                "choose among them"
            )
    chosen = {*only, *references.values()} if only else set(comparison.runs)
    for name, entry in comparison.runs.items():
        if entry.search and not references:
            raise ConfigError(
                f"runs.{name}.search chooses by delta_m, which needs single-task references; there are none; add runs "
                "such as `single_depth: {tasks: [depth]}`"
            )
    return chosen


def without(name: str, task: str) -> str:
    """The name of a run that leaves a task out."""
    return f"{name}-without-{task}"


def _without_each(comparison: Comparison, tasks: Sequence[str], file: Path) -> dict[str, RunEntry]:
    """The runs of `leave_one_out`."""
    name = comparison.leave_one_out
    if name is None:
        return {}
    entry = comparison.runs[name]
    learnt = entry.tasks or tuple(tasks)
    if len(learnt) < 2:
        raise ConfigError(
            f"leave_one_out in {file} is {name!r}, which learns {', '.join(learnt)} alone; two tasks or more are "
            "needed; choose another run"
        )
    return {
        without(name, task): entry.model_copy(update={"tasks": tuple(one for one in learnt if one != task)})
        for task in learnt
    }


def _variants(
    name: str, entry: RunEntry, comparison: Comparison, whole: Run, base: Path, common: Sequence[str], file: Path
) -> list[Variant]:
    """The variants of an entry. whole: the run of the config with the common overrides."""
    for override in (*common, *entry.overrides):
        setting = override.lstrip("~").partition("=")[0]
        if setting in _DECIDED:
            raise ConfigError(
                f"{override!r} for run {name!r} of {file}: the comparison decides {', '.join(_DECIDED)} of every run, "
                "so it would have no effect; use `seeds` or --output"
            )
    if unknown := [task for task in entry.tasks or () if task not in whole.tasks]:
        raise ConfigError(
            f"runs.{name}.tasks in {file} names {unknown[0]!r}{did_you_mean(unknown[0], whole.tasks)}; the config has "
            f"{', '.join(whole.tasks)}; correct it"
        )
    left_out = [f"~tasks.{task}" for task in whole.tasks if entry.tasks is not None and task not in entry.tasks]
    learnt = {task.field for task_name, task in whole.tasks.items() if f"~tasks.{task_name}" not in left_out}
    defaults = type(whole.data.augment)()
    left_out += [  # of labels that only the tasks left out learn
        f"data.augment.{setting}={json.dumps(getattr(defaults, setting))}"
        for setting in whole.data.augment.without_effect(learnt)
    ]
    try:
        run = config.load(base, [*common, *left_out, *entry.overrides])
    except ConfigError as error:
        raise ConfigError(f"run {name!r} of {file}: {error}") from None
    if entry.search and (unknown := [task for task in entry.search.weights if task not in run.tasks]):
        raise ConfigError(
            f"runs.{name}.search.weights in {file} names {unknown[0]!r}{did_you_mean(unknown[0], run.tasks)}; the run "
            f"has {', '.join(run.tasks)}; correct it"
        )
    trials = tuple(entry.search.draw()) if entry.search else ()

    thinned = comparison.label_fractions
    if thinned is None or thinned.task not in run.tasks:
        prepared = _with_held_out(run, whole, comparison.held_out, {}, entry.random_normals)
        return [Variant(name, name, prepared, tuple(run.data.val), None, trials)]
    field = run.tasks[thinned.task].field
    return [
        Variant(
            f"{name}@{fraction:g}", name,
            _with_held_out(
                run, whole, comparison.held_out, {field: fraction} if fraction < 1 else {}, entry.random_normals
            ),
            tuple(run.data.val), fraction, trials,
        )
        for fraction in thinned.fractions
    ]  # fmt: skip


def _with_held_out(run: Run, whole: Run, held_out: float, labels: Mapping[str, float], random_normals: bool) -> Run:
    """The run on its training images without the held-out ones, which become its validation data.

    whole: what all runs have in common. Data sets that this run adds to those are trained on as a whole, so that all
        runs are judged on the same images.
    labels: by field the fraction of the training images that keep them; the held-out ones keep all.
    """

    def unnamed(dataset: Dataset) -> Dataset:
        return dataset.model_copy(update={"name": None, "weight": 1.0})

    def part(dataset: Dataset, name: str, begin: float, end: float, **settings: Any) -> Subset:
        return Subset(name=name, of=unnamed(dataset), part=(begin, end), random_normals=random_normals, **settings)

    def added(dataset: Dataset, name: str) -> Dataset:
        if random_normals:
            return part(dataset, name, 0, 1, weight=dataset.weight)
        return dataset.model_copy(update={"name": name})

    named = list(zip(run.data.train, name_all(run.data.train), strict=True))
    common = [unnamed(one) for one in whole.data.train]
    divided = [name for one, name in named if unnamed(one) in common] or [name for _, name in named]
    data = run.data.model_copy(
        update={
            "train": [
                part(one, name, held_out, 1, weight=one.weight, labels=labels) if name in divided else added(one, name)
                for one, name in named
            ],
            "val": [part(one, name, 0, held_out) for one, name in named if name in divided],
        }
    )
    return run.model_copy(update={"data": data})


def settings_of(run: Run) -> dict[str, Any]:
    """What decides a run's numbers, as plain data: neither where it is written nor how its data are fed."""
    plain = run.model_dump(mode="json")
    del plain["output"]
    for setting in ("workers", "cache"):
        del plain["data"][setting]
    return plain


def key_of(run: Run) -> str:
    """The same as text: equal for runs that give the same numbers."""
    return json.dumps(settings_of(run), sort_keys=True)


def renewed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier version wrote with `settings_of`, as this one writes it: new settings have their defaults.

    A default that has changed since is kept as it was. Raises ConfigError where a setting is no longer known.
    """
    check_object(settings, "a run of this comparison")
    return settings_of(config.restore(dict(settings), "a run of this comparison"))


def renewed_key(key: str) -> str:
    """The same for what `key_of` wrote; a key that can no longer be read stays as it is, and fits no run."""
    try:
        return json.dumps(renewed(json.loads(key)), sort_keys=True)
    except (ValueError, RecursionError):  # of JSON or of settings
        return key
