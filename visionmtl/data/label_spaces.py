"""Label spaces meet tasks: which one each task learns, and which data sets teach it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from visionmtl.config.registry import did_you_mean
from visionmtl.datasets import NamedDataset, Relabelled
from visionmtl.structures import LabelSpace
from visionmtl.tasks.base import Task

Spaces = Mapping[str, LabelSpace | None]
"""By task: the label space it learns, or None for tasks without classes."""


def resolve_spaces(tasks: Mapping[str, Task], sources: Sequence[NamedDataset]) -> dict[str, LabelSpace | None]:
    """The label space each task learns: the one it names in `space`, else the only one the data sets offer."""
    spaces: dict[str, LabelSpace | None] = {}
    known = [source.name for source in sources]
    for name, task in tasks.items():
        if strange := [one for one in task.learns_from or () if one not in known]:
            raise ValueError(
                f"tasks.{name}.learns_from names {strange[0]!r}{did_you_mean(strange[0], known)}; the training data "
                f"sets are {', '.join(known)}; correct it, or give a data set that name with `name:`"
            )
        offers = _offers(task, sources)
        if not offers:
            fields = sorted({field for source in sources if _may_teach(source, task) for field in source.provides})
            raise ValueError(
                f"task {name!r} learns from {task.field!r}, which no training data set provides"
                f"{' among ' + ', '.join(task.learns_from) if task.learns_from else ''}; they provide "
                f"{', '.join(fields)}; add a data set that has it, or remove the task"
            )
        spaces[name] = _choose_space(name, task, offers)
    return spaces


def _choose_space(name: str, task: Task, offers: Sequence[LabelSpace | None]) -> LabelSpace | None:
    named = {offer.name: offer for offer in offers if offer is not None}
    if any(offer is not None and offer.classes != named[offer.name].classes for offer in offers):
        raise ValueError(
            f"task {name!r} is offered two different class lists under one name among {', '.join(named)}; "
            "a name stands for one list; give the label spaces of the data sets different names"
        )
    wanted = getattr(task, "space", None)
    if wanted is None and len(named) > 1:
        raise ValueError(
            f"task {name!r} can learn {', '.join(named)}; one task learns one label space; "
            f"choose it with tasks.{name}.space=NAME, and add a second task to learn the other"
        )
    if wanted is not None and wanted not in named:
        raise ValueError(
            f"task {name!r} wants label space {wanted!r}{did_you_mean(wanted, named)}; the data sets offer "
            f"{', '.join(named) or 'none for ' + task.field}; correct tasks.{name}.space or add the data set"
        )
    return named[wanted] if wanted is not None else next(iter(named.values()), None)


def align(sources: Sequence[NamedDataset], tasks: Mapping[str, Task], spaces: Spaces) -> list[NamedDataset]:
    """Data sets to judge by, with labels in the spaces that the tasks learn where theirs differ in the list alone.

    A split's annotation file often lists only the classes that occur in it: a list under the same name whose classes
    the task's space has is read by name. Raises ValueError naming the classes that it does not have.
    """
    aligned = []
    for source in sources:
        learned: dict[str, LabelSpace] = {}
        for name, task in tasks.items():
            offer, space = source.provides.get(task.field), spaces[name]
            if offer is None or space is None or not _may_teach(source, task):
                continue
            if offer.name != space.name or offer.classes == space.classes:
                continue
            if strange := [one for one in offer.classes if one not in space.classes]:
                missing = [one for one in space.classes if one not in offer.classes]
                raise ValueError(
                    f"data set {source.name} labels {task.field!r} with classes {', '.join(strange)}, which task "
                    f"{name!r} does not learn as {space.name}"
                    f"{', and lacks ' + ', '.join(missing) if missing else ''}; classes are matched by name, and a "
                    "split may lack some but add none; correct the names, or train on data that have them"
                )
            learned[task.field] = space
        aligned.append(replace(source, reader=Relabelled(source.reader, learned)) if learned else source)
    return aligned


def supervises(source: NamedDataset, task: Task, space: LabelSpace | None) -> bool:
    """Whether labels of this data set are of the kind the task learns, and it may learn from them."""
    if task.field not in source.provides or not _may_teach(source, task):
        return False
    offer = source.provides[task.field]
    return (offer and (offer.name, offer.classes)) == (space and (space.name, space.classes))


def eval_names(tasks: Mapping[str, Task], spaces: Spaces, sources: Sequence[NamedDataset]) -> dict[str, str]:
    """Names of results, and the task of each: "depth" where one data set judges the task, else "depth@nyuv2" for each.

    Figures of different data sets are never mixed: they have their own protocols and tables. A task for which no data
    set has labels keeps its name, and a result of no images.
    Raises ValueError for a task whose labels they give in other spaces only, or that learns from names they lack.
    """
    names: dict[str, str] = {}
    for name, task in tasks.items():
        asked = [source for source in sources if _may_teach(source, task)]
        if not asked:
            raise ValueError(
                f"task {name!r} learns from {', '.join(task.learns_from or ())}, but the validation data sets are "
                f"{', '.join(source.name for source in sources)}; one of one name is needed to judge it; set `name`"
            )
        judges = [source.name for source in asked if supervises(source, task, spaces[name])]
        others = [f"{one.name} ({_name(one.provides[task.field])})" for one in asked if task.field in one.provides]
        if others and not judges:
            raise ValueError(
                f"task {name!r} learns {_name(spaces[name])}, but the validation data sets label {task.field!r} with "
                f"{', '.join(others)}; the two must agree; set both to one label space"
            )
        names |= {f"{name}@{judge}": name for judge in judges} if len(judges) > 1 else {name: name}
    return names


def task_of(name: str) -> str:
    """The task behind a name of results (see `eval_names`)."""
    return name.partition("@")[0]


def _offers(task: Task, sources: Sequence[NamedDataset]) -> list[LabelSpace | None]:
    fitting = [source for source in sources if task.field in source.provides and _may_teach(source, task)]
    return [source.provides[task.field] for source in fitting]


def _may_teach(source: NamedDataset, task: Task) -> bool:
    return task.learns_from is None or source.name in task.learns_from


def _name(space: LabelSpace | None) -> str:
    return space.name if space else "no classes"
