"""Learning from teachers: in the step, on the student's images, as settings that are checked before the work."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import scene_run
import torch
from PIL import Image
from test_no_waits import Waits
from torch import Tensor, nn
from torch._dynamo.utils import counters

from visionmtl.engine import checkpoint, distributed
from visionmtl.engine.checkpoint import open_model
from visionmtl.engine.compile import compile_losses, compile_teachers
from visionmtl.engine.distributed import Ranks
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import train
from visionmtl.run import Run
from visionmtl.structures import Batch

DETERMINISTIC = {"tasks": {"segmentation": {"dropout": 0.0}}}
PLAIN_SGD = {
    "name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "clip_norm": None, "ema_decay": None,
    "schedule": "constant",
}  # fmt: skip


def teacher(folder: Path, seed: int = 1, names: tuple[str, ...] = scene_run.TASKS, **changes: Any) -> str:
    """A run folder with a network that nobody trained, other than the student."""
    run = scene_run.run(folder, names, **changes)
    path = scene_run.save_untrained(run, folder)
    state = checkpoint.load(path)
    noise = torch.Generator().manual_seed(seed)
    for name, value in state["net"].items():
        if value.is_floating_point() and "running_var" not in name:
            value += 0.05 * torch.randn(value.shape, generator=noise)
        if name == "decoders.detection.logits.bias":
            value += 4  # sure enough of some boxes
    checkpoint.save(path, state)
    return str(folder)


def student(paths: list[str], output: Path | None = None, **changes: Any) -> Run:
    settings = scene_run.merged({"distill": {"teachers": paths}}, scene_run.merged(DETERMINISTIC, changes))
    return scene_run.run(output, **settings)


def unlabelled(batch: Batch) -> Batch:
    """The same images without any label."""
    labelled = {name: torch.zeros_like(known) for name, known in batch.labelled.items()}
    return Batch(batch.image, batch.targets, labelled, batch.counts, batch.color)


def test_teachers_add_parts_to_every_task_also_without_labels_and_stay_out_of_the_checkpoint(tmp_path: Path):
    run = student([teacher(tmp_path / "teacher")])
    state = scene_run.state(run)
    assert state.teachers is not None
    before = {name: value.clone() for name, value in state.teachers.state_dict().items()}
    (batch, *_) = scene_run.batches(run)
    output = state.train_step([unlabelled(batch)])

    for name in scene_run.TASKS:
        soft = {part: value for part, value in output.losses[name].items() if part.startswith("soft_")}
        assert soft and all(value > 0 for value in soft.values())
        assert all(value == 0 for part, value in output.losses[name].items() if part not in soft)
        logged = state._losses(output)
        assert set(logged[name]) == set(soft), "a loss of 0 for want of labels is not shown"
    assert all(not flag for flag in output.labelled.values())
    assert scene_run.differences(state.teachers.state_dict(), before) == [], "weights and statistics stay"
    assert not any(part.training for part in state.teachers.modules())
    saved = state.state_dict()
    assert len(saved["net"]) == len(state.net.state_dict()) and not any("teacher" in key for key in saved["net"])
    assert [set(one) for one in saved["teachers"]] == [{"path", "sha256"}]


def test_teachers_see_the_augmented_batch_with_their_own_normalisation(tmp_path: Path):
    path = teacher(tmp_path / "teacher", model={"encoder": {"name": "test_resnet"}})
    run = student([path], data={"augment": {"flip": 0.5, "brightness": 0.3}})
    state, batch = scene_run.state(run), scene_run.batches(run)[0]
    net = open_model(path).net
    net.mean += 10  # as if its encoder had other statistics
    assert state.teachers is not None and batch.color is not None
    state.teachers.nets[0].mean += 10  # type: ignore[operator]
    with torch.no_grad():
        soft, _ = state.teachers(batch.image, batch.color)
        raw = net.decode(net.shared(batch.image, batch.color))
    torch.testing.assert_close(soft["depth"]["log_depth"], raw["depth"].clamp(torch.tensor(0.1).log(), None))
    assert state.net.mean.flatten()[0] != net.mean.flatten()[0]


@pytest.mark.slow
def test_several_teachers_and_views_give_their_mean(tmp_path: Path):
    paths = [teacher(tmp_path / str(seed), seed) for seed in (1, 2)]
    run = student(paths)
    batch = scene_run.batches(run)[0]
    one, other, both = (
        scene_run.state(student(chosen)).teachers(batch.image, None)[0]  # type: ignore[misc]
        for chosen in (paths[:1], paths[1:], paths)
    )
    for task, name in (("segmentation", "shares"), ("depth", "log_depth"), ("detection", "scores")):
        torch.testing.assert_close(both[task][name], (one[task][name] + other[task][name]) / 2)

    flipped = student(paths[:1], distill={"flip": True})
    views = scene_run.state(flipped).teachers(batch.image, None)[0]  # type: ignore[misc]
    turned = scene_run.state(flipped).teachers(batch.image.flip(-1), None)[0]  # type: ignore[misc]
    torch.testing.assert_close(views["segmentation"]["shares"].flip(-1), turned["segmentation"]["shares"])
    assert not torch.allclose(views["segmentation"]["shares"], one["segmentation"]["shares"])


def moved_by_one_step(run: Run, micro_batches: list[Batch], ranks: Ranks = scene_run.ALONE) -> dict[str, Tensor]:
    trainer = scene_run.state(run, ranks)
    trainer.net.train = lambda mode=True: nn.Module.train(trainer.net, False)  # type: ignore[method-assign]
    before = {name: value.detach().clone() for name, value in trainer.net.named_parameters()}
    trainer.train_step(micro_batches)
    return {name: before[name] - value.detach() for name, value in trainer.net.named_parameters()}


def parts_of(run: Run, batch: Batch, size: int) -> list[Batch]:
    """The batch cut into micro-batches, in which each image has other labels."""
    cut = []
    for first in range(0, len(batch.image), size):
        share = slice(first, first + size)
        targets = {task: {name: value[share] for name, value in of.items()} for task, of in batch.targets.items()}
        shape = (batch.image.shape[2], batch.image.shape[3])
        counts = {task: run.tasks[task].count(of_task, shape) for task, of_task in targets.items()}
        labelled = {task: known[share] for task, known in batch.labelled.items()}
        cut.append(Batch(batch.image[share], targets, labelled, counts))
    return cut


def partly_labelled(run: Run) -> Batch:
    batch = scene_run.batches(run)[0]
    batch.image[1, :, 40:] = 0  # padding
    batch.labelled["depth"][:] = False
    batch.targets["depth"]["depth_m"][:] = 0
    batch.labelled["detection"][1:3] = False
    batch.targets["detection"]["valid"][1:3] = False
    batch.color = None
    return batch


def four_images(path: str, accumulate: int = 1, **changes: Any) -> Run:
    settings = {"train": {"batch_size": 4, "accumulate": accumulate}, "optim": PLAIN_SGD}
    return student([path], **scene_run.merged(settings, changes))


def test_micro_batches_teach_what_their_common_batch_does(tmp_path: Path):
    path = teacher(tmp_path / "teacher")
    run = four_images(path)
    whole = moved_by_one_step(run, [partly_labelled(run)])
    run = four_images(path, 2)
    cut = moved_by_one_step(run, parts_of(run, partly_labelled(run), 2))
    for prefix in ("trunk", *(f"decoders.{name}" for name in scene_run.TASKS)):
        one, other = (
            torch.cat([value.flatten() for name, value in of.items() if name.startswith(prefix)]) for of in (whole, cut)
        )
        assert one.norm() > 0 and (one - other).norm() <= 1e-5 * one.norm(), prefix


def one_of_two(groups: Iterator[None], folder: Path, path: str) -> None:
    next(groups)
    with distributed.group("cpu", timeout_s=200) as ranks:
        run = four_images(path, train={"batch_size": 2})
        mine = parts_of(run, partly_labelled(four_images(path)), 2)[ranks.rank]
        torch.save(moved_by_one_step(run, [mine], ranks), folder / f"{ranks.rank}.pt")


@pytest.mark.slow
def test_two_processes_teach_what_one_does(tmp_path: Path):
    path = teacher(tmp_path / "teacher")
    processes.run(2, one_of_two, tmp_path, path)
    run = four_images(path)
    whole = moved_by_one_step(run, [partly_labelled(run)])
    for rank in range(2):
        cut = torch.load(tmp_path / f"{rank}.pt")
        one, other = (torch.cat([value.flatten() for value in of.values()]) for of in (whole, cut))
        assert (one - other).norm() <= 1e-5 * one.norm()


@pytest.mark.parametrize("balance", ["fixed", "upgrad"])
def test_no_teacher_makes_the_host_wait(balance: str, tmp_path: Path):
    run = student([teacher(tmp_path / "teacher")], balance={"type": balance}, distill={"flip": True})
    state, batches = scene_run.state(run), scene_run.batches(run)[:2]
    state.train_step(batches)
    with Waits() as waits:
        state.train_step(batches)
    assert waits.seen > 300 and waits.found == []


@pytest.mark.slow
def test_compiled_teachers_are_one_graph_beside_that_of_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Graphs are run as they are: to make kernels of them takes minutes."""
    torch._dynamo.reset()
    counters.clear()
    module = "visionmtl.engine.trainer"
    eager = partial(compile_losses, backend="aot_eager")
    monkeypatch.setattr(f"{module}.compile_losses", eager)
    monkeypatch.setattr(f"{module}.compile_teachers", lambda t, s: compile_teachers(t, s, "aot_eager"))
    path = teacher(tmp_path / "teacher")
    moved = [
        moved_by_one_step(run, scene_run.batches(run)[:1])
        for run in (four_images(path, train={"compile": choice}) for choice in (False, True))
    ]
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (2, {})
    one, other = (torch.cat([value.flatten() for value in of.values()]) for of in moved)
    assert (one - other).norm() <= 1e-4 * one.norm()
    torch._dynamo.reset()


