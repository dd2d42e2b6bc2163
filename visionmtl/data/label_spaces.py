"""Label spaces meet tasks: which one each task learns, and which data sets teach it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from visionmtl.config.registry import did_you_mean
from visionmtl.datasets import NamedDataset, Relabelled, shortened
from visionmtl.structures import IGNORE, LabelSpace
from visionmtl.tasks.base import ClassTask, Task
from visionmtl.visualization.palette import palette

UNION = "union"
"""The name of label spaces that join several by the names of classes."""
_BACKGROUND = "background"

Spaces = Mapping[str, LabelSpace | None]
"""By task: the label space it learns, or None for tasks without classes."""


def resolve_spaces(
    tasks: Mapping[str, Task], sources: Sequence[NamedDataset], val_sources: Sequence[NamedDataset] | None = None
) -> dict[str, LabelSpace | None]:
    """The label space each task learns: the one it names in `space`, else the only one the data sets offer.

    With `classes` it is one of several data sets: the union of their classes by name, or those of a list.
    sources: the training data; val_sources: the validation data, which `rename` of a task may name as well. None: that
    was checked before.
    """
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
        if isinstance(task, ClassTask) and task.classes is not None:
            teachers = [source for source in sources if task.field in source.provides and _may_teach(source, task)]
            spaces[name] = _unite(name, task, teachers)
            if val_sources is not None:
                _check_rename(name, task, [*sources, *val_sources])
        else:
            spaces[name] = _choose_space(name, task, offers)
    return spaces


def _unite(name: str, task: ClassTask, sources: Sequence[NamedDataset]) -> LabelSpace:
    """The classes of all data sets by the names that the task gives them, or the task's own list of these."""
    lists = {source.name: _classes_by_name(task, source) for source in sources}
    everything = list(dict.fromkeys(new for names in lists.values() for new in names.values()))
    classes = everything if task.classes == UNION else list(task.classes or ())
    if unknown := [one for one in classes if one not in everything]:
        raise ValueError(
            f"tasks.{name}.classes names {unknown[0]!r}{did_you_mean(unknown[0], everything)}; the training data sets "
            f"{', '.join(lists)} annotate {shortened(everything, 40)}; correct it, or rename a class to it"
        )
    if all(list(_own(task, source).classes) == classes for source in sources):
        raise ValueError(
            f"tasks.{name}.classes would have no effect: {', '.join(lists)} annotate these very classes; it is for "
            "data sets whose classes differ, or for a part of them; remove it"
        )
    lacking = [source for source, names in lists.items() if _BACKGROUND not in names.values()]
    if _BACKGROUND in classes and lacking and _BACKGROUND not in _renamed(task, list(lists)):
        raise ValueError(
            f"tasks.{name}.classes has {_BACKGROUND!r}, which {', '.join(lacking)} do not annotate: pixels that one "
            "data set calls so may show what only another one annotates, and would teach against it; such pixels can "
            f"be left out, or learnt all the same; set tasks.{name}.rename.{_BACKGROUND} to null, or to {_BACKGROUND}"
        )
    return LabelSpace(UNION, tuple(classes), palette(len(classes)))


def _own(task: Task, source: NamedDataset) -> LabelSpace:
    space = source.provides[task.field]
    if space is None:
        raise ValueError(
            f"data set {source.name} labels {task.field!r} without naming classes; `classes` joins them by name; "
            "let its `provides` give a label space"
        )
    return space


def _classes_by_name(task: ClassTask, source: NamedDataset) -> dict[str, str]:
    """What the task calls each class of a data set; classes that it leaves out are not there."""
    names = {one: task.name_of(source.name, one) for one in _own(task, source).classes}
    return {one: new for one, new in names.items() if new is not None}


def _renamed(task: ClassTask, sources: Sequence[str]) -> set[str]:
    """The classes, as data sets call them, that `rename` speaks of."""
    inner = [one for source in sources if isinstance(names := task.rename.get(source), dict) for one in names]
    return {*(one for one, new in task.rename.items() if not isinstance(new, dict)), *inner}


