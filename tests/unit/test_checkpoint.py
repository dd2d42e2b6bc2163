"""Checkpoints: a crash never costs the file before, no code runs on loading, and the file alone gives the network."""

import contextlib
import io
import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scene_run
import torch

from visionmtl import run as config
from visionmtl.engine import checkpoint
from visionmtl.engine.checkpoint import open_model
from visionmtl.engine.trainer import Trainer


@pytest.fixture(scope="module")
def state() -> Trainer:
    """A run two steps on, with state in every part."""
    run = scene_run.run(balance={"type": "uncertainty"}, model={"encoder": {"drop_path": 0.1}})
    moving = scene_run.state(run)
    moving.steps_per_epoch = 2
    for batch in scene_run.batches(run)[:2]:
        moving.train_step([batch])
    return moving


def step_of(path: Path) -> int:
    """Of a file that holds no whole checkpoint, which `checkpoint.load` would refuse."""
    return int(torch.load(path, weights_only=True)["step"])


def test_the_file_before_stays_whole_when_writing_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoint.save(path, scene_run.checkpoint_content(1))

    def full_disk(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="no space left"):
            checkpoint.save(path, scene_run.checkpoint_content(2))

    assert checkpoint.load(path)["step"] == 1
    checkpoint.save(path, scene_run.checkpoint_content(3))
    assert checkpoint.load(path)["step"] == 3


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_the_file_before_stays_whole_whichever_call_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    path = tmp_path / "last.pt"
    checkpoint.save(path, scene_run.checkpoint_content(1))

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, call, crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, scene_run.checkpoint_content(2))

    assert step_of(path) == 1


def test_the_one_before_is_kept_beside_it(tmp_path: Path):
    path = tmp_path / "last.pt"
    for step in (1, 2, 3):
        checkpoint.save(path, scene_run.checkpoint_content(step))

    assert step_of(path) == 3
    assert step_of(path.with_name("last.pt.previous")) == 2
    assert {file.name for file in tmp_path.iterdir()} == {"last.pt", "last.pt.previous"}


@pytest.mark.parametrize(("keep", "kept"), [(0, []), (2, [30, 40])])
def test_the_newest_steps_are_kept_by_name(tmp_path: Path, keep: int, kept: list[int]):
    for step in (10, 20, 30, 40):
        checkpoint.save_step(tmp_path, scene_run.checkpoint_content(step), keep)

    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == [f"step-{step:07d}.pt" for step in kept]
    assert [step_of(folder / f"step-{step:07d}.pt") for step in kept] == kept
    assert step_of(folder / "last.pt") == 40


def test_after_going_back_the_newest_is_the_one_written_last(tmp_path: Path):
    for step in (10, 20, 30, 15):
        checkpoint.save_step(tmp_path, scene_run.checkpoint_content(step), keep=2)

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
    assert scene_run.differences({**found}, {"format": checkpoint.FORMAT, **plain}) == []
    assert found["best"] == -math.inf and found["step"] == 2


def test_the_file_alone_gives_the_averaged_network(state: Trainer, tmp_path: Path):
    checkpoint.save(tmp_path / "run" / "checkpoints" / "last.pt", state.state_dict())
    image = scene_run.batches(state.run)[3].image

    opened = open_model(tmp_path / "run" / "checkpoints" / "last.pt")

    assert state.ema is not None
    with torch.no_grad():
        assert scene_run.differences(opened.net(image), state.ema.module(image)) == []
        assert scene_run.differences(opened.net(image), state.net.eval()(image)), (
            "two steps on, weights are not the average"
        )
    assert (opened.run, opened.step, opened.epoch, opened.folder.name) == (state.run, 2, 1, "run")
    assert opened.net.spaces == state.net.spaces
    assert not any(module.training for module in opened.net.modules())


def test_without_an_average_it_gives_the_weights_themselves(state: Trainer, tmp_path: Path):
    checkpoint.save(tmp_path / "a.pt", state.state_dict() | {"ema": None})
    image = scene_run.batches(state.run)[3].image

    with torch.no_grad():
        assert scene_run.differences(open_model(tmp_path / "a.pt").net(image), state.net.eval()(image)) == []


