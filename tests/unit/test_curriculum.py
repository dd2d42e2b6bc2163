"""Curricula: when each task is taught, what is held still meanwhile, easiest first, resuming, and what is refused."""

from typing import Any

import pytest
import scene_run
import torch
from pydantic import ValidationError

from visionmtl.data.label_spaces import resolve_spaces
from visionmtl.data.loader import train_loader
from visionmtl.datasets import open_datasets
from visionmtl.engine.curriculum import TaskSchedule
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import Trainer, train
from visionmtl.run import Curriculum

TASKS = ["detection", "segmentation", "depth"]


def schedule(**settings: Any) -> TaskSchedule:
    return TaskSchedule(Curriculum.model_validate(settings), TASKS)


def curriculum_run(curriculum: dict[str, Any], epochs: int = 4, output: Any = None, **changes: Any):
    return scene_run.run(output, train={"curriculum": curriculum, "epochs": epochs}, **changes)


def decoders_after_a_step(run: Any, epoch: int) -> tuple[Trainer, dict[str, bool]]:
    """Whether a step in an epoch changed each task's decoder, running statistics included; two steps came before."""
    trainer = scene_run.state(run)
    batches = scene_run.batches(run)
    for batch in batches[:2]:  # momentum
        trainer.train_step([batch])
    trainer.steps_per_epoch, trainer.state.step = 10, 10 * epoch
    before = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    trainer.train_step([batches[2]])
    after = trainer.net.state_dict()

    def changed(prefix: str) -> bool:
        return any(not torch.equal(after[name], before[name]) for name in after if name.startswith(prefix))

    assert changed("trunk.")
    return trainer, {task: changed(f"decoders.{task}.") for task in run.tasks}


def test_tasks_start_freeze_and_stop():
    of = schedule(tasks={"depth": {"start_epoch": 1, "stop_epoch": 3}, "detection": {"freeze_epoch": 2}})
    assert [sorted(of.taught(epoch)) for epoch in range(4)] == [
        ["detection", "segmentation"],
        ["depth", "detection", "segmentation"],
        ["depth", "detection", "segmentation"],
        ["detection", "segmentation"],
    ]
    assert [sorted(of.held(epoch)) for epoch in range(4)] == [["depth"], [], ["detection"], ["depth", "detection"]]


def test_a_task_that_is_not_taught_has_no_loss_and_its_decoder_stays():
    run = curriculum_run({"tasks": {"depth": {"stop_epoch": 2}, "segmentation": {"freeze_epoch": 2}}})
    trainer, changed = decoders_after_a_step(run, epoch=2)

    assert changed == {"detection": True, "segmentation": False, "depth": False}
    output = trainer.train_step([scene_run.batches(run)[3]])
    assert not output.labelled["depth"] and output.labelled["segmentation"]
    assert sum(output.losses["depth"].values()) == 0 and sum(output.losses["segmentation"].values()) > 0


def test_before_they_end_nothing_is_held():
    run = curriculum_run({"tasks": {"depth": {"stop_epoch": 2}}})
    assert all(decoders_after_a_step(run, epoch=1)[1].values())


def test_a_frozen_task_still_teaches_what_is_shared():
    run = curriculum_run({"tasks": {"segmentation": {"freeze_epoch": 1}}}, names=("segmentation",))
    assert decoders_after_a_step(run, epoch=1)[1] == {"segmentation": False}


@pytest.mark.parametrize("balance", ["fixed", "uncertainty", "upgrad"])
def test_balancing_gives_a_task_that_is_not_taught_no_say(balance: str):
    run = curriculum_run({"tasks": {"depth": {"start_epoch": 1}}}, balance={"type": balance})
    alone = scene_run.run(names=("detection", "segmentation"), balance={"type": balance})
    trainers = scene_run.state(run), scene_run.state(alone)
    trainers[1].net.load_state_dict(trainers[0].net.state_dict(), strict=False)
    for trainer, of in zip(trainers, (run, alone), strict=True):
        trainer.train_step([scene_run.batches(of)[0]])

    joint, two = (trainer.net.state_dict() for trainer in trainers)
    for name, value in two.items():
        torch.testing.assert_close(joint[name], value, rtol=1e-4, atol=1e-6)