def _check_rename(name: str, task: ClassTask, sources: Sequence[NamedDataset]) -> None:
    """Raise ValueError for a class or data set in `rename` that there is not."""
    lists: dict[str, set[str]] = {}
    for source in sources:
        if task.field in source.provides and _may_teach(source, task):
            lists.setdefault(source.name, set()).update(_own(task, source).classes)
    for key, new in task.rename.items():
        if isinstance(new, dict) and key not in lists:
            raise ValueError(
                f"tasks.{name}.rename names a data set {key!r}{did_you_mean(key, lists)}; those with {task.field!r} "
                f"for this task are {', '.join(lists)}; correct it"
            )
        known = lists[key] if isinstance(new, dict) else set().union(*lists.values())
        whose = key if isinstance(new, dict) else "any data set"
        for one in new if isinstance(new, dict) else [key]:
            if one not in known:
                raise ValueError(
                    f"tasks.{name}.rename names {one!r}{did_you_mean(one, known)}, which is no class of {whose}; "
                    f"the classes are {shortened(sorted(known), 40)}; correct or remove it"
                )
    called: dict[str, set[str]] = {}  # what data sets call each class of the task
    for dataset, classes in lists.items():
        for one in classes:
            called.setdefault(task.name_of(dataset, one) or "", set()).add(one)
    targets = [(key, new) for key, new in task.rename.items() if isinstance(new, str)]
    nested = [new for new in task.rename.values() if isinstance(new, dict)]
    targets += [(one, new) for names in nested for one, new in names.items() if new is not None]
    for one, new in targets:
        if task.classes != UNION and new not in (task.classes or ()):
            raise ValueError(
                f"tasks.{name}.rename calls {one!r} {new!r}{did_you_mean(new, task.classes or ())}, which "
                f"tasks.{name}.classes does not list; correct one of them, or remove it"
            )
        if one != new and len(called.get(new, ())) < 2:
            raise ValueError(
                f"tasks.{name}.rename calls {one!r} {new!r}{did_you_mean(new, [*called.keys() - {new}])}, as no other "
                "class is called, so that nothing is joined; correct or remove it"
            )


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
    """Data sets with labels in the spaces that the tasks learn, where classes are matched by name.

    That is so for tasks with `classes`. For others a split's annotation file often lists only the classes that occur in
    it: a list under the same name whose classes the task's space has is read by name.
    Raises ValueError naming the classes that a space does not have.
    """
    aligned = []
    for source in sources:
        learned: dict[str, LabelSpace] = {}
        united: dict[str, dict[str, str]] = {}
        plain: set[str] = set()  # fields that a task reads in the label space of the data set
        for name, task in tasks.items():
            offer, space = source.provides.get(task.field), spaces[name]
            if offer is None or space is None or not _may_teach(source, task):
                continue
            if isinstance(task, ClassTask) and task.classes is not None and offer != space:
                names = _united_names(name, task, source, space)
                before = learned.get(task.field, space), united.get(task.field, names)
                if names and (task.field in plain or before != (space, names)):
                    raise _two_readings(source, name, task)
                if names:
                    learned[task.field], united[task.field] = space, names
                continue
            if offer.name != space.name:
                continue
            if task.field in united:
                raise _two_readings(source, name, task)
            plain.add(task.field)
            if offer.classes == space.classes:
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
        aligned.append(replace(source, reader=Relabelled(source.reader, learned, united)) if learned else source)
    return aligned


def _united_names(name: str, task: ClassTask, source: NamedDataset, space: LabelSpace) -> dict[str, str]:
    """What a space that unites several calls the classes of a data set; empty: it has none of them."""
    names = _classes_by_name(task, source)
    strange = [one for one, new in names.items() if new not in space.classes]
    if strange and task.classes == UNION:
        raise ValueError(
            f"data set {source.name} labels {task.field!r} with {shortened(strange)}, which no training data set of "
            f"task {name!r} annotates; it learnt {shortened(space.classes, 40)}; map them with tasks.{name}.rename, "
            "where null leaves a class out"
        )
    return {one: new for one, new in names.items() if new in space.classes}


def _two_readings(source: NamedDataset, name: str, task: Task) -> ValueError:
    return ValueError(
        f"task {name!r} reads {task.field!r} of data set {source.name} in another label space than the tasks before "
        "it; one field of a data set is read in one space; give the tasks the same `classes` and `rename`, or limit "
        "them with learns_from"
    )


