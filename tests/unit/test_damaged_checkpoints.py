"""Checkpoints that disks, kills and full disks damaged: refused or gone back from, never read as other numbers."""

import contextlib
import errno
import io
import json
import os
import resource
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scene_run
import torch
from damage import damaged

from visionmtl.engine import checkpoint
from visionmtl.engine.checkpoint import Damaged, NotFinite
from visionmtl.io import atomic
from visionmtl.io.atomic import DiskFull
from visionmtl.io.tensor_files import write_archive


def content(step: int, **changes: Any) -> dict[str, Any]:
    """A checkpoint with some weights and moments, which know their step."""
    noise = torch.randn(3000, generator=torch.Generator().manual_seed(step))
    moments = {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": noise * 2}}, "param_groups": []}
    return scene_run.checkpoint_content(step, **{"net": {"conv.weight": noise}, "optimizer": moments} | changes)


def format_1(state: dict[str, Any]) -> bytes:
    """As versions before the digest wrote it."""
    buffer = io.BytesIO()
    torch.save({"format": 1, **state}, buffer)
    return buffer.getvalue()


# ---- damage ----


@pytest.mark.parametrize("version", [1, 2])
def test_a_damaged_checkpoint_is_refused_and_never_read_as_other_numbers(tmp_path: Path, version: int):
    rng, path = np.random.default_rng(0), tmp_path / "last.pt"
    checkpoint.save(path, content(5))
    if version == 1:
        path.write_bytes(format_1(content(5)))
    whole, expected = path.read_bytes(), checkpoint.load(path)
    num_read = 0
    for _ in range(60):
        path.write_bytes(damaged(whole, rng))
        try:
            state = checkpoint.load(path)
        except ValueError as error:
            assert str(error).count(";") >= 2, "an error has three parts"  # noqa: PT017
        else:  # without a digest, bytes that nothing depends on may have changed
            assert version == 1 and scene_run.differences(state, expected) == []
            num_read += 1
    assert num_read < 10


def test_each_bit_of_a_small_checkpoint_counts(tmp_path: Path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, scene_run.checkpoint_content(5))
    whole = path.read_bytes()
    for place in range(0, 8 * len(whole), 61):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"last\.pt "):
            checkpoint.load(path)


def test_the_digest_is_the_comment_of_an_archive_that_any_tool_reads(tmp_path: Path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, content(5))
    with zipfile.ZipFile(path) as archive:
        assert archive.comment.startswith(b"visionmtl sha256 ") and archive.testzip() is None
    assert torch.load(path, weights_only=True)["step"] == 5


def test_format_1_is_read_and_becomes_the_present_one(tmp_path: Path):
    path = tmp_path / "last.pt"
    path.write_bytes(format_1(content(5)))
    state = checkpoint.load(path)
    assert (state["format"], state["step"], state["curriculum"]) == (checkpoint.FORMAT, 5, {})
    checkpoint.save(path, state)
    assert scene_run.differences(checkpoint.load(path), state) == []


def test_a_checkpoint_that_lost_its_digest_is_not_trusted(tmp_path: Path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, content(5))
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b""
    with pytest.raises(Damaged, match=r"has lost the digest at its end; files of format 2 have one; use "):
        checkpoint.load(path)


def test_a_compressed_archive_is_refused_before_it_grows(tmp_path: Path):
    path = tmp_path / "last.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(Damaged, match=r"archive/data\.pkl in it is compressed"):
        checkpoint.load(path)


def test_the_error_names_the_checkpoints_beside_it(tmp_path: Path):
    for step in (1, 2, 3):
        checkpoint.save_step(tmp_path, content(step), keep=2)
    checkpoint.save(tmp_path / "checkpoints" / "best.pt", content(2))
    (tmp_path / "checkpoints" / "best.pt").write_bytes(b"lost")
    with pytest.raises(Damaged, match=r"; use .*last\.pt beside it, or last\.pt\.previous, step-0000003\.pt, step-0"):
        checkpoint.load(tmp_path)


# ---- going back to an earlier one ----