def test_a_run_with_teachers_resumes_bit_for_bit_and_only_with_the_same_ones(tmp_path: Path):
    path = teacher(tmp_path / "teacher")
    for name, steps in (("whole", (None,)), ("cut", (2, None))):
        for number, limit in enumerate(steps):
            run = student([path], tmp_path / name)
            train(run, TrainOptions(max_steps=limit, resume="auto" if number else None))
    assert scene_run.differences(scene_run.last_state(tmp_path / "whole"), scene_run.last_state(tmp_path / "cut")) == []
    assert scene_run.rows(tmp_path / "whole") == scene_run.rows(tmp_path / "cut")
    log = (tmp_path / "whole" / "train.log").read_text()
    assert "teacher   " in log and "SHA-256" in log

    other = student([teacher(tmp_path / "other", 2)], tmp_path / "cut")
    with pytest.raises(ValueError, match=r"was trained with the teachers .*the same files.*--init-from"):
        train(other, TrainOptions(resume="auto"))


def test_a_task_without_any_label_learns_from_its_teacher_alone(tmp_path: Path):
    """On photos that nobody labelled; the classes are the teacher's."""
    images = tmp_path / "photos"
    images.mkdir()
    for number in range(2):
        Image.new("RGB", (80, 60), (40 * number, 90, 160)).save(images / f"{number}.png")
    path = teacher(tmp_path / "teacher", names=("segmentation",))
    photos = {"type": "folder", "root": str(images), "images": "*.png"}
    train(scene_run.run(tmp_path / "run", ("segmentation",), distill={"teachers": [path]}, data={"train": [photos]}))

    rows = scene_run.rows(tmp_path / "run")
    assert rows and all(set(row["losses"]["segmentation"]) == {"soft_kl"} for row in rows)
    assert open_model(tmp_path / "run").net.spaces == open_model(path).net.spaces


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["pose"]}, r"distill names task 'pose'; this run has detection, segmentation, depth"),
        ({"tasks": {"depth": {"temperature": 2}}}, r"tasks.depth.temperature .* no effect; it reads weight, scale"),
        ({"teachers": []}, "at least 1 item"),
        ({"teachers": [{"checkpoint": "x", "tasks": {"pose": "depth"}}]}, "names task 'pose'"),
    ],
)
def test_settings_without_an_effect_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        scene_run.run(distill={"teachers": ["x"], **changes})


