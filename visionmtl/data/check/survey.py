"""Reading every image of every data set, in worker processes of which only small counts come back."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np

from visionmtl.data.bad_files import with_place
from visionmtl.data.check.fingerprint import Fingerprint, fingerprint
from visionmtl.data.check.rules import Finding, Problem, Role
from visionmtl.data.check.sample import find_problems
from visionmtl.data.check.tally import Tally
from visionmtl.data.loader import Data
from visionmtl.data.watched_loader import TIMEOUT_S, WatchedLoader
from visionmtl.data.workers import choose_workers, now_reading, now_resting
from visionmtl.datasets import NamedDataset, name_all, num_channels
from visionmtl.io.remote import StoreError
from visionmtl.structures import LabelSpace

_IMAGES_A_JOB = 8
_WORTH_STARTING = 500  # images; a worker takes seconds to import torch
_Job = tuple[int, list[int]]  # position of the data set, indices in it
_INDEX_BITS = 40
"""Of the number of a sample; those above are the position of its data set."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An image that was read."""

    index: int
    image_id: str
    file: str | None
    fingerprint: Fingerprint


@dataclass
class Checked:
    """What is known of one entry of data.train or data.val."""

    role: Role
    name: str
    type: str
    source: NamedDataset | None  # None where it could not be opened
    asked: int = 0  # images that were to be read; those that could be are in `seen`
    tally: Tally = field(default_factory=Tally)
    seen: list[Seen] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def provides(self) -> Mapping[str, LabelSpace | None]:
        """See `DatasetReader.provides`."""
        return self.source.provides if self.source else {}

    @property
    def images(self) -> int:
        """In the whole data set."""
        return len(self.source) if self.source else 0

    def finding(self, rule: str, field: str, text: str, seen: Seen | None = None) -> Finding:
        """About one of its images, or about the data set as a whole."""
        place = (seen.image_id, seen.file) if seen else (None, None)
        return Finding(Problem(rule, field, text), self.role, self.name, *place)

    def numbers(self) -> dict[str, Any]:
        """Its counts as plain data."""
        images = self.images if self.source else None
        about = {"role": self.role, "name": self.name, "type": self.type, "images": images, "asked": self.asked}
        return about | self.tally.numbers(self.provides)


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
            notes += [text for text in (str(warning.message) for warning in caught) if text not in told]
            problems += [Problem("told_by_reader", "data set", note) for note in dict.fromkeys(notes)]
            findings = [Finding(problem, role, name) for problem in problems]
            opened.append(Checked(role, name, spec.type, source, findings=findings))
    return opened


def plan(checked: Sequence[Checked], limit: int | None) -> int:
    """Set how many images of each data set are to be read: all, or at most `limit`; returns their sum."""
    for data_set in checked:
        data_set.asked = data_set.images if limit is None else min(data_set.images, limit)
    return sum(data_set.asked for data_set in checked)


def choose_processes(data: Data, images: int) -> int:
    """As many as data.workers says; if that is auto one for each core, none where reading takes less than starting."""
    if data.workers != "auto":
        return data.workers
    return 0 if images < _WORTH_STARTING else choose_workers("auto")[0] + 1  # no training needs a core of its own


def read_all(
    checked: Sequence[Checked], workers: int, count: Callable[[int], None], timeout_s: float = TIMEOUT_S
) -> None:
    """Read the images that were planned, spread evenly over each data set, and add what is found to `checked`.

    workers: processes; 0 reads in this one. count: called with the number of images that were read since.
    timeout_s: how long the processes may stand still over a file
    """
    jobs: list[_Job] = []
    for number, data_set in enumerate(checked):
        indices = np.linspace(0, data_set.images - 1, data_set.asked).round().astype(int).tolist()
        jobs += [(number, indices[first : first + _IMAGES_A_JOB]) for first in range(0, len(indices), _IMAGES_A_JOB)]
    for number, part in _parts(checked, jobs, workers, timeout_s):
        data_set = checked[number]
        data_set.tally.merge(part.tally)
        data_set.seen += part.seen
        data_set.findings += part.findings
        count(part.asked)


def _parts(
    checked: Sequence[Checked], jobs: list[_Job], workers: int, timeout_s: float
) -> Iterator[tuple[int, Checked]]:
    def place(number: int) -> str:
        source = checked[number >> _INDEX_BITS].source
        assert source is not None
        return source.place(number & (1 << _INDEX_BITS) - 1)

    work: Any = _Work(checked)
    yield from WatchedLoader(
        work,
        num_workers=workers,
        place=place,
        timeout_s=timeout_s,
        batch_size=None,  # a job is an item
        sampler=jobs,
        prefetch_factor=4 if workers else None,
    )


class _Work:
    """Runs in the workers: a job in, what was found out."""

    def __init__(self, checked: Sequence[Checked]) -> None:
        self._data_sets = [replace(data_set, findings=[]) for data_set in checked]

    def __getitem__(self, job: _Job) -> tuple[int, Checked]:
        number, indices = job
        whole = self._data_sets[number]
        assert whole.source is not None
        # the reader itself stays here: only counts go back
        part = Checked(whole.role, whole.name, whole.type, None, asked=len(indices))
        for index in indices:
            now_reading(number << _INDEX_BITS | index)
            _check(whole.source, index, part)
        now_resting()
        return number, part


def _check(source: NamedDataset, index: int, part: Checked) -> None:
    """Read one image and add it, and what is wrong with it, to `part`."""
    file, sample = source.file(index), None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for of_code in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):  # they tell of no file
            warnings.simplefilter("ignore", of_code)
        try:
            sample = source.read(index)
            problems = find_problems(sample, source.provides, num_channels(source.reader))
        except StoreError:  # the next images would wait for the same server
            raise
        except (ValueError, OSError, cv2.error) as error:
            problems = [Problem("unreadable", "file", with_place(str(error), file or f"{source.name}, image {index}"))]
    complaints = dict.fromkeys(str(warning.message) for warning in caught)
    problems += [Problem("decoder_warning", "file", text) for text in complaints]
    image_id = sample.image_id if sample else f"number {index}"
    part.findings += [Finding(problem, part.role, part.name, image_id, file) for problem in problems]
    if sample and _countable(problems):
        part.tally.add(sample)
        part.seen.append(Seen(index, sample.image_id, file, fingerprint(sample.image)))


def _countable(problems: Sequence[Problem]) -> bool:
    """Whether arrays have the types and axes that counting needs."""
    return not {"image_form", "form", "field_unexpected"} & {problem.rule for problem in problems}
