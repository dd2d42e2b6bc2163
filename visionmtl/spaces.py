"""Label spaces meet tasks: which one each task learns, and which data sets teach it."""

from collections.abc import Mapping, Sequence

from visionmtl.datasets import Reader
from visionmtl.spec import did_you_mean
from visionmtl.tasks.base import Task
from visionmtl.types import LabelSpace

Spaces = Mapping[str, LabelSpace | None]
"""By task: the label space it learns, or None for tasks without classes."""


def resolve_spaces(tasks: Mapping[str, Task], readers: Sequence[Reader]) -> dict[str, LabelSpace | None]:
    """The label space each task learns: the one it names in `space`, else the only one the data sets offer."""
    spaces: dict[str, LabelSpace | None] = {}
    for name, task in tasks.items():
        offers = _offers(task, readers)
        if not offers:
            fields = sorted({field for reader in readers for field in reader.provides})
            raise ValueError(
                f"task {name!r} learns from {task.field!r}, which no training data set provides; they provide "
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


def supervises(reader: Reader, task: Task, space: LabelSpace | None) -> bool:
    """Whether labels of this data set are of the kind the task learns."""
    if task.field not in reader.provides:
        return False
    offer = reader.provides[task.field]
    return (offer and (offer.name, offer.classes)) == (space and (space.name, space.classes))


def check_validation(tasks: Mapping[str, Task], spaces: Spaces, readers: Sequence[Reader]) -> None:
    """Raises ValueError for a task whose labels the validation data sets give in other spaces only."""
    for name, task in tasks.items():
        offers = _offers(task, readers)
        if offers and not any(supervises(reader, task, spaces[name]) for reader in readers):
            raise ValueError(
                f"task {name!r} learns {_name(spaces[name])}, but the validation data sets label {task.field!r} with "
                f"{', '.join(_name(offer) for offer in offers)}; the two must agree; set both to one label space"
            )


def _offers(task: Task, readers: Sequence[Reader]) -> list[LabelSpace | None]:
    return [reader.provides[task.field] for reader in readers if task.field in reader.provides]


def _name(space: LabelSpace | None) -> str:
    return space.name if space else "no classes"
