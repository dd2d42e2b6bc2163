"""From the settings of distillation to teachers that are known to fit the student."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionmtl.config.suggest import did_you_mean
from visionmtl.data.label_spaces import resolve_spaces
from visionmtl.datasets import NamedDataset
from visionmtl.engine.checkpoint import Opened, find, load, open_model
from visionmtl.io.download import sha256
from visionmtl.network import MultiTaskNet
from visionmtl.run import Run
from visionmtl.structures import LabelSpace
from visionmtl.tasks.base import SoftLoss
from visionmtl.transfer.distillation import Distill, Lesson, Teacher, Teachers


def open_teachers(
    distill: Distill | None, net: MultiTaskNet, device: torch.device, features: tuple[Path, str] | None = None
) -> Teachers:
    """The teachers of a student, on the device, tried on one image.

    features: the checkpoint of a network whose shared maps are handed out, and the task that counts them
    Raises ValueError for what does not fit: tasks and classes by name, sizes, cells.
    """
    settings: dict[str, SoftLoss] = {}
    opened: list[Opened] = []
    lessons: list[list[Lesson]] = []
    if distill is not None:
        opened, lessons, settings = _taught(distill, net, device)
    if features is not None:
        opened.append(open_model(features[0], device))
        lessons.append([])
        if not getattr(net.trunk, "shared_maps", True):
            raise ValueError(
                "extend.type is lwp, which compares shared maps, and with this model.sharing there are none; choose "
                "another way to extend"
            )
    for of in opened:
        _check_size(of, net)
    name = None if features is None else features[1]
    flip = distill is not None and distill.flip
    teachers = Teachers([of.net for of in opened], lessons, net.tasks, settings, net.size, flip, name)
    teachers(torch.full((1, net.in_chans, *net.size), 128, dtype=torch.uint8, device=device), None)
    return teachers


def _taught(
    distill: Distill, net: MultiTaskNet, device: torch.device
) -> tuple[list[Opened], list[list[Lesson]], dict[str, SoftLoss]]:
    """The teachers, what each teaches, and how each task learns."""
    opened = [open_model(teacher.checkpoint, device) for teacher in distill.teachers]
    settings = distill.tasks
    if settings is None:
        pairs = (_pairs(teacher, of, list(net.tasks)) for teacher, of in zip(distill.teachers, opened, strict=True))
        taught = {name for of_teacher in pairs for name in of_teacher}
        settings = {name: SoftLoss() for name in net.tasks if name in taught}
    lessons = [
        _lessons(teacher, of, net, list(settings), device) for teacher, of in zip(distill.teachers, opened, strict=True)
    ]
    untaught = settings.keys() - {lesson.task for of_teacher in lessons for lesson in of_teacher}
    if untaught:
        raise ValueError(
            f"no teacher has a task {sorted(untaught)[0]!r}, which distill.tasks lists; they have "
            f"{'; '.join(', '.join(of.net.tasks) for of in opened)}; name the teacher's task in its `tasks`, or "
            "correct distill.tasks"
        )
    return opened, lessons, settings


def resolve_taught_spaces(
    run: Run,
    datasets: Sequence[NamedDataset],
    val_datasets: Sequence[NamedDataset] | None,
    known: Mapping[str, LabelSpace | None],
) -> dict[str, LabelSpace | None]:
    """As `label_spaces.resolve_spaces`; a task for which no data set has labels learns its first teacher's classes.

    known: the spaces of tasks that were learnt before
    """
    offered = {field for dataset in datasets for field in dataset.provides}
    learned = dict(known)
    for teacher in run.distill.teachers if run.distill else ():
        path = find(teacher.checkpoint)
        spaces = load(path)["spaces"]
        for name, source in (teacher.tasks or {name: name for name in run.tasks}).items():
            listed = run.distill is None or run.distill.tasks is None or name in run.distill.tasks
            if listed and source in spaces and run.tasks[name].field not in offered:
                learned.setdefault(name, spaces[source] and LabelSpace.from_plain(spaces[source]))
    labelled = {name: task for name, task in run.tasks.items() if name not in learned}
    spaces = resolve_spaces(labelled, datasets, val_datasets) | learned
    return {name: spaces[name] for name in run.tasks}


def record(distill: Distill) -> list[dict[str, str]]:
    """Path and SHA-256 of each teacher's file, for checkpoints and the log."""
    paths = [find(teacher.checkpoint) for teacher in distill.teachers]
    return [{"path": str(path), "sha256": sha256(path)} for path in paths]


