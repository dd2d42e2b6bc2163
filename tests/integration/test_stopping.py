"""A training that is asked to stop saves, leaves, and goes on as if nothing had happened; one folder has one run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import scene_run

from visionmtl.engine import checkpoint
from visionmtl.engine import trainer as loop
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.stopping import Interrupted, Terminated
from visionmtl.engine.trainer import Trainer, train
from visionmtl.run import Run, dump

ROOT = Path(__file__).resolve().parents[2]
RESUME = TrainOptions(resume="auto", device="cpu")
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no such signals")


def settings(folder: Path, **changes: Any) -> Run:
    """Two epochs of three steps."""
    two_epochs: dict[str, Any] = {"data": {"train": [scene_run.scenes(6)]}, "train": {"epochs": 2}}
    return scene_run.run(folder, ["depth"], **scene_run.merged(two_epochs, changes))


@pytest.fixture(autouse=True)
def _signals_are_not_ignored() -> Iterator[None]:
    """As they are in a run that a shell has put into the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(settings(folder))
    return folder


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def in_step(step: int, *numbers: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Signals that come while a step is computed."""

    def patch(patched: pytest.MonkeyPatch) -> None:
        train_step = Trainer.train_step

        def interrupted(trainer: Trainer, *batches: Any) -> Any:
            if trainer.state.step == step - 1:
                send(*numbers)
            return train_step(trainer, *batches)

        patched.setattr(Trainer, "train_step", interrupted)

    return patch


def in_save(patched: pytest.MonkeyPatch) -> None:
    atomic_write = checkpoint.save

    def interrupted(*arguments: Any) -> None:
        send(signal.SIGTERM)
        atomic_write(*arguments)

    patched.setattr(checkpoint, "save", interrupted)


def in_evaluation(patched: pytest.MonkeyPatch) -> None:
    evaluate = loop.evaluate

    def interrupted(*arguments: Any, on_image: Any, **rest: Any) -> Any:
        return evaluate(*arguments, on_image=lambda *image: send(signal.SIGTERM), **rest)

    patched.setattr(loop, "evaluate", interrupted)


@pytest.mark.parametrize(
    ("where", "step", "status"),
    [
        (in_step(2, signal.SIGTERM), 2, 143),
        (in_step(5, signal.SIGUSR1), 5, 138),
        (in_save, 3, 143),
        (in_evaluation, 3, 143),
    ],
    ids=["middle", "USR1", "checkpoint", "evaluation"],
)
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, step: int, status: int
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        where(patched)
        with pytest.raises(Terminated, match=f"after step {step} of 6; continue with --resume") as left:
            train(settings(folder))
    assert left.value.code == status
    assert scene_run.last_state(folder)["step"] == step
    assert "continue with --resume" in (folder / "train.log").read_text()
    assert not (folder / ".lock").exists()

    train(settings(folder), RESUME)

    assert scene_run.differences(scene_run.last_state(folder), scene_run.last_state(whole)) == []
    for kind in ("train", "val"):
        assert scene_run.rows(folder, kind) == scene_run.rows(whole, kind)


def test_a_signal_before_the_first_step_leaves_at_once_and_blocks_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        in_step(1, signal.SIGTERM)(patched)
        with pytest.raises(Terminated, match="before the first step of this start; nothing is lost"):
            train(settings(folder))
    assert "visionmtl: stopped by SIGTERM before the first step" in capfd.readouterr().err

    train(settings(folder), TrainOptions(max_steps=1))

    assert scene_run.last_state(folder)["step"] == 1


def test_ctrl_c_saves_and_a_second_one_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patched:
        in_step(2, signal.SIGINT)(patched)
        with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT after step 2 of 6"):
            train(settings(tmp_path / "once"))
    assert scene_run.last_state(tmp_path / "once")["step"] == 2

    with monkeypatch.context() as patched:
        in_step(2, signal.SIGINT, signal.SIGINT)(patched)
        with pytest.raises(Interrupted, match="stopped at once by a second SIGINT"):
            train(settings(tmp_path / "twice"))
    assert not (tmp_path / "twice" / "checkpoints").exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_checkpoints_within_an_epoch_by_steps_and_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved: list[tuple[int, int]] = []
    monkeypatch.setattr(checkpoint, "save_step", lambda folder, state, keep: saved.append((state["step"], keep)))
    for every, expected in {
        2: [(2, 1), (3, 1), (4, 1), (6, 1)],
        "0.0001s": [(1, 0), (2, 0), (3, 1), (4, 0), (5, 0), (6, 1)],  # named only at the ends of epochs
        None: [(3, 1), (6, 1)],
    }.items():
        saved.clear()
        train(settings(tmp_path / str(every), train={"checkpoint_every": every}))
        assert saved == expected, every


@pytest.mark.parametrize("every", ["10", "0s", "10 minutes", 0, True, 1.5])
def test_how_often_is_a_number_of_steps_or_a_time_with_its_unit(every: Any):
    with pytest.raises(ValueError, match="checkpoint_every"):
        settings(Path("unused"), train={"checkpoint_every": every})


def test_a_second_run_in_the_same_folder_is_refused_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, refused = tmp_path / "run", []
    train_step = Trainer.train_step

    def meanwhile(trainer: Trainer, *batches: Any) -> Any:
        if trainer.state.step == 2:
            before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            with pytest.raises(
                ValueError, match=rf"run is in use: process {os.getpid()} on .* trains there; "
            ) as error:
                train(settings(folder), RESUME)
            refused.append(str(error.value))
            assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        return train_step(trainer, *batches)

    monkeypatch.setattr(Trainer, "train_step", meanwhile)
    train(settings(folder), TrainOptions(max_steps=3))

    assert len(refused) == 1 and "\n" not in refused[0]
    assert len(scene_run.rows(folder)) == 3


def test_a_lock_left_by_a_killed_run_holds_nobody_up_and_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import fcntl

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").write_text('{"pid": 1, "host": "gone", "since": "2020-01-01 00:00:00"}')
    train(settings(folder), TrainOptions(max_steps=1))

    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    train(settings(folder), TrainOptions(resume="auto", max_steps=2))
    assert "run cannot be locked (No locks available): nothing keeps a second" in (folder / "train.log").read_text()


def test_another_batch_size_goes_on_behind_the_images_that_were_seen(tmp_path: Path):
    folder = tmp_path / "run"
    train(settings(folder, train={"checkpoint_every": 1}), TrainOptions(max_steps=2))

    train(settings(folder, train={"batch_size": 1}), RESUME)

    assert [row["epoch"] for row in scene_run.rows(folder)] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert [row["step"] for row in scene_run.rows(folder, "val")] == [4, 10]
    log = (folder / "train.log").read_text()
    assert "goes on in epoch 0 behind the 4 images of it that were seen" in log and "not bit for bit" in log


@pytest.mark.slow
def test_the_command_line_ends_with_the_status_of_the_signal(tmp_path: Path):
    file, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    file.write_text(dump(settings(folder, data={"workers": 1}, train={"epochs": 2000, "eval_every_epochs": 2000})))
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(file), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    rows = folder / "metrics.jsonl"
    while process.poll() is None and not (rows.is_file() and '"step": 2' in rows.read_text()):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers, too
    out, err = process.communicate(timeout=120)

    assert process.returncode == 130, err
    assert "Traceback" not in out + err
    assert "stopped by SIGINT after step" in out and "--resume" in out
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["step"] == scene_run.rows(folder)[-1]["step"]


def part(groups: Iterator[None], folder: Path) -> None:
    """What each of two processes does; the signal comes to the second one alone."""
    next(groups)
    if os.environ["RANK"] == "1":
        in_step(4, signal.SIGTERM)(pytest.MonkeyPatch())
    try:
        train(settings(folder, train={"batch_size": 1}), RESUME)
    except Terminated as left:
        (folder.parent / f"status-{os.environ['RANK']}").write_text(str(left.code))


@pytest.mark.slow
def test_one_two_and_one_processes_and_a_signal_to_one_of_them(whole: Path, tmp_path: Path):
    folder = tmp_path / "run"
    train(settings(folder), TrainOptions(max_steps=2))

    processes.run(2, part, folder)
    stopped = scene_run.last_state(folder)["step"]
    assert [(tmp_path / f"status-{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    train(settings(folder), RESUME)

    assert stopped in (4, 5, 6)
    log = (folder / "train.log").read_text()
    assert "a step has 2 images (train.batch_size 1 x accumulate 1 x 2 process(es)) and had 2 (" in log
    assert [row["epoch"] for row in scene_run.rows(folder)] == [0, 0, 0, 1, 1, 1]
    ours, undisturbed = scene_run.rows(folder), scene_run.rows(whole)
    for row, other in zip(ours, undisturbed, strict=True):
        assert row["lr"] == other["lr"]
        assert row["losses"]["depth"]["silog"] == pytest.approx(other["losses"]["depth"]["silog"], rel=0.2)