def test_a_checkpoint_with_settings_of_earlier_versions_still_opens(state: Trainer, tmp_path: Path):
    plain = state.state_dict()
    plain["run"]["data"] |= {"decode": "workers", "prefetch": 7}
    plain["run"]["train"]["distributed"] |= {"static_graph": True, "bucket_mb": 5.0}
    checkpoint.save(tmp_path / "a.pt", plain)

    assert open_model(tmp_path / "a.pt").run == state.run


def test_opening_needs_no_weights_from_elsewhere(state: Trainer, tmp_path: Path):
    plain = state.state_dict()
    gone = scene_run.merged(plain["run"], {"model": {"encoder": {"checkpoint": "/gone/since.pth"}}})

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


def zipped(**files: bytes) -> bytes:
    """A zip archive like torch's, with these entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"archive/{name.replace('__', '/').replace('_pkl', '.pkl')}", data)
    return buffer.getvalue()


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_part(place: str, value: Any = None) -> bytes:
    """A whole checkpoint but for one part, which is left out or another."""
    plain = scene_run.checkpoint_content(format=1, ema={"module": {}, "updates": 0})
    *above, part = place.split("/")
    holder = plain
    for key in above:
        holder = holder[key]
    holder.pop(part, None)
    if value is not None:
        holder[part] = value
    return saved(plain)


WHOLE = saved(scene_run.checkpoint_content(format=1, net={"weight": torch.zeros(1000)}))
NO_ARCHIVE = r"bytes\) is no checkpoint, or was cut short; a checkpoint is the zip archive .*; use "
DAMAGED = r"is damaged or no checkpoint of visionmtl \(.*\); tensors and plain data are all that is read; use "
NO_FORMAT = r", and no checkpoint format; a checkpoint of visionmtl has one; use "
FOREIGN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"\(0 " + NO_ARCHIVE),
    "zeros": (bytes(4096), NO_ARCHIVE),
    "text": (b"weights: here\n" * 100, NO_ARCHIVE),
    "json": (b'{"format": 1, "step": 3}', NO_ARCHIVE),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), NO_ARCHIVE),
    "pickle": (pickle.dumps({"format": 1}), NO_ARCHIVE),
    "pickle of torch before 1.6": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + pickle.dumps(1001, 2), NO_ARCHIVE),
    "cut in half": (WHOLE[: len(WHOLE) // 2], NO_ARCHIVE),
    "last bytes lost": (WHOLE[:-30], NO_ARCHIVE),
    "zip without entries": (zipped(), DAMAGED),
    "zip of text": (zipped(readme=b"hello"), DAMAGED),
    "zip, empty pickle": (zipped(data_pkl=b"", version=b"3"), DAMAGED),
    "zip, pickle cut": (zipped(data_pkl=pickle.dumps({"format": 1}, 2)[:-4], version=b"3"), DAMAGED),
    "zip, pickle of noise": (zipped(data_pkl=bytes(range(255, 0, -1)), version=b"3"), DAMAGED),
    "zip, empty stack": (zipped(data_pkl=b"\x80\x02.", version=b"3"), DAMAGED),
    "zip, unknown memo": (zipped(data_pkl=b"\x80\x02h\x05.", version=b"3"), DAMAGED),
    "zip, item of no dict": (zipped(data_pkl=b"\x80\x02K\x01K\x02K\x03s.", version=b"3"), DAMAGED),
    "zip, text that is none": (zipped(data_pkl=b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", version=b"3"), DAMAGED),
    "zip, tensors lost": (
        zipped(data_pkl=zipfile.ZipFile(io.BytesIO(WHOLE)).read("archive/data.pkl"), version=b"3"), DAMAGED
    ),
    "code": (saved({"format": 1, "net": Foreign()}), DAMAGED),
    "tensor": (saved(torch.zeros(2)), r"holds a Tensor" + NO_FORMAT),
    "number": (saved(3), r"holds a int" + NO_FORMAT),
    "list": (saved([1, 2]), r"holds a list" + NO_FORMAT),
    "state dict": (saved({"conv.weight": torch.zeros(2)}), r"holds a dict with conv\.weight" + NO_FORMAT),
    "other project": (saved({"state_dict": {}, "epoch": 3}), r"holds a dict with state_dict, epoch" + NO_FORMAT),
    "empty dict": (saved({}), NO_FORMAT),
    "future": (saved({"format": 99}), r"has checkpoint format 99; this version reads 1"),
    "format alone": (saved({"format": 1}), r"has no 'step'; a checkpoint has a int there; use "),
    "step of text": (with_part("step", "3"), r"has a str as 'step'; a checkpoint has a int there"),
    "run without data": (with_part("run/data"), r"has no 'run/data'; a checkpoint has a dict there"),
    "run is a list": (with_part("run", [1]), r"has a list as 'run'; a checkpoint has a dict there"),
    "ema is a tensor": (with_part("ema", torch.zeros(2)), r"a Tensor as 'ema'; a checkpoint has a dict or None there"),
    "ema without weights": (with_part("ema/module"), r"has other things than tensors by name in 'ema/module'"),
    "weights of text": (with_part("net", {"a": "b"}), r"has other things than tensors by name in 'net'"),
    "optimizer without groups": (with_part("optimizer/param_groups"), r"has no 'optimizer/param_groups'"),
    "label space without classes": (with_part("spaces", {"seg": {"name": "a"}}), r"no label space as 'spaces/seg'"),
    "label space of text": (with_part("spaces", {"seg": "a"}), r"no label space as 'spaces/seg'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_checkpoint_is_refused_with_the_reason(tmp_path: Path, kind: str):
    data, said = FOREIGN[kind]
    (tmp_path / "a.pt").write_bytes(data)

    with pytest.raises(ValueError, match=rf"a\.pt .*{said}" if said[0] != "\\" else rf"a\.pt {said}"):
        checkpoint.load(tmp_path / "a.pt")


def test_bytes_changed_anywhere_in_the_tables_of_a_checkpoint_never_give_a_traceback(tmp_path: Path):
    """Whatever torch raises, the caller sees ValueError, or a checkpoint."""
    rng, path = np.random.default_rng(0), tmp_path / "a.pt"
    for _ in range(200):
        damaged = bytearray(saved(scene_run.checkpoint_content(format=1)))
        for at in rng.integers(0, len(damaged), 3):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            checkpoint.load(path)


def test_the_one_before_is_named_where_it_is_there(tmp_path: Path):
    (tmp_path / "last.pt").write_bytes(b"")
    (tmp_path / "last.pt.previous").write_bytes(WHOLE)

    with pytest.raises(ValueError, match=r"; use .*last\.pt\.previous beside it"):
        checkpoint.load(tmp_path / "last.pt")


def test_a_run_folder_stands_for_its_best_checkpoint_else_its_last(tmp_path: Path):
    folder = tmp_path / "run" / "checkpoints"
    checkpoint.save(tmp_path / "other" / "checkpoints" / "best.pt", scene_run.checkpoint_content(9))
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="is a folder without a checkpoint; a run folder keeps") as error:
        checkpoint.load(tmp_path / "run")
    assert "other" not in str(error.value), "other runs are none of its business"

    checkpoint.save(folder / "last.pt", scene_run.checkpoint_content(2))
    assert checkpoint.load(tmp_path / "run")["step"] == 2
    checkpoint.save(folder / "best.pt", scene_run.checkpoint_content(1))
    assert checkpoint.load(tmp_path / "run")["step"] == 1


def test_a_config_in_place_of_a_checkpoint_is_told_from_a_damaged_one(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("seed: 0\n", encoding="utf-8")

    with pytest.raises(ValueError, match=r"mine\.yaml is a \.yaml file, not a checkpoint; .* or train first"):
        open_model(tmp_path / "mine.yaml")


def test_an_absent_file_lists_what_is_near(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no checkpoint .*last\.pt; .* train first, or correct the path"):
        checkpoint.load(tmp_path / "checkpoints" / "last.pt")

    checkpoint.save(tmp_path / "checkpoints" / "best.pt", scene_run.checkpoint_content(1))
    with pytest.raises(ValueError, match=r"nearby are: .*checkpoints.best\.pt"):
        checkpoint.load(tmp_path / "last.pt")
