"""What goes wrong after a step costs no finished step, and what cannot go on is refused with its reason."""

import errno
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import scene_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from visionmtl.engine import checkpoint
from visionmtl.engine import trainer as loop
from visionmtl.engine.monitor import Monitor
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import Trainer, train
from visionmtl.run import Run

TWO_EPOCHS: dict[str, Any] = {"data": {"train": [scene_run.scenes(4)]}, "train": {"epochs": 2, "best": "depth/rmse_m"}}


def settings(folder: Path, **changes: Any) -> Run:
    """Two epochs of two steps."""
    return scene_run.run(folder, ["depth"], **scene_run.merged(TWO_EPOCHS, changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(settings(folder))
    return folder


def fail(*_: Any, **__: Any) -> None:
    raise OSError("no space left")


@pytest.mark.parametrize("where", ["evaluate", "save_json", "Monitor.value"])
def test_a_failing_evaluation_costs_no_step_and_is_made_up_for(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(f"{loop.__name__}.{where}", fail)
        with pytest.raises(OSError, match="no space left"):
            train(settings(folder))
    assert scene_run.last_state(folder)["step"] == 2 and not list((folder / "eval").glob("*.json"))

    results = train(settings(folder), TrainOptions(resume="auto"))

    assert "step 2 was saved, but not evaluated to the end; that comes first" in (folder / "train.log").read_text()
    assert scene_run.rows(folder, "val") == scene_run.rows(whole, "val")
    assert scene_run.differences(scene_run.last_state(folder), scene_run.last_state(whole)) == []
    assert results["depth"]["rmse_m"] == scene_run.rows(whole, "val")[-1]["results"]["depth"]["rmse_m"]


def test_the_best_value_of_the_evaluation_after_the_checkpoint_is_known_to_a_resumed_run(whole: Path):
    state = scene_run.state(settings(whole))
    path = whole / "checkpoints" / "last.pt"

    results = state.load_checkpoint(path, monitor(state))

    errors = [row["results"]["depth"]["rmse_m"] for row in scene_run.rows(whole, "val")]
    assert results and results["depth"]["rmse_m"] == errors[-1]
    assert state.state.best == -min(errors)
    assert checkpoint.load(path)["best"] == -errors[0], "the file itself is older than the last evaluation"


def monitor(trainer: Trainer) -> Monitor:
    return Monitor(trainer.run.train.best, trainer.run.tasks, {"depth": "depth"})


def test_values_by_another_rule_are_not_compared(whole: Path, tmp_path: Path):
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoint.save(path, checkpoint.load(whole / "checkpoints" / "last.pt") | {"best": -0.01})
    for rule, best in {"depth/rmse_m": -0.01, "mean": -math.inf}.items():
        state = scene_run.state(settings(whole, train={"best": rule}))
        assert state.load_checkpoint(path, monitor(state)) is None, "the file of results is not beside it"
        assert state.state.best == best


def test_an_evaluation_on_other_data_does_not_count(whole: Path):
    state = scene_run.state(settings(whole))
    names = {"depth@a": "depth", "depth@b": "depth"}
    elsewhere = Monitor("mean", state.run.tasks, names)
    assert state.load_checkpoint(whole / "checkpoints" / "last.pt", elsewhere) is None


def test_a_finished_run_says_what_it_found(whole: Path, capsys: pytest.CaptureFixture[str]):
    results = train(settings(whole), TrainOptions(resume="auto"))

    last = scene_run.rows(whole, "val")[-1]["results"]["depth"]
    assert results["depth"]["rmse_m"] == last["rmse_m"]
    shown = capsys.readouterr().out
    assert "nothing is left to train: step 4 of 4 is done" in shown
    assert re.search(rf"rmse_m +{last['rmse_m']:.4f}", shown)


def test_a_rule_for_the_best_that_cannot_be_answered_is_refused_before_the_first_step(tmp_path: Path):
    unlabelled = {"data": {"val": [scene_run.scenes(4, labels=["boxes"])]}}
    refusals = (
        ({"train": {"best": "depth@nowhere/rmse_m"}}, "'depth@nowhere/rmse_m', but the validation data judge depth; "),
        (unlabelled, "'depth/rmse_m', but the validation images have no labels that tell depth/rmse_m; .* add val"),
        (unlabelled | {"train": {"best": "mean"}}, "'mean', but the validation images have no labels that tell depth"),
        ({"train": {"best": "depth/rmse"}}, r"'depth/rmse', but 'rmse' \(did you mean 'rmse_m'\?\) is no metric"),
        ({"train": {"best": "depth/pixels"}}, "'depth/pixels', but 'pixels' is a count"),
    )
    for changes, said in refusals:
        with pytest.raises(ValueError, match=f"train.best is {said}"):
            train(settings(tmp_path / "run", **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_trace_longer_than_the_run_is_refused_and_one_that_fits_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match=r"--profile 3 needs 5 steps, .* and this start has 4; lower"):
        train(settings(tmp_path / "run"), TrainOptions(profile=3))
    assert list(tmp_path.iterdir()) == []

    train(settings(tmp_path / "run"), TrainOptions(profile=1))
    assert json.loads((tmp_path / "run" / "profile.json").read_text())["traceEvents"]
    assert "trace of 1 steps: " in (tmp_path / "run" / "train.log").read_text()


def test_a_run_out_of_time_announces_no_trace(tmp_path: Path):
    train(settings(tmp_path / "run"), TrainOptions(profile=1, max_time_s=0.0))
    assert "trace of" not in (tmp_path / "run" / "train.log").read_text()
    assert not (tmp_path / "run" / "profile.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim": {"name": "sgd"}}, "optim.name adamw, this run has sgd"),
        ({"balance": {"type": "uncertainty"}}, "balance.type fixed, this run has uncertainty"),
        ({"train": {"precision": "fp16"}}, "train.precision fp32, this run has fp16"),
        ({"optim": {"encoder_lr_factor": 0.1}}, r"parameter groups of \d+\+\d+ tensors, this run has \d+\+\d+\+\d+"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_the_setting(whole: Path, changes: dict[str, Any], said: str):
    path = whole / "checkpoints" / "last.pt"
    state = scene_run.state(settings(whole, **changes))
    with pytest.raises(ValueError, match=rf"last.pt was written with {said}.*; .* needs what .* has; .*--init-from"):
        state.load_state_dict(checkpoint.load(path), path)


@pytest.mark.parametrize(("before", "after"), [("uncertainty", "imtl_l"), ("gls", "fixed"), ("fairgrad", "mgda")])
def test_the_state_of_another_balancing_method_is_refused_where_its_shape_fits(tmp_path: Path, before: str, after: str):
    saved = scene_run.state(settings(tmp_path, balance={"type": before})).state_dict()
    with pytest.raises(ValueError, match=f"last.pt was written with balance.type {before}, this run has {after}"):
        scene_run.state(settings(tmp_path, balance={"type": after})).load_state_dict(saved, Path("last.pt"))


def test_a_checkpoint_of_another_network_names_the_settings(whole: Path):
    path = whole / "checkpoints" / "last.pt"
    state = scene_run.state(settings(whole, tasks={"depth": {"decoder": {"channels": 24}}}))
    said = r"last.pt does not fit this network: .* all must match; tasks.depth.decoder.channels is 24, and was 16; set"
    with pytest.raises(ValueError, match=said):
        state.load_state_dict(checkpoint.load(path), path)


def test_a_checkpoint_without_an_average_is_refused_where_one_is_kept(whole: Path):
    path = whole / "checkpoints" / "last.pt"
    state = scene_run.state(settings(whole))
    with pytest.raises(ValueError, match=r"no weight average, this run has optim.ema_decay 0.9"):
        state.load_state_dict(checkpoint.load(path) | {"ema": None}, path)


def test_a_start_from_nothing_in_an_old_folder_leaves_no_old_curve(tmp_path: Path):
    folder = tmp_path / "run"
    train(settings(folder), TrainOptions(max_steps=2))
    for file in (folder / "checkpoints").iterdir():
        file.unlink()

    train(settings(folder), TrainOptions(resume="auto", max_steps=1))

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/lr")] == [1]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EINVAL, errno.ENOSPC])
def test_without_hard_links_checkpoints_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    if number == errno.ENOSPC:  # nothing that a copy would help against
        with pytest.raises(OSError, match=os.strerror(number)):
            checkpoint.save_step(tmp_path, scene_run.checkpoint_content(1), keep=2)
        return
    for step in (1, 2, 3):
        checkpoint.save_step(tmp_path, scene_run.checkpoint_content(step), keep=2)

    found = {path.name: checkpoint.load(path)["step"] for path in (tmp_path / "checkpoints").iterdir()}
    assert found == {"last.pt": 3, "last.pt.previous": 2, "step-0000002.pt": 2, "step-0000003.pt": 3}


def test_overfitting_takes_images_of_every_data_set(tmp_path: Path):
    two = [scene_run.scenes(8, labels=["boxes"]), scene_run.scenes(8, labels=["depth_m"], name="far")]
    run = scene_run.run(tmp_path / "run", ["detection", "depth"], data={"train": two})

    results = train(run, TrainOptions(overfit=3, max_steps=8))

    assert {task: of_task["images"] for task, of_task in results.items()} == {"detection": 3, "depth": 3}