def test_easiest_first_goes_by_the_fall_of_the_losses():
    of = schedule(easiest_first={"measure_epochs": 2, "every_epochs": 3})
    halves = {0.5: (2.0, 4.0, 1.0), 1.5: (1.8, 1.0, 0.5)}  # falls by 10, 75 and 50 %
    for epoch, losses in halves.items():
        values = dict(zip(TASKS, map(torch.tensor, losses), strict=True))
        of.measure(values, dict.fromkeys(TASKS, torch.tensor(True)), epoch)
    of.measure(dict.fromkeys(TASKS, torch.tensor(99.0)), dict.fromkeys(TASKS, torch.tensor(True)), 2.0)  # too late

    assert of.order() == ["segmentation", "depth", "detection"]
    assert [len(of.taught(epoch)) for epoch in range(9)] == [3, 3, 1, 1, 1, 2, 2, 2, 3]
    assert of.taught(2) == {"segmentation"} and of.held(5) == {"detection"}


def test_a_task_without_labels_comes_last():
    of = schedule(easiest_first={})
    for epoch, value in ((0.0, 1.0), (0.5, 0.9)):
        labelled = {task: torch.tensor(task != "detection") for task in TASKS}
        of.measure(dict.fromkeys(TASKS, torch.tensor(value)), labelled, epoch)
    assert of.order()[-1] == "detection"


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 6, 10])
def test_resuming_an_easiest_first_run_changes_nothing(tmp_path, stop: int):
    def run(name: str):
        return curriculum_run({"easiest_first": {}}, 4, tmp_path / name, names=("segmentation", "depth"))

    train(run("whole"))
    train(run("cut"), TrainOptions(max_steps=stop))
    train(run("cut"), TrainOptions(resume="auto"))
    whole, cut = (torch.load(tmp_path / name / "checkpoints/last.pt", weights_only=True) for name in ("whole", "cut"))
    for part in ("net", "optimizer", "curriculum"):
        assert not scene_run.differences(whole[part], cut[part])
    assert (
        "teaches segmentation\n" in (tmp_path / "whole/train.log").read_text()
        or "teaches depth\n" in (tmp_path / "whole/train.log").read_text()
    )