def taught_classes(
    tasks: Mapping[str, Task], spaces: Spaces, sources: Sequence[NamedDataset]
) -> dict[str, dict[str, list[str]]]:
    """By task with `classes` and by data set, the classes of the task that its labels tell of. sources: not aligned."""
    return {
        name: {
            source.name: sorted(set(_united_names(name, task, source, space).values()), key=space.classes.index)
            for source in sources
            if task.field in source.provides and _may_teach(source, task)
        }
        for name, task in tasks.items()
        if isinstance(task, ClassTask) and task.classes is not None and (space := spaces[name]) is not None
    }


def numbered(
    spaces: Spaces, tasks: Mapping[str, Task], sources: Sequence[NamedDataset]
) -> tuple[dict[str, LabelSpace | None], list[str]]:
    """The spaces with the ids by which these data sets know the classes: what files of results must bear.

    A split's annotation file may number classes otherwise than that of the training data, and a union has no ids. A
    class that no data set has keeps its id, or gets the next above all where that is taken. sources: not aligned.
    Returns the spaces, and a note for each that keeps its own ids since the data sets contradict each other.
    """
    result, notes = dict(spaces), []
    for name, task in tasks.items():
        space = spaces[name]
        lists = {source.name: _ids_by_class(task, source, space) for source in sources} if space else {}
        known = {one: number for ids in lists.values() for one, number in ids.items()}
        if space is None or not known:
            continue
        one_id_each = all(known[one] == number for ids in lists.values() for one, number in ids.items())
        if not one_id_each or len(set(known.values())) < len(known):
            notes.append(
                f"{name}: {', '.join(lists)} number their classes differently, so files have the ids of {space.name}, "
                "as submission.json lists them; for official ids evaluate one data set at a time (--data NAME)"
            )
            continue
        taken, ids = set(known.values()), []
        top = max(taken.union(space.official_ids))
        for one, own in zip(space.classes, space.official_ids, strict=True):
            if one not in known and own in taken:
                top += 2 if top + 1 == IGNORE else 1
                own = top
            ids.append(known.get(one, own))
        if tuple(ids) != space.official_ids:
            result[name] = replace(space, ids=tuple(ids))
    return result, notes


def _ids_by_class(task: Task, source: NamedDataset, space: LabelSpace) -> dict[str, int]:
    """The ids of a data set by what the task calls its classes; of several classes under one name that of the first."""
    offer = source.provides.get(task.field)
    if offer is None or not _may_teach(source, task):
        return {}
    if isinstance(task, ClassTask) and task.classes is not None and offer.name != space.name:
        names = _classes_by_name(task, source)
    else:
        names = {one: one for one in offer.classes if offer.name == space.name}
    ids: dict[str, int] = {}
    for one, number in zip(offer.classes, offer.official_ids, strict=True):
        if names.get(one) in space.classes:
            ids.setdefault(names[one], number)
    return ids


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
        evaluating = [source.name for source in asked if supervises(source, task, spaces[name])]
        others = [f"{one.name} ({_name(one.provides[task.field])})" for one in asked if task.field in one.provides]
        if others and not evaluating:
            raise ValueError(
                f"task {name!r} learns {_name(spaces[name])}, but the validation data sets label {task.field!r} with "
                f"{', '.join(others)}; the two must agree; set both to one label space"
            )
        names |= {f"{name}@{one}": name for one in evaluating} if len(evaluating) > 1 else {name: name}
    return names


def task_of(name: str) -> str:
    """The task behind a name of results (see `eval_names`)."""
    return name.partition("@")[0]


def tasks_of(name: str) -> tuple[str, ...]:
    """The tasks behind a name of results: one, or those of "task+task", whose predictions are measured together."""
    return tuple(task_of(name).split("+"))


def _offers(task: Task, sources: Sequence[NamedDataset]) -> list[LabelSpace | None]:
    fitting = [source for source in sources if task.field in source.provides and _may_teach(source, task)]
    return [source.provides[task.field] for source in fitting]


def _may_teach(source: NamedDataset, task: Task) -> bool:
    return task.learns_from is None or source.name in task.learns_from


def _name(space: LabelSpace | None) -> str:
    return space.name if space else "no classes"
