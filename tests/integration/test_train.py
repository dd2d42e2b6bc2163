"""The training loop: what it leaves in the run directory, when it stops, and what it refuses."""

import json
import math
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import scene_run
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_run import SpoilsGradient

from visionmtl import run as config
from visionmtl.engine import checkpoint
from visionmtl.engine.monitor import Monitor
from visionmtl.engine.nonfinite import NotFinite
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import train
from visionmtl.tasks.depth import Depth

EVERY = (*scene_run.TASKS, "normals")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of 3 epochs of 4 steps that keeps two checkpoints and draws one picture a task."""
    return tmp_path_factory.mktemp("train") / "run"


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[config.Run, dict[str, dict[str, Any]]]:
    """That run and what it returned."""
    run = scene_run.run(folder, train={"epochs": 3, "keep": 2, "sample_pictures": 1})
    return run, train(run)


@pytest.mark.usefixtures("finished")
def test_the_run_directory_holds_what_is_promised(folder: Path):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("tensorboard/")}
    assert len(events) == 1
    assert files - events == {
        *("config.yaml", "env.json", "train.log", "metrics.jsonl"),
        *("checkpoints/last.pt", "checkpoints/last.pt.previous", "checkpoints/best.pt"),
        *("checkpoints/step-0000008.pt", "checkpoints/step-0000012.pt"),
        *(f"eval/step-{step:07d}.json" for step in (4, 8, 12)),
    } | {name for name in files if name == "checkpoints/best.pt.previous"}  # there if the best changed


def test_the_kept_config_gives_the_same_run(folder: Path, finished: Any):
    assert config.load(folder / "config.yaml") == finished[0]


@pytest.mark.usefixtures("finished")
def test_records_say_what_ran_and_how(folder: Path):
    assert json.loads((folder / "env.json").read_text())["packages"]["torch"] == torch.__version__.split("+")[0]
    text = (folder / "train.log").read_text()
    for said in ("task      depth: depth", "8 classes of scenes", "loading   0 workers", "balance fixed", "step 12/12"):
        assert said in text
    assert [row["step"] for row in scene_run.rows(folder)] == list(range(1, 13))
    assert [row["epoch"] for row in scene_run.rows(folder)] == [0] * 4 + [1] * 4 + [2] * 4
    assert [row["step"] for row in scene_run.rows(folder, "val")] == [4, 8, 12]


@pytest.mark.usefixtures("finished")
def test_tensorboard_shows_the_same_numbers_and_the_pictures(folder: Path):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()

    shown = events.Scalars("train/losses/depth/silog")
    assert [event.step for event in shown] == list(range(1, 13))
    logged = [row["losses"]["depth"]["silog"] for row in scene_run.rows(folder)]
    assert [event.value for event in shown] == pytest.approx(logged, rel=1e-6)
    assert set(events.Tags()["images"]) == {f"{task}/0" for task in scene_run.TASKS}
    assert [event.step for event in events.Images("depth/0")] == [4, 8, 12]


def test_the_result_is_the_last_evaluation(folder: Path, finished: Any):
    written = json.loads((folder / "eval" / "step-0000012.json").read_text())

    assert written["header"] == {"step": 12, "epoch": 3}
    for task, result in finished[1].items():
        numbers = {name: value for name, value in result.items() if isinstance(value, int | float)}
        assert {name: written["results"][task][name] for name in numbers} == numbers


def test_the_best_checkpoint_is_the_best_by_the_rule(folder: Path, finished: Any):
    run, _ = finished
    monitor = Monitor("mean", run.tasks, {name: name for name in run.tasks})
    scores = {
        step: monitor.value(json.loads((folder / "eval" / f"step-{step:07d}.json").read_text())["results"])
        for step in (4, 8, 12)
    }
    best = checkpoint.load(folder / "checkpoints" / "best.pt")

    assert best["step"] == max(scores, key=scores.__getitem__)
    assert best["best"] == max(scores.values())


@pytest.mark.parametrize(("metric", "sign"), [("rmse_m", -1), ("delta1", 1)])
def test_the_rule_can_be_one_metric_in_its_own_direction(tmp_path: Path, metric: str, sign: int):
    train(scene_run.run(tmp_path / "run", ["depth"], train={"best": f"depth/{metric}"}))

    best = checkpoint.load(tmp_path / "run" / "checkpoints" / "best.pt")
    values = {row["step"]: sign * row["results"]["depth"][metric] for row in scene_run.rows(tmp_path / "run", "val")}
    assert best["best"] == values[best["step"]] == max(values.values())


def test_a_dry_run_does_everything_once_and_writes_nothing(tmp_path: Path):
    results = train(scene_run.run(tmp_path / "run", train={"sample_pictures": 1}), TrainOptions(dry_run=True))

    assert {task: result["images"] for task, result in results.items()} == dict.fromkeys(scene_run.TASKS, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [c for count in (1, 2) for c in combinations(EVERY, count)] + [EVERY], ids="-".join)
def test_any_tasks_train_together(names: tuple[str, ...]):
    assert list(train(scene_run.run(None, names), TrainOptions(dry_run=True))) == list(names)


def test_balancing_of_one_task_is_said_to_compare_nothing(capsys: pytest.CaptureFixture[str]):
    for names, times in ((["depth"], 1), (["depth", "segmentation"], 0)):
        train(scene_run.run(None, names, balance={"type": "mgda"}), TrainOptions(dry_run=True))
        assert capsys.readouterr().out.count("one task is learned: balance mgda has no gradients to compare") == times


def test_limits_shorten_epochs_and_validation(tmp_path: Path):
    run = scene_run.run(tmp_path / "run", ["depth"], train={"epochs": 2})

    results = train(run, TrainOptions(limit_train_batches=3, limit_val_batches=1))

    assert [row["epoch"] for row in scene_run.rows(tmp_path / "run")] == [0] * 3 + [1] * 3
    assert results["depth"]["images"] == 2


@pytest.mark.parametrize("limit", [TrainOptions(max_time_s=0.0), TrainOptions(max_steps=1)], ids=["time", "steps"])
def test_a_run_that_must_stop_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path, limit: TrainOptions):
    assert train(scene_run.run(tmp_path / "run", ["depth"]), limit) == {}

    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 1
    assert "stopped after step 1 of 4; continue with --resume" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize("log_every_steps", [1, 100])
def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every_steps: int
):
    right = Depth.loss

    def wrong(self: Depth, *arguments: Any) -> dict[str, torch.Tensor]:
        return {part: value * math.nan for part, value in right(self, *arguments).items()}

    monkeypatch.setattr(Depth, "loss", wrong)
    with pytest.raises(NotFinite, match=r"losses are not finite at step \d: .*depth/silog nan"):
        train(scene_run.run(tmp_path / "run", train={"log_every_steps": log_every_steps}))

    assert "ended by NotFinite: losses are not finite" in (tmp_path / "run" / "train.log").read_text()
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("balance", ["fixed", "upgrad"])
def test_a_gradient_that_is_not_finite_moves_no_weight_and_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, balance: str, optimizer: str
):
    right = Depth.loss

    def wrong(self: Depth, *arguments: Any) -> dict[str, torch.Tensor]:
        return {part: SpoilsGradient.apply(value) for part, value in right(self, *arguments).items()}

    run = scene_run.run(
        tmp_path / "run", balance={"type": balance}, optim={"name": optimizer}, train={"log_every_steps": 100}
    )
    state, batch = scene_run.state(run), scene_run.batches(run)[0]
    state.train_step([batch])
    before = {name: p.detach().clone() for name, p in state.net.named_parameters()}
    monkeypatch.setattr(Depth, "loss", wrong)

    state.train_step([batch])

    assert all(torch.equal(before[name], p) for name, p in state.net.named_parameters())
    assert state.finite.read().skipped == 1
    with pytest.raises(NotFinite, match=r"gradient was not finite in 4 step\(s\) up to step 4, .*lower optim.lr"):
        train(run)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_takes_a_step_near_that_of_full(tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch):
    # from torch's own first scale, 65536, a gradient may overflow, and then there is no step
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=1024.0))
    losses = {}
    for name in ("fp32", precision):
        run = scene_run.run(tmp_path / name, tasks={"segmentation": {"dropout": 0.0}}, train={"precision": name})
        train(run, TrainOptions(max_steps=2))
        logged = [row["losses"] for row in scene_run.rows(tmp_path / name)]
        losses[name] = [sum(parts.values()) for of_step in logged for parts in of_step.values()]

    np.testing.assert_allclose(losses[precision], losses["fp32"], rtol=0.05)
    found = checkpoint.load(tmp_path / precision / "checkpoints" / "last.pt")
    assert all(value.isfinite().all() for value in found["net"].values())
    assert {value.dtype for value in found["net"].values() if value.is_floating_point()} == {torch.float32}


@pytest.fixture
def _deterministic_ends_here() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic_ends_here")
def test_deterministic_runs_are_equal_and_the_switch_goes_back(tmp_path: Path):
    for name in ("a", "b"):
        train(scene_run.run(tmp_path / name, EVERY, train={"deterministic": True}), TrainOptions(max_steps=2))
        assert torch.are_deterministic_algorithms_enabled()
    assert scene_run.rows(tmp_path / "a") == scene_run.rows(tmp_path / "b")

    train(scene_run.run(None, ["depth"]), TrainOptions(dry_run=True))
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_epoch_too_short_for_one_step_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"an epoch has 4 batches, but train.accumulate is 5"):
        train(scene_run.run(tmp_path / "run", train={"accumulate": 5}))
    assert list(tmp_path.iterdir()) == []


def test_a_warm_up_longer_than_the_run_is_an_error(tmp_path: Path):
    def run(**optim: Any) -> Any:
        return scene_run.run(tmp_path / "run", ["depth"], optim=optim, train={"epochs": 2})

    with pytest.raises(ValueError, match=r"takes 9 steps, but the run has 8 .*lower optim.warmup_steps, or raise"):
        train(run(warmup_steps=9), TrainOptions(dry_run=True))
    with pytest.raises(ValueError, match=r"takes 12 steps, but the run has 8 .*lower optim.warmup_epochs, or raise"):
        train(run(warmup_epochs=3), TrainOptions(dry_run=True))
    train(run(warmup_steps=8), TrainOptions(max_steps=1))


def test_options_that_cut_a_run_short_keep_its_warm_up(tmp_path: Path):
    run = scene_run.run(tmp_path / "run", ["depth"], optim={"warmup_steps": 4})
    train(run, TrainOptions(max_steps=1))
    assert "before its warm-up" not in (tmp_path / "run" / "train.log").read_text()

    train(run.model_copy(update={"output": str(tmp_path / "short")}), TrainOptions(limit_train_batches=2))
    assert "--limit-train-batches ends the run before its warm-up" in (tmp_path / "short" / "train.log").read_text()


@pytest.mark.parametrize("least", [0.1, 50.0])
def test_a_task_whose_labels_are_all_out_of_range_is_told_once(tmp_path: Path, least: float):
    depth = {"min_depth_m": least, "max_depth_m": 60.0}
    train(scene_run.run(tmp_path / "run", tasks={"depth": depth}, train={"epochs": 2}), TrainOptions())

    log = (tmp_path / "run" / "train.log").read_text()
    told = "depth is labelled in 4 step(s), and none of these labels holds a pixel, box or class"
    assert log.count(told) == (least == 50) and "segmentation is labelled" not in log


@pytest.mark.parametrize("least", [1.0, 1000.0])
@pytest.mark.parametrize("head", ["aligned", "fcos"])
def test_a_detector_that_is_taught_no_box_is_told_of(tmp_path: Path, head: str, least: float):
    detection = {"head": {"type": head, "levels": [3, 4], "num_convs": 1}}
    run = scene_run.run(tmp_path / "run", tasks={"detection": detection}, data={"augment": {"min_box_px": least}})
    train(run, TrainOptions())

    told = "detection is labelled in 4 step(s), and none of these labels holds a pixel, box or class"
    assert (tmp_path / "run" / "train.log").read_text().count(told) == (least == 1000)


def test_classes_that_no_validation_label_shows_are_told_once(tmp_path: Path):
    """Masks of 0 and 255, as many tools write them: 255 is not labelled unless `ignore` or `values` say so."""
    for number in range(4):
        for folder, pixels in (("images", np.full((64, 64, 3), 99)), ("masks", 255 * (np.indices((64, 64))[1] > 30))):
            (tmp_path / folder).mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / folder / f"{number}.png"), pixels.astype(np.uint8))
    folder = {
        "type": "folder", "root": str(tmp_path), "images": "images/*",
        "segmentation": {"files": "masks/{stem}.png", "classes": ["bg", "fg"]},
    }  # fmt: skip
    data, train_settings = {"train": [folder], "val": [folder]}, {"epochs": 2}
    train(scene_run.run(tmp_path / "run", ["segmentation"], data=data, train=train_settings), TrainOptions())
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("segmentation: no validation label shows fg; no figure counts them") == 1
