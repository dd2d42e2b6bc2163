"""Two processes compute what one does on the doubled batch, whatever is labelled where, and evaluate alike."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import scene_run
import torch

from visionmtl.data.loader import val_loader
from visionmtl.datasets import open_datasets
from visionmtl.engine import checkpoint
from visionmtl.engine.evaluator import evaluate
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import train
from visionmtl.run import Run

METHODS: dict[str, dict[str, Any]] = {
    "fixed": {"type": "fixed"},
    "upgrad": {"type": "upgrad"},
}
SHARD = {"shard": True}
STEPS = 3
GROUP = {"norm": "group"}  # no layer looks at a whole batch


def settings(folder: Path, method: str, world: int, pyramid: dict[str, Any] = GROUP, **changes: Any) -> Run:
    """One epoch over images of which a third has boxes only, a third the maps only."""
    return scene_run.run(
        folder / method,
        model={"pyramid": pyramid},
        tasks={"segmentation": {"dropout": 0.0, "decoder": GROUP}, "depth": {"decoder": GROUP}},
        balance=METHODS[method],
        seed=2,  # tasks disagree in a step of this one, so that upgrad has something to do
        data={
            "train": [
                scene_run.scenes(4, labels=["boxes"]),
                scene_run.scenes(4, seed=1, labels=["segmentation", "depth_m"]),
                scene_run.scenes(4, seed=2),
            ],
            "val": [scene_run.scenes(5, split="val")],  # one rank has an image more
        },
        optim={"name": "sgd", "lr": 0.02, "clip_norm": 10.0},
        train={"batch_size": 4 // world, "best": "depth/rmse_m", **changes},
    )


def one_of_two(groups: Iterator[None], folder: Path) -> None:
    """What each of the two processes runs."""
    on_cpu = TrainOptions(device="cpu")
    runs = [(settings(folder, method, world=2), on_cpu) for method in METHODS]
    runs.append((settings(folder / "statistics", "fixed", world=2, pyramid={"norm": "batch"}), on_cpu))
    runs.append((settings(folder / "sharded", "fixed", world=2, distributed=SHARD), on_cpu))
    again = settings(folder / "sharded", "upgrad", world=2, distributed=SHARD)  # in two parts
    runs += [(again, replace(on_cpu, max_steps=2)), (again, replace(on_cpu, resume="auto"))]
    crossed = [settings(folder / "crossed", "fixed", world=2, distributed=how) for how in ({}, SHARD, {})]
    runs += [(run, replace(on_cpu, resume="auto", max_steps=step)) for step, run in enumerate(crossed, start=1)]
    for run, options in runs:
        next(groups)
        train(run, options)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    processes.run(2, one_of_two, folder, num_groups=9)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same runs in this process, on batches twice as large."""
    folder = tmp_path_factory.mktemp("one")
    for method in METHODS:
        train(settings(folder, method, world=1), TrainOptions(device="cpu"))
    return folder


def test_the_ranks_of_these_tests_have_unequal_numbers_of_labels(tmp_path: Path):
    labelled = [
        batch.labelled["detection"].tolist() for batch in scene_run.batches(settings(tmp_path, "fixed", world=1))
    ]

    assert len(labelled) == STEPS
    assert any(sum(of_both[:2]) != sum(of_both[2:]) for of_both in labelled)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_end_with_the_weights_of_one(one: Path, two: Path, method: str):
    ours, theirs = scene_run.last_state(one / method), scene_run.last_state(two / method)

    assert ours["step"] == theirs["step"] == STEPS
    for of_one, of_two in ((ours["net"], theirs["net"]), (ours["ema"]["module"], theirs["ema"]["module"])):
        apart = {name: float((value - of_two[name]).abs().max()) for name, value in of_one.items()}
        assert max(apart.values()) < 1e-5, {name: far for name, far in apart.items() if far >= 1e-5}


