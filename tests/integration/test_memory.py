"""Memory: what a full one says, what a dry run measures, and that a long run keeps what it has."""

import gc
import os
import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import scene_run
import torch
from toy_run import small_batch, small_run, small_state, small_tasks

from visionmtl import api
from visionmtl.cli import main
from visionmtl.data.bad_files import BadFiles
from visionmtl.datasets import most_boxes, open_datasets
from visionmtl.engine.bad_files import BadFileRecord
from visionmtl.engine.logging import RunLog
from visionmtl.engine.memory_errors import OutOfMemory, explained, is_full
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.throughput import ThroughputMeter
from visionmtl.engine.trainer import Trainer, train
from visionmtl.run import dump
from visionmtl.tasks.detection import Detection

CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB is free"
)


def config(folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(dump(scene_run.run(folder / "out", ["depth"], **changes)))
    return path


def train_in_little(groups: Iterator[None], folder: Path) -> None:
    """In a process of its own, whose address space may grow by 600 MB: a batch of which one map takes far more."""
    next(groups)
    with (folder / "said").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 600 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    status = main(["train", str(folder / "run.yaml"), "--device", "cpu"])
    (folder / "status").write_text(str(status))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="limits the address space as Linux does")
def test_a_full_memory_of_the_host_is_one_line_that_names_settings(tmp_path: Path):
    size = [1024, 1024]
    config(tmp_path, data={"size": size}, train={"batch_size": 8})

    processes.run(1, train_in_little, tmp_path, timeout_s=200)

    said = (tmp_path / "said").read_text()
    assert (tmp_path / "status").read_text() == "2"
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert "training: the memory of this machine, or what this process may have of it, is full (" in line
    assert "MiB more was asked for; " in line and "MiB were in use at most); less must be needed" in line
    assert (
        "1. train.batch_size=4 train.accumulate=2, which keeps the images of a step; 2. a data.size below 1024" in line
    )
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("during", ["train_step", "eval_model"])
def test_a_full_gpu_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], during: str
):
    """As torch says it; no GPU takes part."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError(CUDA_TEXT)

    if during == "train_step":
        monkeypatch.setattr(Trainer, "train_step", full)
    else:
        monkeypatch.setattr("visionmtl.engine.trainer.evaluate", full_evaluation)
    assert main(["train", str(config(tmp_path)), "--device", "cpu"]) == 2

    said = capsys.readouterr().err
    assert "the memory of the GPU is full (2.50 GiB more was asked for; " in said
    if during == "train_step":
        assert "error: training: " in said and "1. train.batch_size=1 train.accumulate=2" in said
    else:
        assert "error: the evaluation after step 4: " in said and "2. a data.eval_size below 64x64" in said


def full_evaluation(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError(CUDA_TEXT)


def test_eval_names_its_own_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = scene_run.run(tmp_path, ["depth"])
    scene_run.save_untrained(run, tmp_path)
    monkeypatch.setattr(api, "evaluate_network", full_evaluation)
    with pytest.raises(OutOfMemory, match=r"^evaluation: .*1\. --batch-size below 4; 2\. a data\.eval_size below"):
        api.evaluate(tmp_path, batch_size=4, device="cpu")


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
            True,
        ),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shape mismatch"), False),
        (OSError(2, "No such file or directory"), False),
    ],
)
def test_only_a_full_memory_is_told_as_one(error: Exception, full: bool):
    assert is_full(error) == full
    with pytest.raises(OutOfMemory if full else type(error)), explained(["lower it"], "work"):
        raise error


# ---- the dry run ----


def test_a_dry_run_measures_the_largest_batches_and_the_whole_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    seen: list[Any] = []
    right = Trainer.train_step

    def train_step(self: Trainer, batches: Any) -> Any:
        seen.append(batches)
        return right(self, batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr("visionmtl.datasets.scenes.SceneReader.most_boxes", 100)
    train_sets = [scene_run.scenes(8, labels=["boxes"]), scene_run.scenes(8, labels=["depth_m", "segmentation"])]
    data = {"eval_size": [64, 128], "train": train_sets}
    stages = {"smaller_first": [{"epochs": 1, "size": [32, 32]}]}
    run = scene_run.run(
        tmp_path / "run", data=data, train={"batch_size": 2, "accumulate": 2, "epochs": 3, "curriculum": stages}
    )
    results = train(run, TrainOptions(dry_run=True))

    assert list(results) == list(scene_run.TASKS) and not list(tmp_path.iterdir())
    assert len(seen) == 3
    for batch in (one for batches in seen[1:] for one in batches):
        assert batch.image.shape[2:] == (64, 64) and batch.targets["detection"]["boxes"].shape[1] == 128
        assert int(batch.targets["detection"]["valid"].sum()) == 200
        assert all(bool(flags.all()) for flags in batch.labelled.values())
    said = capsys.readouterr().out
    assert "training step     2 x 2 images of 64x64, 128 padded boxes an image (detection)" in said
    assert "evaluation batch  2 images of 64x128, as many predictions as there may be" in said
    assert "3 epochs of 4 steps: 0:00:" in said and "3 evaluations of 2 batches" in said
    assert "GiB a checkpoint, up to 4 of them" in said


def test_the_fullest_image_of_a_data_set_is_known_where_its_file_is():
    assert most_boxes(open_datasets(scene_run.run().data.train)[0].reader) == 8

    class Unknown:
        pass

    assert most_boxes(Unknown()) is None  # type: ignore[arg-type]
    task = small_tasks()["boxes"]
    targets = small_batch({"boxes": task}).targets["boxes"]
    assert task.worst_case(targets, (64, 96), None)["boxes"].shape == (3, 256, 4)
    fuller = task.worst_case(targets, (64, 96), 300)
    assert fuller["boxes"].shape == (3, 512, 4) and int(fuller["valid"].sum()) == 900
    x1, y1, x2, y2 = fuller["boxes"][fuller["valid"]].unbind(dim=-1)
    assert bool((x1 <= x2).all()) and bool((y1 <= y2).all()) and float(x2.max()) <= 96 and float(y2.max()) <= 64
    assert isinstance(task, Detection) and task.with_most_predictions().min_score == 0


# ---- over time ----


def test_what_a_run_holds_does_not_grow_with_its_steps(tmp_path: Path):
    """Objects, Python's memory and tensors over 30 steps, with figures read and logged as the loop does."""
    tasks = {"depth": small_tasks()["depth"]}
    state, batch = small_state(small_run(tasks, log_every_steps=1)), small_batch(tasks)
    state.steps_per_epoch, state.total_steps = 1000, 1000
    state.throughput = ThroughputMeter(3, lambda: 0.0)
    state.bad_files = BadFileRecord(BadFiles(limit=0), {}, state.ranks.device, None, resumed=False)
    state.advice = type("Silent", (), {"line": lambda *_: None})()  # type: ignore[assignment]

    def steps(count: int) -> None:
        for _ in range(count):
            state.log_step(state.train_step([batch]), 0)

    def held() -> tuple[int, int, int]:
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(isinstance(one, torch.Tensor) for one in objects)
        return len(objects), tensors, tracemalloc.get_traced_memory()[0]

    with RunLog.open(tmp_path, show=False, loggers=()) as state.log:
        steps(5)
        tracemalloc.start()
        try:
            steps(5)
            objects, tensors, traced = held()
            steps(30)
            objects_later, tensors_later, traced_later = held()
        finally:
            tracemalloc.stop()

    assert tensors_later == tensors
    assert objects_later - objects < 30, "less than one object a step"
    assert traced_later - traced < 30 * 1024, "less than 1 KiB a step"
