"""Which classes each data set teaches or judges, where tasks learn the union of several data sets' classes."""

from collections.abc import Iterator, Mapping, Sequence

from visionmtl.data.check.rules import Finding, Problem
from visionmtl.data.check.survey import Checked
from visionmtl.data.label_spaces import resolve_spaces, taught_classes
from visionmtl.datasets import shortened
from visionmtl.tasks.base import Task

_MOST = 40  # names


def taught(checked: Sequence[Checked], tasks: Mapping[str, Task]) -> list[Finding]:
    """A note for each data set and task with `classes`; an error where class names or settings do not fit.

    Nothing is said where a training data set could not be opened: the union is not known then.
    """
    train = [one for one in checked if one.role == "train"]
    if not tasks or any(one.source is None for one in train):
        return []
    try:
        return list(_taught(checked, tasks))
    except ValueError as error:
        return [Finding(Problem("classes", "tasks", str(error)), "train", ", ".join(one.name for one in train))]


def _taught(checked: Sequence[Checked], tasks: Mapping[str, Task]) -> Iterator[Finding]:
    train, val = ([one for one in checked if one.role == role and one.source] for role in ("train", "val"))
    sources = [[one.source for one in part if one.source] for part in (train, val)]
    spaces = resolve_spaces(tasks, *sources)
    for part, opened in zip((train, val), sources, strict=True):
        for task, of_source in taught_classes(tasks, spaces, opened).items():
            space = spaces[task]
            assert space is not None
            for one in part:
                if one.name in of_source:
                    classes = of_source[one.name]
                    rest = [name for name in space.classes if name not in classes]
                    text = f"{one.role} {one.name} {'teaches' if one.role == 'train' else 'judges'} task {task!r} "
                    text += f"{len(classes)} of {len(space.classes)} class{'' if len(space.classes) == 1 else 'es'}: "
                    text += shortened(classes, _MOST) or "none"
                    text += f"; it does not annotate {shortened(rest, _MOST)}" if rest else ""
                    yield one.finding("classes_taught", tasks[task].field, text)
