"""Long runs over files that are damaged, vanish or hang, and what is left of a run that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scene_run
from write_folder import FolderData

from visionmtl.data import bad_files
from visionmtl.datasets import NamedDataset
from visionmtl.engine.bad_files import FILE
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import train
from visionmtl.run import dump

ON_CPU = TrainOptions(device="cpu")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_files, "FIRST_PAUSE_S", 0.01)


def settings(data: FolderData, output: Path, limit: float = 0.5, **more: Any) -> Any:
    """Four epochs of two steps on four images."""
    split = {"images": "images/{split}/*", "depth": data.settings("train")["depth"]}
    train_on, judge_on = (
        {"type": "folder", "root": str(data.root), "split": name, **split} for name in ("train", "val")
    )
    changes = {
        "train": [train_on], "val": [judge_on], "bad_files": {"limit": limit, "retries": 1}, "size": [48, 64], **more
    }  # fmt: skip
    return scene_run.run(
        output, ["depth"], data=changes, train={"epochs": 4, "eval_every_epochs": 4, "checkpoint_every_epochs": 4}
    )


def after_step(number: int, change: Callable[[], Any]) -> Callable[[], bool]:
    """For `TrainOptions.stop`, which is asked after every step."""
    steps = []

    def stop() -> bool:
        steps.append(0)
        if len(steps) == number:
            change()
        return False

    return stop


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_files_that_go_bad_in_epoch_3_are_left_out_and_a_resumed_run_is_the_same(tmp_path: Path, capsys: Any):
    data = FolderData(tmp_path / "data")
    damaged, vanished = data.root / "images/train/1.png", data.root / "images/train/2.png"
    whole = damaged.read_bytes()

    def spoil() -> None:
        damaged.write_bytes(whole[: len(whole) // 2])
        vanished.rename(tmp_path / "away.png")
        vanished.symlink_to(data.root / "gone.png")  # a start refuses files that are not listed

    train(settings(data, tmp_path / "once"), TrainOptions(device="cpu", stop=after_step(4, spoil)))
    said = capsys.readouterr().out
    assert "BAD FILE  image 1 of folder cannot be read" in said and "2 images could not be read" in said
    found = rows(tmp_path / "once")
    assert sorted((row["index"], row["epoch"]) for row in found) == [(1, 2), (2, 2)], "once each, from epoch 2 on"
    assert {Path(str(row["file"])).name for row in found} == {"1.png", "2.png"}

    damaged.write_bytes(whole)
    (tmp_path / "away.png").replace(vanished)
    again = settings(data, tmp_path / "twice")
    train(again, TrainOptions(device="cpu", stop=after_step(4, spoil), max_steps=5))
    train(again, TrainOptions(device="cpu", resume="auto"))
    once, twice = (scene_run.last_state(tmp_path / name) for name in ("once", "twice"))
    assert scene_run.differences(once, twice) == []
    assert scene_run.rows(tmp_path / "once") == scene_run.rows(tmp_path / "twice")
    assert sorted(row["index"] for row in rows(tmp_path / "twice")) == [1, 2]

    with pytest.raises(ValueError, match=r"2 of 4 images of training data set folder .*limit 0.25 allows 1; mend"):
        train(settings(data, tmp_path / "strict", limit=0.25), ON_CPU)
    with pytest.raises(ValueError, match=r"(1|2).png .*(cut short|readable image|missing|decoded)"):
        train(settings(data, tmp_path / "none", limit=0), ON_CPU)
    assert not (tmp_path / "none" / FILE).exists()


@pytest.mark.slow
def test_a_worker_meets_a_bad_file_as_the_training_process_does_and_evaluation_leaves_none_out(tmp_path: Path):
    data = FolderData(tmp_path / "data")
    (data.root / "images/train/1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    for workers in (0, 1):
        train(settings(data, tmp_path / f"with {workers}", workers=workers), TrainOptions(device="cpu", max_steps=2))
    one, other = (scene_run.last_state(tmp_path / f"with {workers}") for workers in (0, 1))
    assert scene_run.differences(one, other) == []
    assert [{**row, "time": 0} for row in rows(tmp_path / "with 0")] == [
        {**row, "time": 0} for row in rows(tmp_path / "with 1")
    ]

    (data.root / "images/val/11.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"^[^\n]*images/val/11.png[^\n]*$"):  # one line, also out of a worker
        train(
            settings(data, tmp_path / "judged", workers=1), TrainOptions(device="cpu", resume=str(tmp_path / "with 1"))
        )


def test_a_disk_that_fails_twice_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data, failures = FolderData(tmp_path / "data"), []
    train(settings(data, tmp_path / "undisturbed"), TrainOptions(device="cpu", max_steps=2))
    read_part = NamedDataset.read_part

    def failing(dataset: NamedDataset, index: int, *args: Any) -> Any:
        if index == 1 and len(failures) < 2:
            failures.append(index)
            raise OSError(5, "Input/output error", str(dataset.file(index)))
        return read_part(dataset, index, *args)

    monkeypatch.setattr(NamedDataset, "read_part", failing)
    run = settings(data, tmp_path / "disturbed", bad_files={"retries": 2})
    train(run, TrainOptions(device="cpu", max_steps=2))
    one, other = (scene_run.last_state(tmp_path / name) for name in ("undisturbed", "disturbed"))
    assert (
        len(failures) == 2 and scene_run.differences(one, other) == [] and not (tmp_path / "disturbed" / FILE).exists()
    )


def _session(leader: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
        except OSError:  # none of a process, or it has just ended
            continue
        state, _, _, session = stat.rpartition(")")[2].split()[:4]
        if state != "Z" and int(session) == leader:
            found.append(int(entry.name))
    return found


def _named_in_shm(pids: list[int]) -> set[str]:
    """Files of /dev/shm that these processes have mapped and that still have a name."""
    names: set[str] = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            continue
        names |= {line.split()[5] for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")}
    return names


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
@pytest.mark.parametrize("whole_group", [False, True])
@pytest.mark.parametrize("moment", ["workers begin", "first step", "stopped worker"])
def test_a_killed_run_leaves_no_process_and_nothing_in_shared_memory(whole_group: bool, moment: str, tmp_path: Path):
    run = scene_run.run(tmp_path / "run", ["depth"], data={"workers": 2}, train={"epochs": 1000, "batch_size": 4})
    (tmp_path / "run.yaml").write_text(dump(run))
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-m", "visionmtl.cli", "train", str(tmp_path / "run.yaml"), "--device", "cpu"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, start_new_session=True, stdout=said, stderr=said)
    metrics, seen = tmp_path / "run" / "metrics.jsonl", set()

    def ready() -> bool:
        if moment == "workers begin":  # the server, the tracker and a worker
            return len(_session(process.pid)) >= 4
        return metrics.exists() and metrics.stat().st_size > 0

    while process.poll() is None and not ready():
        seen |= _named_in_shm(_session(process.pid))
        time.sleep(0.02)
    pids = _session(process.pid)
    seen |= _named_in_shm(pids)
    if moment == "stopped worker":
        os.kill(sorted(pids)[3], signal.SIGSTOP)  # after the run, the tracker and the server; it has begun its work
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while _session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    print(
        f"{moment}, group {whole_group}: {len(pids)} processes, mapped names {sorted(seen)}, "
        f"new in /dev/shm {sorted(set(os.listdir('/dev/shm')) - before)}"
    )
    assert len(pids) >= 4, (tmp_path / "said").read_text()
    assert not _session(process.pid)
    assert not {name for name in seen if Path(name).exists()}
