"""Reading every image of every data set, in worker processes of which only small counts come back."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from visionmtl.data.loader import Data
from visionmtl.data.workers import begin, choose_workers, start_method
from visionmtl.data_check.base import DataSet, Finding, Problem, Role
from visionmtl.data_check.fingerprint import Fingerprint, fingerprint
from visionmtl.data_check.sample import find_problems
from visionmtl.data_check.tally import Tally
from visionmtl.datasets import NamedDataset, name_all

_IMAGES_A_JOB = 8
_WORTH_STARTING = 500  # images; a worker takes seconds to import torch
_Job = tuple[int, list[int]]  # position of the data set, indices in it


@dataclass(frozen=True, slots=True)
class Seen:
    """An image that was read."""

    index: int
    image_id: str
    file: str | None
    fingerprint: Fingerprint


@dataclass
class Checked:
    """What is known of one data set; `asked` images were to be read, those that could be are in `seen`."""

    data_set: DataSet
    asked: int = 0
    tally: Tally = field(default_factory=Tally)
    seen: list[Seen] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def was_whole(self) -> bool:
        """Whether every image was to be read."""
        return self.data_set.source is not None and self.asked == len(self.data_set.source)


def open_data_sets(data: Data) -> list[Checked]:
    """Every entry of data.train, then of data.val, nothing read yet. Raises ValueError for a name given twice.

    What cannot be opened is a finding; so is what readers tell of themselves.
    """
    opened = []
    roles: tuple[tuple[Role, Sequence], ...] = (("train", data.train), ("val", data.val))
    for role, specs in roles:
        for name, spec in zip(name_all(specs), specs, strict=True):
            source, problems = None, []
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    source = NamedDataset(name, spec.build(), spec.weight)
                except (ValueError, OSError) as error:
                    problems.append(Problem("not_opened", "data set", str(error)))
            notes = list(source.notes) if source else []
            told = "\n".join(notes)  # readers may warn of what their notes say
            notes += [text for text in (str(one.message) for one in caught) if text not in told]
            problems += [Problem("told_by_reader", "data set", note) for note in dict.fromkeys(notes)]
            found = [Finding(problem, role, name) for problem in problems]
            opened.append(Checked(DataSet(role, name, spec.type, source), findings=found))
    return opened


def plan(checked: Sequence[Checked], limit: int | None) -> int:
    """Set how many images of each data set are to be read: all, or at most `limit`; returns their sum."""
    for one in checked:
        total = len(one.data_set.source) if one.data_set.source else 0
        one.asked = total if limit is None else min(total, limit)
    return sum(one.asked for one in checked)


def choose_processes(data: Data, images: int) -> int:
    """As many as data.workers says; if that is auto one for each core, none where reading takes less than starting."""
    if data.workers != "auto":
        return data.workers
    return 0 if images < _WORTH_STARTING else choose_workers("auto")[0] + 1  # no training needs a core of its own


def read_all(checked: Sequence[Checked], workers: int, advance: Callable[[int], None]) -> None:
    """Read the images that were planned, spread evenly over each data set, and add what is found to `checked`.

    workers: processes; 0 reads in this one. advance: called with the number of images that were read since.
    """
    jobs: list[_Job] = []
    for number, one in enumerate(checked):
        last = len(one.data_set.source) - 1 if one.data_set.source else 0
        indices = np.linspace(0, last, one.asked).round().astype(int).tolist()
        jobs += [(number, indices[first : first + _IMAGES_A_JOB]) for first in range(0, len(indices), _IMAGES_A_JOB)]
    for number, part in _parts([one.data_set for one in checked], jobs, workers):
        one = checked[number]
        one.tally.merge(part.tally)
        one.seen += part.seen
        one.findings += part.findings
        advance(part.asked)


def _parts(data_sets: Sequence[DataSet], jobs: list[_Job], workers: int) -> Iterator[tuple[int, Checked]]:
    work: Any = _Work(data_sets)
    yield from DataLoader(
        work,
        batch_size=None,  # one job is one item
        sampler=jobs,
        num_workers=workers,
        worker_init_fn=begin,
        prefetch_factor=4 if workers else None,
        multiprocessing_context=start_method() if workers else None,
        generator=torch.Generator(),
    )


class _Work:
    """Runs in the workers: a job in, what was found out."""

    def __init__(self, data_sets: Sequence[DataSet]) -> None:
        self._data_sets = list(data_sets)

    def __getitem__(self, job: _Job) -> tuple[int, Checked]:
        number, indices = job
        data_set = self._data_sets[number]
        # the reader itself stays here: only counts go back
        part = Checked(DataSet(data_set.role, data_set.name, data_set.type, None), asked=len(indices))
        for index in indices:
            self._check(data_set, index, part)
        return number, part

    def _check(self, data_set: DataSet, index: int, part: Checked) -> None:
        source = data_set.source
        assert source is not None
        file, sample = source.file(index), None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for of_code in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):  # they tell of no file
                warnings.simplefilter("ignore", of_code)
            try:
                sample = source.read(index)
                problems = find_problems(sample, source.provides)
            except (ValueError, OSError, cv2.error) as error:
                problems = [Problem("unreadable", "file", _named(str(error), file or f"{source.name}, image {index}"))]
        problems += [
            Problem("decoder_warning", "file", text) for text in dict.fromkeys(str(one.message) for one in caught)
        ]
        image_id = sample.image_id if sample else f"number {index}"
        part.findings += [Finding(one, data_set.role, data_set.name, image_id, file) for one in problems]
        if sample and _countable(problems):
            part.tally.add(sample)
            part.seen.append(Seen(index, sample.image_id, file, fingerprint(sample.image)))


def _named(text: str, place: str) -> str:
    """The text of an error, with its place where it names no file."""
    return text if "/" in text or "\\" in text else f"{place}: {text}"


def _countable(problems: Sequence[Problem]) -> bool:
    """Whether arrays have the types and axes that counting needs."""
    return not {"image_form", "form", "field_unexpected"} & {one.rule for one in problems}