def check_record(saved: Mapping[str, Any], fresh: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError where a run would go on with other teachers than it began with.

    saved, fresh: as `Trainer.state_dict` gives them, from the file and from the run that resumes
    """
    before, now = saved.get("teachers") or [], fresh.get("teachers") or []
    if [one["sha256"] for one in before] != [one["sha256"] for one in now]:
        raise ValueError(
            f"{path} was trained with the teachers {_listed(before)}, but this run has {_listed(now)}; a resumed run "
            "needs the same files; set distill.teachers to them, or begin a new run with its weights "
            f"(--init-from {path})"
        )


def _listed(teachers: list[dict[str, str]]) -> str:
    return ", ".join(f"{one['path']} (SHA-256 {one['sha256'][:12]})" for one in teachers) or "none"


def _pairs(teacher: Teacher, opened: Opened, tasks: list[str]) -> dict[str, str]:
    """By the student's task the teacher's."""
    own = opened.net.tasks
    if teacher.tasks is None:
        return {name: name for name in tasks if name in own}
    for source in teacher.tasks.values():
        if source not in own:
            raise ValueError(
                f"teacher {opened.path} has no task {source!r}{did_you_mean(source, own)}; it has {', '.join(own)}; "
                "correct distill.teachers"
            )
    return teacher.tasks


def _lessons(
    teacher: Teacher, opened: Opened, net: MultiTaskNet, tasks: list[str], device: torch.device
) -> list[Lesson]:
    lessons = []
    for name, source in _pairs(teacher, opened, tasks).items():
        if name not in tasks:
            raise ValueError(
                f"teacher {opened.path} teaches {name!r}, which distill.tasks does not list; it lists "
                f"{', '.join(tasks)}; add it there, or remove it from the teacher's `tasks`"
            )
        own, student = opened.net.tasks[source], net.tasks[name]
        where = f"teacher {opened.path}, task {source!r}"
        if own.type != student.type:
            raise ValueError(
                f"{where} is of type {own.type!r} and the student's {name!r} of {student.type!r}; a task is taught by "
                "one of its own type; correct the teacher's `tasks`"
            )
        try:
            student.check_teacher(own)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        order = _order(opened.net.spaces[source], net.spaces[name], where, device)
        lessons.append(Lesson(name, source, order))
    if not lessons:
        raise ValueError(
            f"teacher {opened.path} would teach nothing: it has {', '.join(opened.net.tasks)}, and the student learns "
            f"{', '.join(tasks)} from teachers; name which teaches which in its `tasks`, or remove it"
        )
    return lessons


def _order(teacher: LabelSpace | None, student: LabelSpace | None, where: str, device: torch.device) -> Tensor | None:
    """The teacher's class for each of the student's, by name; None where the lists are the same."""
    before, now = (list(space.classes) if space else [] for space in (teacher, student))
    if before == now:
        return None
    lacking, more = [one for one in now if one not in before], [one for one in before if one not in now]
    if lacking or more:
        raise ValueError(
            f"{where} does not know the student's classes: it lacks {', '.join(lacking) or 'none'}, and has besides "
            f"{', '.join(more) or 'none'}; both need the same classes by name, in any order; choose another teacher, "
            "or let the student learn its classes"
        )
    return torch.tensor([before.index(one) for one in now], device=device)


def _check_size(opened: Opened, net: MultiTaskNet) -> None:
    (height, width), own = net.size, opened.net.size
    if opened.net.in_chans != net.in_chans:
        raise ValueError(
            f"teacher {opened.path} takes images of {opened.net.in_chans} channels, and the student of "
            f"{net.in_chans}; both "
            "see the same images; choose another teacher, or another model.encoder.in_chans"
        )
    opened.net.check_size(net.size, f"{opened.path} is a teacher, and the student's data.size")
    if height * own[1] != width * own[0]:
        raise ValueError(
            f"teacher {opened.path} was trained on inputs of {own[0]}x{own[1]} px, and the student's are "
            f"{height}x{width}; how near things look follows from one zoom for both sides, so the ratio of sides must "
            "be the same; choose such a data.size, or another teacher"
        )