@pytest.fixture
def three_steps(tmp_path: Path) -> Path:
    """checkpoints/last.pt of step 30 (as is step-30.pt), its previous of step 20, and step-10.pt."""
    for step in (10, 20, 30):
        checkpoint.save_step(tmp_path, content(step), keep=3)
    folder = tmp_path / "checkpoints"
    (folder / "step-0000020.pt").unlink()
    rows = [{"kind": "train", "step": step} for step in range(0, 36, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr')
    return folder


def spoil(file: Path) -> None:
    """One bit of a weight, in a file of its own; the same bytes under another name stay whole."""
    changed = bytearray(file.read_bytes())
    changed[len(changed) // 2] ^= 1
    file.unlink()
    file.write_bytes(changed)


@pytest.mark.parametrize(
    ("spoilt", "step", "lost"),
    [
        (["last.pt"], 20, "steps 21 to 35"),
        (["last.pt", "last.pt.previous", "step-0000030.pt"], 10, "steps 11 to 35"),
        (["last.pt", "last.pt.previous"], 30, "steps 31 to 35"),
    ],
)
def test_the_newest_whole_one_is_taken_with_a_loud_warning(three_steps: Path, spoilt: list[str], step: int, lost: str):
    for name in spoilt:
        spoil(three_steps / name)
    last = three_steps / "last.pt"

    assert checkpoint.find_resumed(three_steps.parent, "auto") == last
    resumed = checkpoint.load_resumed(last, fall_back=True)

    assert resumed.state["step"] == step and resumed.damaged == last
    assert resumed.warning is not None and f"THE RUN GOES ON FROM {resumed.path}" in resumed.warning
    assert all(str(three_steps / name) in resumed.warning for name in spoilt) and lost in resumed.warning


def test_a_missing_last_one_is_gone_back_from_as_well(three_steps: Path):
    (three_steps / "last.pt").unlink()
    assert checkpoint.find_resumed(three_steps.parent, "auto") == three_steps / "last.pt"
    resumed = checkpoint.load_resumed(three_steps / "last.pt", fall_back=True)
    assert resumed.state["step"] == 20 and "last.pt is missing. THE RUN GOES ON FROM" in str(resumed.warning)


def test_where_none_is_whole_all_that_were_tried_are_named(three_steps: Path):
    files = list(three_steps.iterdir())
    for file in files:
        spoil(file)
    with pytest.raises(ValueError, match=r"^no checkpoint in .* can be read: .*; copy one .*--resume PATH") as error:
        checkpoint.load_resumed(three_steps / "last.pt", fall_back=True)
    assert len(files) == 4 and all(str(file) in str(error.value) for file in files)


def test_a_file_that_is_named_is_never_exchanged_for_another(three_steps: Path):
    spoil(three_steps / "last.pt")
    with pytest.raises(Damaged, match=r"SHA-256 differs.*; use .*last\.pt\.previous beside it"):
        checkpoint.load_resumed(three_steps / "last.pt", fall_back=False)


def test_another_format_is_no_damage(three_steps: Path):
    write_archive(three_steps / "last.pt", {"format": 99})
    with pytest.raises(ValueError, match="has checkpoint format 99; this version reads 1 and 2"):
        checkpoint.load_resumed(three_steps / "last.pt", fall_back=True)


def test_what_later_steps_and_killed_processes_left_is_removed_before_a_run_goes_on(three_steps: Path):
    run = three_steps.parent
    spoil(three_steps / "last.pt")
    (run / "eval").mkdir()
    for name in ("step-0000020.json", "step-0000030.json", "before.json"):
        (run / "eval" / name).write_text("{}")
    (three_steps / "best.pt.writing").write_bytes(b"half")
    (run / "my.writings").write_bytes(b"a user's")

    notes = checkpoint.clean_run(run, checkpoint.load_resumed(three_steps / "last.pt", fall_back=True))

    assert sorted(file.name for file in (run / "eval").iterdir()) == ["before.json", "step-0000020.json"]
    assert not (three_steps / "best.pt.writing").exists() and (run / "my.writings").exists()
    assert (three_steps / "last.pt.damaged").is_file() and not (three_steps / "last.pt").exists()
    assert "last.pt.damaged" in notes[0] and "step-0000030.json is removed" in notes[1]
    checkpoint.save(three_steps / "last.pt", content(25))
    assert checkpoint.load(three_steps / "last.pt.previous")["step"] == 20, "the whole one stays"


# ---- numbers that are not finite ----


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path):
    path = tmp_path / "last.pt"
    bad = content(8)
    bad["net"]["conv.weight"][3:5] = torch.tensor([torch.nan, torch.inf])
    bad["optimizer"]["state"][0]["exp_avg"][0] = -torch.inf
    with pytest.raises(
        NotFinite, match=r"net/conv.weight \(2\), optimizer/.*exp_avg \(1\); .* there is no last.pt yet"
    ):
        checkpoint.save(path, bad)
    assert list(tmp_path.iterdir()) == []

    checkpoint.save(path, content(7))
    with pytest.raises(
        NotFinite, match=r"at step 8 3 numbers .*last\.pt still is that of step 7; .*--resume and a low"
    ):
        checkpoint.save(path, bad)
    with pytest.raises(NotFinite, match=r"ema/module/a \(1\)"):
        checkpoint.save(path, content(8, ema={"module": {"a": torch.tensor([torch.nan])}, "updates": 1}))
    assert checkpoint.load(path)["step"] == 7

    checkpoint.save(path, content(9, net={"large": torch.full((4,), 1e38), "half": torch.full((9,), 6e4).half()}))


def test_a_file_with_such_numbers_points_at_the_one_before(tmp_path: Path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, content(1))
    checkpoint.save(path, content(2))
    path.write_bytes(format_1(content(3, net={"a": torch.tensor([1.0, torch.nan])})))
    with pytest.raises(Damaged, match=r"1 numbers are not finite, in net/a \(1\); .*; use .*last\.pt\.previous beside"):
        checkpoint.load(path)
    assert checkpoint.load_resumed(path, fall_back=True).state["step"] == 1


# ---- no room ----


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing beyond so many bytes fails, as on a full disk; Python ignores the signal that comes with it."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 100, 9000, 20_000])
def test_no_room_leaves_the_old_ones_whole_and_nothing_half(tmp_path: Path, limit: int):
    for step in (1, 2):
        checkpoint.save_step(tmp_path, content(step), keep=1)
    folder = tmp_path / "checkpoints"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    said = (
        r"last\.pt cannot be written: File too large after [\d,]+ bytes; the one that was there before is whole; about "
    )
    with largest_file(limit), pytest.raises(DiskFull, match=said + r"24,004 bytes are needed, .*; make room"):
        checkpoint.save_step(tmp_path, content(3), keep=1)

    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_a_disk_that_is_full_at_the_end_leaves_the_old_ones_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    for step in (1, 2):
        checkpoint.save(tmp_path / "last.pt", content(step))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(
            DiskFull, match=r"last\.pt cannot be written: No space left on device after 2\d,\d{3} bytes"
        ):
            checkpoint.save(tmp_path / "last.pt", content(3))

    assert {file.name for file in tmp_path.iterdir()} <= {"last.pt", "last.pt.previous"}
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 2


# ---- killed at any moment ----

STAGES = [(os, name) for name in ("open", "fsync", "link", "unlink", "replace", "mkdir")]


def count_or_kill(monkeypatch: pytest.MonkeyPatch, before: int | None) -> list[str]:
    """Note every file operation of writing a checkpoint; end the process before the one of this number."""
    done: list[str] = []

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            if len(done) == before:
                os._exit(77)
            done.append(name)
            return call(*args, **options)

        return operation

    for module, name in STAGES:
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    monkeypatch.setattr(atomic.fcntl, "flock", watched("flock", atomic.fcntl.flock))

    class Writing(io.FileIO):
        """Unbuffered, so that half of a file is on the disk when its writer ends."""

        def write(self, data: Any) -> Any:
            return watched("write", super().write)(data)

        def flush(self) -> None:
            watched("flush", super().flush)()

    opened = Path.open

    def open_path(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return Writing(path, "w") if mode == "wb" else opened(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", open_path)
    return done


def test_whenever_its_writer_is_killed_a_checkpoint_loads(tmp_path: Path):
    """Ended before every single file operation of the third checkpoint, which the next start writes again."""
    for step in (1, 2):
        checkpoint.save_step(tmp_path / "whole", content(step), keep=2)
    with pytest.MonkeyPatch.context() as patch:
        operations = count_or_kill(patch, None)
        checkpoint.save_step(tmp_path / "whole", content(3), keep=2)
    # before Python 3.11 pathlib calls the system by references of its own
    seen = {"open", "unlink"} if sys.version_info >= (3, 11) else set()
    assert seen | {"flock", "write", "flush", "fsync", "link", "replace"} <= set(operations)

    for before, operation in enumerate(operations):
        run = tmp_path / f"killed-{before}"
        for step in (1, 2):
            checkpoint.save_step(run, content(step), keep=2)
        if (child := os.fork()) == 0:
            with pytest.MonkeyPatch.context() as patch:
                count_or_kill(patch, before)
                checkpoint.save_step(run, content(3), keep=2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77

        last = run / "checkpoints" / "last.pt"
        resumed = checkpoint.load_resumed(last, fall_back=True)
        stage = f"killed before operation {before}, {operation}"
        replaced = "replace" in operations[:before]
        assert resumed.path == last and resumed.warning is None, stage
        assert scene_run.differences(resumed.state["net"], content(3 if replaced else 2)["net"]) == [], stage

        checkpoint.save_step(run, content(4), keep=2)
        names = {file.name for file in last.parent.iterdir()}
        assert not [name for name in names if "writing" in name], f"{stage}: what was left is used again"
        assert checkpoint.load(last)["step"] == 4 and checkpoint.load(last.with_name("last.pt.previous"))["step"] >= 2


def test_a_pickle_that_claims_more_numbers_than_there_are_is_refused(tmp_path: Path):
    """Reading past the end of a tensor's bytes would be a crash, or somebody's memory."""
    path = tmp_path / "last.pt"
    path.write_bytes(format_1(content(1)))
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    fewer, more = (struct.pack("<BH", ord("M"), count) for count in (3000, 30000))
    assert fewer in parts[name]
    parts[name] = parts[name].replace(fewer, more)
    with zipfile.ZipFile(path, "w") as archive:
        for part, data in parts.items():
            archive.writestr(part, data)
    with pytest.raises(ValueError, match=r"last\.pt "):
        checkpoint.load(path)
