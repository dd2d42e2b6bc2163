"""Checkpoints: a crash never costs the file before, no code runs on loading, and the file alone gives the network."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from visionmtl import run as config
from visionmtl.engine import checkpoint
from visionmtl.engine.checkpoint import open_model
from visionmtl.engine.trainer import Trainer


@pytest.fixture(scope="module")
def state() -> Trainer:
    """A run two steps on, with state in every part."""
    run = tiny.run(balance={"type": "uncertainty"}, model={"encoder": {"drop_path": 0.1}})
    moving = tiny.state(run)
    moving.steps_per_epoch = 2
    for batch in tiny.batches(run)[:2]:
        moving.train_step([batch])
    return moving


def step_of(path: Path) -> int:
    """Of a file that holds no whole checkpoint, which `checkpoint.load` would refuse."""
    return int(torch.load(path, weights_only=True)["step"])


def test_the_file_before_stays_whole_when_writing_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoint.save(path, {"step": 1})

    def full_disk(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            checkpoint.save(path, {"step": 2})

    assert step_of(path) == 1
    checkpoint.save(path, {"step": 3})
    assert step_of(path) == 3


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_the_file_before_stays_whole_whichever_call_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, call, crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, {"step": 2})

    assert step_of(path) == 1


def test_the_one_before_is_kept_beside_it(tmp_path: Path):
    path = tmp_path / "last.pt"
    for step in (1, 2, 3):
        checkpoint.save(path, {"step": step})

    assert step_of(path) == 3
    assert step_of(path.with_name("last.pt.previous")) == 2
    assert {file.name for file in tmp_path.iterdir()} == {"last.pt", "last.pt.previous"}


@pytest.mark.parametrize(("keep", "kept"), [(0, []), (2, [30, 40])])
def test_the_newest_steps_are_kept_by_name(tmp_path: Path, keep: int, kept: list[int]):
    for step in (10, 20, 30, 40):
        checkpoint.save_step(tmp_path, {"step": step}, keep)

    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == [f"step-{step:07d}.pt" for step in kept]
    assert [step_of(folder / f"step-{step:07d}.pt") for step in kept] == kept
    assert step_of(folder / "last.pt") == 40


def test_after_going_back_the_newest_is_the_one_written_last(tmp_path: Path):
    for step in (10, 20, 30, 15):
        checkpoint.save_step(tmp_path, {"step": step}, keep=2)

    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-0000015.pt", "step-0000030.pt"]


def not_plain(value: Any, path: str = "") -> list[str]:
    """Where a nested value holds anything but tensors and plain data."""
    if isinstance(value, dict):
        keys = [f"{path}/{key!r}" for key in value if type(key) not in (str, int)]
        return keys + [found for key, inner in value.items() for found in not_plain(inner, f"{path}/{key}")]
    if type(value) in (list, tuple):
        return [found for i, inner in enumerate(value) for found in not_plain(inner, f"{path}/{i}")]
    return [] if type(value) in (torch.Tensor, str, int, float, bool, type(None)) else [f"{path}: {type(value)}"]


def test_a_checkpoint_is_tensors_and_plain_data_and_comes_back_as_it_was(state: Trainer, tmp_path: Path):
    plain = state.state_dict()

    checkpoint.save(tmp_path / "a.pt", plain)

    found = checkpoint.load(tmp_path / "a.pt")
    assert not_plain(found) == []
    assert tiny.differences({**found}, {"format": checkpoint.FORMAT, **plain}) == []
    assert found["best"] == -math.inf and found["step"] == 2


def test_the_file_alone_gives_the_averaged_network(state: Trainer, tmp_path: Path):
    checkpoint.save(tmp_path / "run" / "checkpoints" / "last.pt", state.state_dict())
    image = tiny.batches(state.run)[3].image

    opened = open_model(tmp_path / "run" / "checkpoints" / "last.pt")

    assert state.ema is not None
    with torch.no_grad():
        assert tiny.differences(opened.net(image), state.ema.module(image)) == []
        assert tiny.differences(opened.net(image), state.net.eval()(image)), "two steps on, weights are not the average"
    assert (opened.run, opened.step, opened.epoch, opened.folder.name) == (state.run, 2, 1, "run")
    assert opened.net.spaces == state.net.spaces
    assert not any(module.training for module in opened.net.modules())


def test_without_an_average_it_gives_the_weights_themselves(state: Trainer, tmp_path: Path):
    checkpoint.save(tmp_path / "a.pt", state.state_dict() | {"ema": None})
    image = tiny.batches(state.run)[3].image

    with torch.no_grad():
        assert tiny.differences(open_model(tmp_path / "a.pt").net(image), state.net.eval()(image)) == []


def test_a_checkpoint_of_the_time_of_device_decoding_still_opens(state: Trainer, tmp_path: Path):
    plain = state.state_dict()
    plain["run"]["data"]["decode"] = "workers"
    checkpoint.save(tmp_path / "a.pt", plain)

    assert open_model(tmp_path / "a.pt").run == state.run


def test_opening_needs_no_weights_from_elsewhere(state: Trainer, tmp_path: Path):
    plain = state.state_dict()
    gone = tiny.merged(plain["run"], {"model": {"encoder": {"checkpoint": "/gone/since.pth"}}})

    checkpoint.save(tmp_path / "a.pt", plain | {"run": gone})

    assert open_model(tmp_path / "a.pt").net.encoder_origin == "random"


def test_a_moved_data_folder_moves_the_paths_that_lay_in_it():
    run = {"root": "/old", "train": [{"folder": "/old/nyu/train", "other": "/older/nyu", "size": [1, 2]}]}

    assert config.moved(run, "/old", "/new") == {
        "root": "/new",
        "train": [{"folder": "/new/nyu/train", "other": "/older/nyu", "size": [1, 2]}],
    }


class Foreign:
    """What only a pickle that runs code could bring back."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"a\.pt is damaged .*EOFError.*; name a \.pt file that visionmtl wrote"),
        (b"weights: here\n" * 100, r"a\.pt is damaged or no checkpoint of visionmtl"),
        ({"state_dict": {}}, r"has checkpoint format None; this version reads 1"),
        ({"format": 99}, r"has checkpoint format 99"),
        ([1, 2], r"has checkpoint format None"),
        ({"format": 1, "net": Foreign()}, r"tensors and plain data are all that is read"),
        ({"format": 1, "net": {}}, r"a\.pt lacks run, spaces, ema, step, epoch; .* use one that training wrote"),
        (b"\x80\x02cwhatever\nno\n.", r"a\.pt is damaged or no checkpoint"),
        (b"\x80\x02]q\x00(K\x01", r"a\.pt is damaged or no checkpoint"),
        (b"I1\n.", r"a\.pt is damaged or no checkpoint|format None"),
    ],
    ids=["empty", "text", "other project", "future", "list", "code", "without parts", "global", "cut", "number"],
)
def test_a_foreign_file_is_refused_with_the_reason(tmp_path: Path, content: Any, said: str):
    path = tmp_path / "a.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)

    with pytest.raises(ValueError, match=said):
        checkpoint.load(path)


def test_a_config_in_place_of_a_checkpoint_is_told_from_a_damaged_one(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("seed: 0\n", encoding="utf-8")

    with pytest.raises(ValueError, match=r"mine\.yaml is a \.yaml file, not a checkpoint; .* or train first"):
        open_model(tmp_path / "mine.yaml")


def test_a_run_folder_stands_for_its_best_checkpoint_else_its_last(tmp_path: Path):
    with pytest.raises(ValueError, match=r"is a folder without a checkpoint; .*checkpoints/best\.pt and last\.pt"):
        checkpoint.find(tmp_path)

    for name in ("last.pt", "best.pt"):
        checkpoint.save(tmp_path / "checkpoints" / name, {})
        assert checkpoint.find(tmp_path) == tmp_path / "checkpoints" / name


def test_an_absent_file_lists_what_is_near(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no checkpoint .*last\.pt; .* train first, or correct the path"):
        checkpoint.load(tmp_path / "checkpoints" / "last.pt")

    checkpoint.save(tmp_path / "checkpoints" / "best.pt", {"step": 1})
    with pytest.raises(ValueError, match=r"nearby are: .*checkpoints.best\.pt"):
        checkpoint.load(tmp_path / "last.pt")