def test_what_does_not_fit_the_student_is_refused_before_the_first_step(tmp_path: Path):
    path = teacher(tmp_path / "teacher", names=("segmentation", "depth"))

    def refused(message: str, distill: dict[str, Any], **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            scene_run.state(student([path], distill=distill, **changes))

    refused("no teacher has a task 'detection'", {"tasks": ["detection", "depth"]})
    refused(
        "has no task 'metres'.*segmentation, depth", {"teachers": [{"checkpoint": path, "tasks": {"depth": "metres"}}]}
    )
    refused("of type 'depth' and the student's 'segmentation'",
            {"teachers": [{"checkpoint": path, "tasks": {"segmentation": "depth"}}]})  # fmt: skip
    refused("trained on inputs of 64x64 px.*ratio of sides", {}, data={"size": [64, 96]})
    state = checkpoint.load(Path(path) / "checkpoints" / "last.pt")
    classes = state["spaces"]["segmentation"]["classes"]
    state["spaces"]["segmentation"]["classes"] = [*classes[:-1], "unicorn"]
    checkpoint.save(Path(path) / "checkpoints" / "last.pt", state)
    refused(f"it lacks {classes[-1]}, and has besides unicorn; both need the same classes by name", {})
    state["spaces"]["segmentation"]["classes"] = classes[::-1]
    checkpoint.save(Path(path) / "checkpoints" / "last.pt", state)
    taught = scene_run.state(student([path])).teachers
    assert taught is not None and taught.lessons[0][0].order is not None
    assert taught.lessons[0][0].order.tolist() == list(range(len(classes)))[::-1]


def test_one_path_and_a_list_of_tasks_are_short_forms():
    run = scene_run.run(distill={"teachers": "runs/big", "tasks": ["depth"]})
    assert run.distill is not None and run.distill.teachers[0].checkpoint == "runs/big"
    assert run.distill.tasks is not None and run.distill.tasks["depth"].weight == 1
    assert Run.model_validate(run.model_dump(mode="json")) == run