@pytest.mark.parametrize(
    ("curriculum", "message"),
    [
        ({}, "none of .tasks., .easiest_first. and .smaller_first. is set"),
        ({"tasks": {"depth": {"start_epoch": 1}}, "easiest_first": {}}, "both set"),
        ({"smaller_first": [{"epochs": 1, "size": [64, 64]}]}, "64x64 before 64x64"),
        ({"smaller_first": [{"epochs": 1, "size": [32, 64]}]}, "in the proportions of data.size"),
        ({"smaller_first": [{"epochs": 4, "size": [32, 32]}]}, "must be left at data.size"),
        ({"tasks": {"dept": {"start_epoch": 1}}}, "names 'dept' .did you mean"),
        ({"tasks": {"depth": {}}}, "no epoch is set"),
        ({"tasks": {"depth": {"start_epoch": 2, "stop_epoch": 2}}}, "start_epoch is 2, stop_epoch is 2"),
        ({"tasks": {"depth": {"stop_epoch": 2, "freeze_epoch": 3}}}, "freeze_epoch is 3, stop_epoch is 2"),
        ({"tasks": {"depth": {"start_epoch": 4}}}, "epochs are 0 to 3"),
        ({"tasks": {task: {"start_epoch": 1} for task in TASKS}}, "teaches no task in epoch 0"),
        ({"easiest_first": {"measure_epochs": 2}}, "needs 5 epochs"),
    ],
)
def test_what_has_no_effect_or_teaches_nothing_is_refused(curriculum: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        curriculum_run(curriculum)


def test_smaller_images_show_the_same_scene_farther_away():
    run = curriculum_run({"smaller_first": [{"epochs": 1, "size": [32, 32]}]}, data={"augment": {"flip": 0.0}})
    sources = open_datasets(run.data.train)
    spaces = resolve_spaces(run.tasks, sources)
    small, full = (
        next(scene_run.epoch(train_loader(run.data, run.tasks, spaces, sources, 2, run.seed, size=size)))
        for size in ((32, 32), None)
    )

    assert small.image.shape[2:] == (32, 32) and full.image.shape[2:] == (64, 64)
    ratio = small.targets["depth"]["depth_m"].mean() / full.targets["depth"]["depth_m"].mean()
    assert 1.9 < ratio < 2.1
    boxes = [batch.targets["detection"]["boxes"] for batch in (small, full)]
    torch.testing.assert_close(2 * boxes[0], boxes[1], rtol=0, atol=1e-3)


def test_resuming_in_the_middle_of_an_epoch_of_smaller_images_changes_nothing(tmp_path):
    def run(name: str):
        smaller = {"smaller_first": [{"epochs": 1, "size": [32, 32]}]}
        return curriculum_run(smaller, 2, tmp_path / name, names=("segmentation", "depth"))

    train(run("whole"))
    train(run("cut"), TrainOptions(max_steps=2))
    train(run("cut"), TrainOptions(resume="auto"))
    whole, cut = (scene_run.last_state(tmp_path / name) for name in ("whole", "cut"))
    assert whole["step"] == 8 and not scene_run.differences(whole, cut)


def test_a_run_begins_small_and_ends_at_full_size(tmp_path):
    run = curriculum_run({"smaller_first": [{"epochs": 2, "size": [32, 32]}]}, 3, tmp_path)
    results = train(run)
    said = (tmp_path / "train.log").read_text()

    assert "epoch 1 at 32x32" in said and "epoch 2 at" not in said
    assert all(results[task]["images"] == 4 for task in TASKS)
    assert [run.train.curriculum.size(epoch) for epoch in range(3)] == [(32, 32), (32, 32), None]


@pytest.mark.parametrize(("sharing", "own"), [("single", ("encoder", "pyramid")), ("pad_net", ("initial", "restore"))])
def test_what_serves_a_task_alone_is_held_with_its_decoder(sharing: str, own: tuple[str, ...]):
    run = curriculum_run({"tasks": {"depth": {"stop_epoch": 1}}}, model={"sharing": {"type": sharing}})
    trainer = scene_run.state(run)
    batches = scene_run.batches(run)
    for batch in batches[:2]:
        trainer.train_step([batch])
    trainer.steps_per_epoch, trainer.state.step = 10, 10
    before = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    trainer.train_step([batches[2]])
    for name in own:
        of_depth = [key for key in before if key.startswith(f"trunk.{name}.depth.")]
        others = [key for key in before if key.startswith(f"trunk.{name}.segmentation.")]
        assert of_depth and all(torch.equal(trainer.net.state_dict()[key], before[key]) for key in of_depth)
        assert any(not torch.equal(trainer.net.state_dict()[key], before[key]) for key in others)


def reached(trunk: Any, task: str) -> list[torch.nn.Parameter]:
    """The trunk's parameters that a loss of the task reaches."""
    trunk.zero_grad(set_to_none=True)
    maps = trunk.split(trunk(torch.zeros(2, 3, 64, 96)))[task]
    sum(value.sum() for value in maps.values()).backward()
    found = [p for p in trunk.parameters() if p.grad is not None]
    trunk.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("sharing", ["lora", "adapter", {"type": "lora_branch", "common": ["segmentation"]}])
def test_what_tasks_share_goes_on_learning_while_one_of_them_is_held(sharing: Any):
    settings = sharing if isinstance(sharing, dict) else {"type": sharing}
    run = curriculum_run({"tasks": {"depth": {"start_epoch": 1}}}, model={"sharing": settings})
    trainer = scene_run.state(run)
    trunk = trainer.net.trunk
    used = {id(p) for task in ("detection", "segmentation") for p in reached(trunk, task)}
    held = {id(p) for p in trainer.held_parameters()}
    own = {id(p) for p in reached(trunk, "depth")} - used
    assert own and own <= held and not held & used


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optim": {"schedule": "step", "milestones": (0.01, 0.5)}}, r"are the steps \[0, 8\] of 16, so that"),
        ({"optim": {"schedule": "step", "milestones": (0.5, 0.51)}}, r"are the steps \[8, 8\] of 16"),
        ({"optim": {"warmup_steps": 17}}, r"takes 17 steps, but the run has 16 .*; allowed are up to 16 steps; lower"),
        (
            {"train": {"epochs": 4, "batch_size": 8, "curriculum": {"easiest_first": {"measure_epochs": 1}}}},
            r"measures for 1 epoch\(s\) of 1 step\(s\).*two steps or more are needed",
        ),
    ],
)  # fmt: skip
def test_a_schedule_that_does_not_fit_is_refused_before_the_network_is_built(
    changes: dict[str, Any], told: str, tmp_path, monkeypatch
):
    monkeypatch.setattr("visionmtl.engine.trainer.build_model", None)
    run = scene_run.run(tmp_path / "run", **{"train": {"epochs": 4}, **changes})
    with pytest.raises(ValueError, match=told):
        train(run, TrainOptions(device="cpu"))