@pytest.mark.parametrize("method", METHODS)
def test_a_network_spread_over_two_processes_ends_as_a_whole_one_in_such_a_file(one: Path, two: Path, method: str):
    """That of upgrad was stopped and resumed."""
    whole, sharded = scene_run.last_state(one / method), scene_run.last_state(two / "sharded" / method)

    assert kinds(sharded) == kinds(whole)
    for ours, theirs in ((whole["net"], sharded["net"]), (whole["ema"]["module"], sharded["ema"]["module"])):
        apart = {name: float((value - theirs[name]).abs().max()) for name, value in ours.items()}
        assert max(apart.values()) < 1e-5, {name: far for name, far in apart.items() if far >= 1e-5}
    for moments, of_spread in zip(
        whole["optimizer"]["state"].values(), sharded["optimizer"]["state"].values(), strict=True
    ):
        torch.testing.assert_close(of_spread, moments, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(scene_run.rows(one / method), scene_run.rows(two / "sharded" / method), strict=True):
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)


def test_a_run_resumed_sharded_and_unsharded_in_turn_ends_as_a_whole_one(one: Path, two: Path):
    whole, crossed = scene_run.last_state(one / "fixed"), scene_run.last_state(two / "crossed" / "fixed")

    assert crossed["step"] == STEPS
    assert kinds(crossed) == kinds(whole)
    for part in ("net", "optimizer"):
        torch.testing.assert_close(crossed[part], whole[part], rtol=1e-3, atol=1e-5)


def kinds(value: Any) -> Any:
    """What a checkpoint holds, by name: types, and shapes of tensors."""
    if isinstance(value, dict):
        return {key: kinds(inner) for key, inner in value.items()}
    return (value.shape, value.dtype, type(value)) if isinstance(value, torch.Tensor) else type(value)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"compile": True}, "train.compile is True"),
        ({"precision": "fp16"}, "train.precision is 'fp16'"),
    ],
)
def test_what_does_not_go_with_sharding_is_refused(tmp_path: Path, changes: dict[str, Any], wrong: str):
    run = settings(tmp_path, "fixed", world=1, **{"distributed": SHARD} | changes)

    with pytest.raises(ValueError, match=f"{wrong}, which does not go with .*shard; .*, or do not shard"):
        scene_run.state(run)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_measure_what_one_does(one: Path, two: Path, method: str):
    file = f"{method}/eval/step-{STEPS:07d}.json"
    ours, theirs = (json.loads((folder / file).read_text())["results"] for folder in (one, two))
    for task, result in ours.items():
        assert result["images"] == theirs[task]["images"] == 5
        numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
        assert {name: theirs[task][name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_of_the_tasks_are_those_of_the_whole_batch(one: Path, two: Path, method: str):
    for ours, theirs in zip(scene_run.rows(one / method), scene_run.rows(two / method), strict=True):
        assert theirs["weights"] == pytest.approx(ours["weights"], rel=1e-3)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)


def test_the_tasks_of_these_tests_disagree(one: Path):
    assert max(weight for row in scene_run.rows(one / "upgrad") for weight in row["weights"].values()) > 1.1


def test_the_first_process_alone_writes_and_logs_the_loss_of_all(one: Path, two: Path):
    assert [row["step"] for row in scene_run.rows(two / "fixed")] == [1, 2, 3]
    for ours, theirs in zip(scene_run.rows(one / "fixed"), scene_run.rows(two / "fixed"), strict=True):
        for task, parts in ours["losses"].items():
            assert theirs["losses"][task] == pytest.approx(parts, rel=1e-3, abs=1e-6)


def test_what_the_ranks_measured_is_what_their_checkpoint_gives(two: Path):
    """Each rank's BatchNorm saw other images; all measure the network that is saved."""
    folder = two / "statistics" / "fixed"
    opened = checkpoint.open_model(folder / "checkpoints" / "last.pt")
    data, net = opened.run.data, opened.net

    again = evaluate(net, val_loader(data, net.tasks, net.spaces, open_datasets(data.val), batch_size=1), "cpu")

    measured = json.loads((folder / "eval" / f"step-{STEPS:07d}.json").read_text())["results"]
    assert again["depth"]["rmse_m"] == pytest.approx(measured["depth"]["rmse_m"], rel=1e-6)
    assert again["segmentation"]["miou"] == pytest.approx(measured["segmentation"]["miou"], rel=1e-3)
