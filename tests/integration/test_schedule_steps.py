"""Curricula and unions of classes: two processes are one on all images, and compiled steps are plain ones."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import scene_run
import torch
from contract import SIZE, SPACE, sample

from visionmtl.engine import distributed
from visionmtl.engine.compile import compile_losses
from visionmtl.engine.distributed import Ranks
from visionmtl.engine.trainer import Trainer
from visionmtl.network import LossNet, build_model
from visionmtl.run import Run, Train
from visionmtl.structures import Batch, Sample

GROUP = {"norm": "group"}
CURRICULA = {
    "tasks": {
        "tasks": {"depth": {"start_epoch": 1}, "segmentation": {"freeze_epoch": 1}, "detection": {"stop_epoch": 2}}
    },
    "easiest first": {"easiest_first": {"measure_epochs": 1}},  # epochs of two steps; then one task alone
}
UNION = "union"
CASES = [(name, balance) for name in (*CURRICULA, UNION) for balance in ("fixed", "upgrad")]
STEPS, ACCUMULATE, BATCH = 4, 2, 4


def settings(case: str, balance: str) -> Run:
    """Without BatchNorm, which would see the images of one process."""
    parts: dict[str, Any] = {
        "model": {"pyramid": GROUP}, "balance": {"type": balance},
        "tasks": {"segmentation": {"decoder": GROUP, "dropout": 0.0}, "depth": {"decoder": GROUP}},
        "optim": {"name": "sgd", "lr": 0.02, "clip_norm": 10.0},
        "data": {"train": [scene_run.scenes(STEPS * ACCUMULATE * BATCH)]},
        "train": {"batch_size": BATCH, "accumulate": ACCUMULATE, "epochs": 4},
    }  # fmt: skip
    names = scene_run.TASKS
    if case == UNION:
        names = ("detection", "segmentation")
        parts["tasks"] = {
            "detection": {"classes": UNION},
            "segmentation": {**parts["tasks"]["segmentation"], "classes": UNION},
        }
        parts["data"]["size"] = list(SIZE)
    else:
        parts["train"]["curriculum"] = CURRICULA[case]
    return scene_run.run(names=names, **parts)


def partly_annotated(seed: int) -> Sample:
    """With labels of two of the three classes, since nobody looked for the third."""
    known = np.array([[0, 1], [1, 2]][seed % 2])
    whole = sample(seed, "boxes", "segmentation")
    assert whole.boxes is not None and whole.segmentation is not None
    annotated = np.isin(np.arange(len(SPACE.classes)), known)
    return replace(
        whole, boxes=replace(whole.boxes, labels=known[whole.boxes.labels % 2]),
        segmentation=known[whole.segmentation % 2].astype(np.uint8),
        annotated=dict.fromkeys(("boxes", "segmentation"), annotated),
    )  # fmt: skip


def union_batches(run: Run) -> list[Batch]:
    """Of the 4 images of a batch two annotate other classes than the others, and one is not labelled at all."""
    batches = []
    for number in range(STEPS * ACCUMULATE):
        samples = [partly_annotated(2 * number), None, partly_annotated(2 * number + 1), partly_annotated(number)]
        targets = {name: task.collate(samples, run.data.size) for name, task in run.tasks.items()}
        image = np.random.default_rng(number).integers(0, 256, (BATCH, 3, *run.data.size), np.uint8)
        labelled = torch.tensor([sample is not None for sample in samples])
        batches.append(Batch(torch.from_numpy(image), targets, dict.fromkeys(targets, labelled), {}))
    return batches


def prepared(case: str, balance: str, ranks: Ranks) -> tuple[Trainer, list[Batch]]:
    run = settings(case, balance)
    if case != UNION:
        trainer, batches = scene_run.state(run, ranks), scene_run.batches(run)
    else:
        torch.manual_seed(0)
        net = build_model(run.model, run.tasks, dict.fromkeys(run.tasks, SPACE), run.data.size)
        trainer, batches = Trainer(run, net, ranks), union_batches(run)
    trainer.steps_per_epoch = 2 if case == "easiest first" else 1
    return trainer, batches


def two_or_one(case: str, balance: str, ranks: Ranks, share: slice) -> dict[str, Any]:
    """The state after all steps on the images in `share` of each batch."""
    with scene_run.float64():
        trainer, batches = prepared(case, balance, ranks)
        parts = []
        for batch in batches:
            targets = {task: {name: value[share] for name, value in of.items()} for task, of in batch.targets.items()}
            size = trainer.run.data.size
            counts = {name: task.count(targets[name], size) for name, task in trainer.run.tasks.items()}
            labelled = {task: known[share] for task, known in batch.labelled.items()}
            parts.append(Batch(batch.image[share], targets, labelled, counts))
        for first in range(0, len(parts), ACCUMULATE):
            trainer.train_step(parts[first : first + ACCUMULATE])
    return {**trainer.net.state_dict(), **(trainer.schedule.state_dict() if trainer.schedule else {})}


def one_of_two(groups: Iterator[None], folder: Path) -> None:
    next(groups)
    with distributed.group("cpu", timeout_s=200) as ranks:
        mine = slice(2 * ranks.rank, 2 * ranks.rank + 2)
        for number, case in enumerate(CASES):
            torch.save(two_or_one(*case, ranks, mine), folder / f"{number}-{ranks.rank}.pt")


@pytest.mark.slow
def test_two_processes_are_one_on_all_images(tmp_path: Path):
    """To 1e-5 of each tensor's largest entry."""
    processes.run(2, one_of_two, tmp_path)
    for number, case in enumerate(CASES):
        one = two_or_one(*case, scene_run.ALONE, slice(None))
        first, second = (torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert scene_run.differences(first, second) == [], case
        for name, value in one.items():
            apart = (first[name].double() - value.double()).abs().max()
            assert apart <= 1e-5 * value.double().abs().max(), (case, name, float(apart))


@pytest.mark.parametrize("balance", ["fixed", "upgrad"])
@pytest.mark.slow
def test_compiled_steps_of_a_curriculum_are_plain_ones(balance: str, monkeypatch: pytest.MonkeyPatch):
    def compiled(loss_net: LossNet, train: Train, device: torch.device, keeps_graph: bool) -> None:
        compile_losses(loss_net, train, device, "aot_eager", keeps_graph)

    torch._dynamo.reset()
    plain, batches = prepared("tasks", balance, scene_run.ALONE)
    monkeypatch.setattr("visionmtl.engine.trainer.compile_losses", compiled)
    run = plain.run.model_copy(update={"train": plain.run.train.model_copy(update={"compile": True})})
    ours = scene_run.state(run)
    ours.steps_per_epoch = 1
    for first in range(0, len(batches), ACCUMULATE):
        for trainer in (plain, ours):
            trainer.train_step(batches[first : first + ACCUMULATE])
    torch.testing.assert_close(ours.net.state_dict(), plain.net.state_dict(), rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()
