"""Files that cannot be read: attempts, what stands in their place in a batch, and the record with its limit."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from visionmtl.data import bad_files
from visionmtl.data.bad_files import BadFiles, UnreadableSample, read_persistently
from visionmtl.data.collate import Collate
from visionmtl.data.dataset import EvalDataset, MultiTaskDataset
from visionmtl.data.sampler import SampleKey
from visionmtl.data.transforms.augment import Augment
from visionmtl.datasets import NamedDataset
from visionmtl.engine.bad_files import FILE, BadFileRecord
from visionmtl.structures import BadFile, Batch, Sample
from visionmtl.tasks.depth import Depth

SIZE = (8, 8)
TASKS = {"depth": Depth()}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(bad_files.time, "sleep", found.append)
    return found


def failing(errors: list[Exception]) -> Any:
    def read() -> str:
        if errors:
            raise errors.pop(0)
        return "read"

    return read


def caused(by: Exception) -> ValueError:
    error = ValueError("/data/1.png cannot be read")
    error.__cause__ = by
    return error


IO = OSError(5, "Input/output error", "/data/1.png")


def test_a_disk_that_comes_back_is_waited_for(pauses: list[float]):
    assert read_persistently(failing([IO, caused(IO), IO]), 3, lambda: "image 1") == "read"
    assert pauses == [0.25, 1, 4]


@pytest.mark.parametrize(
    ("error", "retries", "attempts"),
    [(IO, 3, 4), (IO, 0, 1), (caused(IO), 2, 3), (ValueError("damaged"), 3, 2), (ValueError("damaged"), 0, 1)],
)
def test_a_damaged_file_is_tried_once_more_and_a_failing_disk_as_often_as_set(
    error: Exception, retries: int, attempts: int, pauses: list[float]
):
    errors = [error] * 9
    with pytest.raises(UnreadableSample, match=r"/data/1\.png|image 1 of drawn: damaged"):
        read_persistently(failing(errors), retries, lambda: "image 1 of drawn")
    assert 9 - len(errors) == attempts == len(pauses) + 1


def test_a_fault_of_ours_is_not_taken_for_a_bad_file():
    with pytest.raises(KeyError):
        read_persistently(failing([KeyError("x")]), 3, lambda: "image 1")


def test_out_of_a_worker_comes_the_text_alone():
    passed_on = (
        "Caught UnreadableSample in DataLoader worker process 0.\nOriginal Traceback\n  a.b.UnreadableSample: x/y\n"
    )
    assert str(UnreadableSample(passed_on)) == "x/y"


@dataclass(frozen=True)
class Drawn:
    """Images of one value, their index; those in `bad` cannot be read."""

    bad: tuple[int, ...] = ()
    provides: ClassVar = {"depth_m": None}

    def __len__(self) -> int:
        return 12

    def file(self, index: int) -> str:
        return f"/data/{index}.png"

    def read(self, index: int) -> Sample:
        if index in self.bad:
            raise ValueError(f"/data/{index}.png is damaged")
        image, depth = np.full((*SIZE, 3), index, np.uint8), np.full(SIZE, 1 + index, np.float32)
        return Sample(image=image, image_id=str(index), depth_m=depth)


def batch(*bad: int, indices: tuple[int, ...] = (2, 3, 4, 5), leave_out: bool = True) -> Batch:
    dataset = MultiTaskDataset(
        TASKS, {"depth": None}, [NamedDataset("drawn", Drawn(bad))], size=SIZE, augment=Augment(), seed=0,
        leave_out=leave_out,
    )  # fmt: skip
    return Collate(TASKS, SIZE, training=True)(dataset.__getitems__([SampleKey(0, index, 0) for index in indices]))


@pytest.mark.parametrize(
    ("bad", "shown"), [((), [2, 3, 4, 5]), ((3,), [2, 4, 4, 5]), ((5, 2), [3, 3, 4, 3]), ((2, 3, 4, 5, 6), [7] * 4)]
)
def test_an_unlabelled_copy_takes_the_place_of_what_cannot_be_read(bad: tuple[int, ...], shown: list[int]):
    found = batch(*bad)
    assert found.image[:, 0, 0, 0].tolist() == shown
    assert found.labelled["depth"].tolist() == [index not in bad for index in (2, 3, 4, 5)]
    assert [one.index for one in found.bad_files] == [index for index in (2, 3, 4, 5) if index in bad]
    whole = batch()
    assert [x.shape for x in found.tensors()] == [x.shape for x in whole.tensors()]
    assert all(torch.equal(one, other) for one, other in zip(found.tensors(), batch(*bad).tensors(), strict=True))


def test_a_bad_file_teaches_nothing():
    alone, copied = batch(indices=(2, 4)), batch(3, indices=(2, 3, 4))
    assert all(torch.equal(copied.counts["depth"][name], value) for name, value in alone.counts["depth"].items())


def test_where_nobody_looks_at_bad_files_they_are_errors():
    with pytest.raises(UnreadableSample, match=r"/data/3\.png is damaged"):
        batch(3, leave_out=False)
    judged = EvalDataset(TASKS, {"depth": None}, [NamedDataset("drawn", Drawn((3,)))], size=SIZE, train_size=SIZE)
    with pytest.raises(UnreadableSample, match=r"/data/3\.png is damaged"):
        judged[3]


def test_a_disk_that_is_gone_ends_the_training():
    with pytest.raises(
        UnreadableSample, match=r"none of 9 images from image 2 of drawn \(/data/2.png\) on can be read"
    ):
        batch(*range(12))


def bad_batch(*indices: int) -> list[Batch]:
    bad = [BadFile("drawn", index, f"/data/{index}.png", f"/data/{index}.png is damaged") for index in indices]
    return [Batch(torch.zeros(1), {}, {}, bad_files=bad)]


def record(folder: Path | None, limit: float = 0.2, resumed: bool = False) -> BadFileRecord:
    return BadFileRecord(BadFiles(limit=limit), {"drawn": 12}, CPU, folder, resumed)


def test_each_file_has_one_row_over_all_starts_and_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    first = record(tmp_path)
    first.add(bad_batch(3), epoch=0, step=7)
    first.share()
    first.add(bad_batch(3), epoch=1, step=11)
    first.share()
    assert "image 3 of drawn cannot be read: /data/3.png is damaged" in caplog.text
    assert "1 of 12 images are left out so far, 2 may be" in caplog.text
    second = record(tmp_path, resumed=True)
    second.add(bad_batch(3, 5), epoch=1, step=12)
    second.share()
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(row["index"], row["epoch"], row["step"], row["file"]) for row in rows] == [
        (3, 0, 7, "/data/3.png"), (5, 1, 12, "/data/5.png"),
    ]  # fmt: skip
    assert set(rows[0]) == {"time", "epoch", "step", "dataset", "index", "file", "error"}
    assert second.summary() == f"2 images could not be read and taught nothing: 2 of 12 of drawn; {FILE} names them"
    assert record(tmp_path).summary() is None and not (tmp_path / FILE).exists(), "a new run has a new file"


def test_above_the_limit_the_last_file_is_named_with_the_count(tmp_path: Path):
    bad = record(tmp_path)  # 0.2 of 12 images: 2
    bad.add(bad_batch(1, 2), 0, 1)
    bad.share()
    bad.add(bad_batch(4), 0, 2)
    told = r"3 of 12 images of training data set drawn.*image 4 \(/data/4.png\).*limit 0.2 allows 2; mend"
    with pytest.raises(ValueError, match=told):
        bad.share()
    assert len((tmp_path / FILE).read_text().splitlines()) == 3, "that one is named, too"


def test_the_default_bears_one_of_a_thousand():
    assert BadFiles().allowed(1000) == 1
    assert BadFiles().allowed(999) == 0
