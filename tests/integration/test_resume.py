"""Resuming: a run cut in two computes what a whole one does, bit for bit, and nothing is overwritten silently."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import scene_run
import torch
from contract import found
from toy_run import losses_of

from visionmtl.balance.base import Balance
from visionmtl.cli import main
from visionmtl.engine import checkpoint
from visionmtl.engine.distributed import Ranks
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import train
from visionmtl.run import Run

CUT = 4  # of 6 steps, 3 to an epoch: in the middle of the second epoch
LIVELY = {  # everything that has a state or draws random numbers; segmentation drops channels by default
    "model": {"encoder": {"drop_path": 0.3}},
    "balance": {"type": "uncertainty"},
    "data": {"train": [scene_run.scenes(12)], "augment": {"flip": 0.5, "zoom": [0.8, 1.2], "brightness": 0.2}},
    "optim": {"clip_norm": 1.0, "schedule": "cosine", "warmup_steps": 2},
    "train": {"epochs": 2, "accumulate": 2, "keep": 2},
}


def settings(output: Path, **changes: Any) -> Run:
    return scene_run.run(output, **scene_run.merged(LIVELY, changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(settings(folder))
    return folder


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that stopped at CUT; not to be changed."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    train(settings(folder), TrainOptions(max_steps=CUT))
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_cut_within_an_epoch_equals_a_whole_one_bit_for_bit(whole: Path, tmp_path: Path, workers: int):
    run = settings(tmp_path / "run", data={"workers": workers})
    train(run, TrainOptions(max_steps=CUT))
    assert scene_run.last_state(tmp_path / "run")["step"] == CUT

    train(run, TrainOptions(resume="auto"))

    assert scene_run.last_state(whole)["step"] == 6
    assert scene_run.differences(scene_run.last_state(tmp_path / "run"), scene_run.last_state(whole)) == []
    assert scene_run.rows(tmp_path / "run") == scene_run.rows(whole)
    assert scene_run.rows(tmp_path / "run", "val") == scene_run.rows(whole, "val")


WITH_STATE = [p for p in found(Balance) if p.values[0]().build({"a": 1.0, "b": 1.0}).state_dict()]


@pytest.mark.slow
@pytest.mark.parametrize("method", WITH_STATE)
def test_every_balancing_method_with_a_state_goes_on_bit_for_bit(method: type[Balance], tmp_path: Path):
    balance = {"type": method().type}
    train(settings(tmp_path / "whole", balance=balance))
    train(settings(tmp_path / "cut", balance=balance), TrainOptions(max_steps=CUT))
    train(settings(tmp_path / "cut", balance=balance), TrainOptions(resume="auto"))

    last, whole = scene_run.last_state(tmp_path / "cut"), scene_run.last_state(tmp_path / "whole")
    assert whole["balancer"] and scene_run.differences(last, whole) == []
    assert scene_run.rows(tmp_path / "cut") == scene_run.rows(tmp_path / "whole")


def test_the_random_layers_of_this_file_are_on(tmp_path: Path):
    run = settings(tmp_path)
    state, batches = scene_run.state(run), scene_run.batches(run)[:1]
    with torch.no_grad():
        state.loss_net.train()
        first, second = (losses_of(state.loss_net, batches[0])["segmentation"] for _ in range(2))
    assert scene_run.differences(first, second), "or the test above proves little"


def test_a_checkpoint_of_any_step_continues_in_another_folder(whole: Path, tmp_path: Path):
    earlier = whole / "checkpoints" / "step-0000003.pt"

    train(settings(tmp_path / "branch"), TrainOptions(resume=str(earlier)))

    assert scene_run.differences(scene_run.last_state(tmp_path / "branch"), scene_run.last_state(whole)) == []
    assert scene_run.rows(tmp_path / "branch") == scene_run.rows(whole)[3:]


def test_a_folder_of_a_run_goes_on_by_its_own_config_wherever_it_was_moved(
    whole: Path, cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    moved = shutil.copytree(cut, tmp_path / "moved")

    assert main(["train", "--resume", str(moved), "train.eval_every_epochs=1"]) == 0
    assert scene_run.differences(scene_run.last_state(moved), scene_run.last_state(whole)) == []

    other = tmp_path / "other"  # and into another folder, from the step that was saved
    assert main(["train", "--resume", str(cut), "--output", str(other), "train.eval_every_epochs=1"]) == 0
    assert scene_run.differences(scene_run.last_state(other), scene_run.last_state(whole)) == []
    assert scene_run.rows(other)[0]["step"] == CUT + 1
    assert main(["train", "--resume", str(cut), "--overfit", "4"]) == 2
    assert "--overfit trains a run of its own" in capsys.readouterr().err

    assert main(["train", "train.epochs=3", "--resume", str(tmp_path)]) == 2
    assert f"error: there is no {tmp_path / 'config.yaml'}, and no config was given; " in capsys.readouterr().err


def test_a_folder_goes_on_from_its_last_checkpoint_not_its_best(cut: Path, whole: Path, tmp_path: Path):
    shutil.copy(whole / "checkpoints" / "step-0000003.pt", cut / "checkpoints" / "best.pt")
    try:
        train(settings(tmp_path / "on"), TrainOptions(resume=str(cut)))
    finally:
        (cut / "checkpoints" / "best.pt").unlink()

    assert scene_run.rows(tmp_path / "on")[0]["step"] == CUT + 1


def test_going_back_in_the_same_folder_drops_what_came_after(whole: Path, tmp_path: Path):
    run = settings(tmp_path / "run")
    train(run, TrainOptions(max_steps=CUT))

    train(run, TrainOptions(resume=str(tmp_path / "run" / "checkpoints" / "step-0000003.pt"), max_steps=5))

    assert scene_run.rows(tmp_path / "run") == scene_run.rows(whole)[:5]
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*.pt")}
    assert "step-0000005.pt" in kept


def test_resuming_without_a_checkpoint_starts_afresh(tmp_path: Path):
    train(settings(tmp_path / "run"), TrainOptions(resume="auto", max_steps=1))

    assert [row["step"] for row in scene_run.rows(tmp_path / "run")] == [1]


def test_resuming_a_finished_run_changes_nothing(whole: Path):
    before = {path: path.read_bytes() for path in [*sorted(whole.rglob("*.pt")), whole / "metrics.jsonl"]}

    train(settings(whole), TrainOptions(resume="auto"))

    assert {path: path.read_bytes() for path in before} == before


def test_a_run_is_never_overwritten(cut: Path):
    with pytest.raises(ValueError, match=r"already holds a run; .* continue it with --resume, choose another"):
        train(settings(cut))


def test_a_new_learning_rate_takes_effect_and_the_moments_stay(cut: Path):
    found = checkpoint.load(cut / "checkpoints" / "last.pt")
    state = scene_run.state(settings(cut, optim={"lr": 5e-4, "betas": [0.8, 0.99]}))

    state.load_state_dict(found, cut)

    assert {(group["base_lr"], group["betas"]) for group in state.optimizer.param_groups} == {(5e-4, (0.8, 0.99))}
    assert scene_run.differences(state.optimizer.state_dict()["state"], found["optimizer"]["state"]) == []


def test_moments_lie_in_memory_as_their_parameters_do(cut: Path):
    """A sharded run stores them contiguous; the fused kernels of a channels_last run would read them shuffled."""
    saved = checkpoint.load(cut / "checkpoints" / "last.pt")
    for moments in saved["optimizer"]["state"].values():
        moments.update({name: value.contiguous() for name, value in moments.items()})
    trainer = scene_run.state(settings(cut, train={"channels_last": True}))

    trainer.load_state_dict(saved, cut)

    pairs = [(p, v) for p, of_one in trainer.optimizer.state.items() for v in of_one.values() if v.shape == p.shape]
    assert any(not parameter.is_contiguous() for parameter, _ in pairs)
    assert all(value.stride() == parameter.stride() for parameter, value in pairs)
    assert scene_run.differences(trainer.optimizer.state_dict()["state"], saved["optimizer"]["state"]) == []


def test_a_resumed_run_logs_its_new_learning_rate(cut: Path, tmp_path: Path):
    run = settings(tmp_path / "run", optim={"lr": 5e-4, "schedule": "constant"})

    train(run, TrainOptions(resume=str(cut / "checkpoints" / "last.pt"), max_steps=CUT + 1))

    assert [row["lr"] for row in scene_run.rows(tmp_path / "run")] == [5e-4]


def test_ranks_drop_different_channels_also_after_resuming(cut: Path):
    run = settings(cut)
    micro_batches = scene_run.batches(run)[:2]
    losses = []
    for rank in (0, 0, 1):
        state = scene_run.state(run, Ranks(rank, 1, torch.device("cpu")))
        state.load_state_dict(checkpoint.load(cut / "checkpoints" / "last.pt"), cut)
        losses.append(state.train_step(micro_batches).losses)

    assert scene_run.differences(losses[0], losses[1]) == []
    assert scene_run.differences(losses[0], losses[2])


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before_and_says_so(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(whole, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    damaged = bytearray((folder / "last.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "last.pt").unlink()
    (folder / "last.pt").write_bytes(damaged)
    for copy in folder.glob("step-*.pt"):
        copy.unlink()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 6, "ki\n')  # as a full disk leaves one
    run = settings(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"last\.pt is damaged .*SHA-256 differs.*; use .*last\.pt\.previous beside it"
    ):
        train(run, TrainOptions(resume=str(folder / "last.pt")))
    capsys.readouterr()

    train(run, TrainOptions(resume="auto"))

    for said in (capsys.readouterr().out, (tmp_path / "run" / "train.log").read_text()):
        said = said.replace("\n", " ")
        assert re.search(
            r"WARNING +\S+last\.pt is damaged .* THE RUN GOES ON FROM \S+last\.pt\.previous, .*at step 3", said
        )
        assert "steps 4 to 6 are trained again" in said and "last.pt is called last.pt.damaged now" in said
        assert "step-0000006.json is removed" in said
    assert scene_run.differences(scene_run.last_state(tmp_path / "run"), scene_run.last_state(whole)) == []
    for kind in ("train", "val"):
        assert scene_run.rows(tmp_path / "run", kind) == scene_run.rows(whole, kind)
    assert (tmp_path / "run" / "eval" / "step-0000006.json").is_file()


def test_weights_of_another_run_start_a_new_one_and_nothing_else_does(cut: Path, tmp_path: Path):
    source = checkpoint.load(cut / "checkpoints" / "last.pt")
    still = settings(tmp_path / "new", optim={"lr": 1e-12, "warmup_steps": None})

    train(still, TrainOptions(init_from=str(cut / "checkpoints" / "last.pt"), max_steps=1))

    found, averaged = scene_run.last_state(tmp_path / "new"), checkpoint.best_weights(source)
    parameters = dict(scene_run.state(still).net.named_parameters())
    for name in parameters:
        torch.testing.assert_close(found["net"][name], averaged[name], rtol=0, atol=1e-9)
    assert found["step"] == 1
    assert "then as below (init)" in (tmp_path / "new" / "train.log").read_text()
    assert found["balancer"]["log_variances"].abs().max() < 1e-9 < source["balancer"]["log_variances"].abs().max()
    assert {float(of_one["step"]) for of_one in found["optimizer"]["state"].values()} == {1.0}

    origin = str(cut / "checkpoints" / "last.pt")
    again = TrainOptions(init_from=origin, resume="auto", max_steps=2)
    train(settings(tmp_path / "new", optim={"lr": 1e-12, "warmup_steps": None}), again)
    assert json.loads((tmp_path / "new" / "env.json").read_text())["init_from"] == origin
    log = (tmp_path / "new" / "train.log").read_text()
    assert log.count("tensors taken") == 1, "a run that goes on has its own weights"


def test_a_checkpoint_of_another_network_is_refused_by_name(cut: Path, tmp_path: Path):
    run = scene_run.run(tmp_path / "run", ["depth"])
    with pytest.raises(ValueError, match=r"does not fit this network: 0 missing, .* unexpected .*decoders\.detec"):
        train(run, TrainOptions(resume=str(cut / "checkpoints" / "last.pt")))


def test_steps_of_another_size_are_noted_with_what_they_do_to_the_position(cut: Path, tmp_path: Path):
    path = str(cut / "checkpoints" / "last.pt")
    run = settings(tmp_path / "run", train={"batch_size": 1, "accumulate": 1})

    train(run, TrainOptions(resume=path, max_steps=CUT + 1))

    log = (tmp_path / "run" / "train.log").read_text()
    assert "a step has 1 images (train.batch_size 1 x accumulate 1 x 1 process(es)) and had " in log
    same = settings(tmp_path / "same")
    train(same, TrainOptions(resume=path, max_steps=CUT + 1))
    assert "a step has" not in (tmp_path / "same" / "train.log").read_text()


def test_the_same_classes_in_another_order_are_refused_by_name(cut: Path, tmp_path: Path):
    saved = checkpoint.load(cut / "checkpoints" / "last.pt")
    space = saved["spaces"]["segmentation"]
    space["classes"] = space["classes"][::-1]
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoint.save(path, saved)

    with pytest.raises(ValueError, match=r"learnt task 'segmentation' with the classes cylinder, .*this run has wall,"):
        train(settings(tmp_path / "run"), TrainOptions(resume=str(path)))


def test_a_finished_run_keeps_the_settings_that_it_was_trained_with(whole: Path, tmp_path: Path):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = (folder / "config.yaml").read_text()

    train(settings(folder, optim={"lr": 0.5}), TrainOptions(resume="auto"))

    assert (folder / "config.yaml").read_text() == before


def test_each_changed_setting_is_said(cut: Path, tmp_path: Path):
    folder = shutil.copytree(cut, tmp_path / "run")

    train(
        settings(folder, seed=5, data={"val": [{**scene_run.scenes(3), "split": "test"}]}), TrainOptions(resume="auto")
    )

    log = (folder / "train.log").read_text()
    assert "changed   seed is 5, and was 0\n" in log and "changed   data.val.0.split is test, and was " in log
    assert "other validation images, or another size: the best so far counts no more" in log
    assert "output" not in "".join(line for line in log.splitlines() if "  changed " in line)


def test_images_that_changed_since_the_checkpoint_are_said_and_end_its_best(tmp_path: Path):
    root = tmp_path / "data"
    for name in ("train/0.png", "train/1.png", "train/2.png", "train/3.png", "val/4.png", "val/5.png"):
        for file, pixels in ((root / name, np.full((64, 64, 3), 90)), (root / f"{name}.png", np.zeros((64, 64)))):
            file.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(file), pixels.astype(np.uint8))
    masks = {"files": "{split}/{stem}.png.png", "classes": ["floor", "wall"]}
    one = {"type": "folder", "root": str(root), "images": "{split}/?.png", "segmentation": masks}
    data = {part: [{**one, "split": part}] for part in ("train", "val")}
    run = scene_run.run(tmp_path / "run", ["segmentation"], data=data, train={"epochs": 3})

    train(run, TrainOptions(max_steps=2))
    for ending in (".png", ".png.png"):
        (root / f"train/3{ending}").rename(root / f"train/9{ending}")
    (root / "val/5.png").unlink()
    train(run, TrainOptions(resume="auto", max_steps=3))

    log = (tmp_path / "run" / "train.log").read_text()
    assert [line.partition("checkpoint, ")[2] for line in log.splitlines() if "since the checkpoint" in line] == [
        "training data changed: folder has other images, or the same in another order; from here on it is not bit for "
        "bit the run it was",
        "validation data changed: folder has 1 images, and had 2; the best so far counts no more",
    ]


def test_the_best_checkpoint_comes_along_into_another_folder(whole: Path, tmp_path: Path):
    saved = scene_run.last_state(whole)

    train(settings(tmp_path / "on"), TrainOptions(resume=str(whole / "checkpoints" / "last.pt")))

    best = checkpoint.load(tmp_path / "on" / "checkpoints" / "best.pt")
    assert best["step"] == checkpoint.load(whole / "checkpoints" / "best.pt")["step"] <= saved["step"]
