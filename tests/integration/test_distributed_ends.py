"""When a process of a run dies, fails or stays away, the others end soon and say so, and torchrun's restart goes on."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import scene_run
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from visionmtl.data.sampler import BatchSampler
from visionmtl.data.workers import start_method
from visionmtl.engine import distributed
from visionmtl.engine.distributed import LostProcess
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import Trainer, train
from visionmtl.run import Run

pytestmark = pytest.mark.slow

DIES_BEFORE = 4  # of 6 steps, 2 to an epoch: the last checkpoint is that of step 2
ON_CPU = TrainOptions(device="cpu", resume="auto")


def settings(folder: Path, workers: int = 0) -> Run:
    names = ("segmentation", "depth")
    return scene_run.run(folder, names, data={"workers": workers}, train={"epochs": 3, "eval_every_epochs": 3})


def dying(folder: str) -> None:
    """A process started by torchrun's agent: in its first life, number 1 is killed in the middle of an epoch.

    Only there are its images read in another process, which takes seconds to start; they are the same.
    """
    train_step, first_life = Trainer.train_step, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def advance_or_die(state: Trainer, *batches: Any) -> Any:
        if state.state.step == DIES_BEFORE - 1 and first_life:
            workers = [str(child.pid) for child in multiprocessing.active_children()]
            (Path(folder) / f"workers-{state.ranks.rank}").write_text("\n".join(workers))
            if state.ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return train_step(state, *batches)

    Trainer.train_step = advance_or_die  # type: ignore[method-assign]
    train(settings(Path(folder) / "run", workers=int(first_life)), ON_CPU)


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes, one of which was killed; torchrun's agent started both again."""
    folder = tmp_path_factory.mktemp("restarted")
    launched(folder.name, dying, str(folder))
    return folder


def launched(name: str, work: Callable[..., None], *args: Any) -> None:
    """Let torchrun's agent start two processes, once more where one dies."""
    start_method()  # the agent's processes come from the same server
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, start_method="forkserver", monitor_interval=0.1,
        rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", run_id=name, local_addr="127.0.0.1",
    )  # fmt: skip
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        elastic_launch(config, work)(*args)
    finally:
        for number, handler in handlers.items():  # the agent sets its own, and leaves them
            signal.signal(number, handler)


def in_turn(folder: str) -> None:
    """One group after the other, as of a program that trains and then evaluates; one ends in an error of all."""
    said = []
    for number in range(4):
        if os.environ["RANK"] == "0":
            time.sleep(0.5)  # the other one comes first, and finds what the last group left
        try:
            with distributed.group("cpu", timeout_s=20) as ranks:
                said.append(distributed.gather_objects((ranks.rank, number)))
                if number == 1:
                    raise ValueError("of both processes")
        except ValueError as error:
            said.append(str(error))
    (Path(folder) / os.environ["RANK"]).write_text(repr(said))


def test_a_program_joins_one_group_after_the_other(tmp_path: Path):
    launched(tmp_path.name, in_turn, str(tmp_path))
    both = [[(0, number), (1, number)] for number in range(4)]
    expected = repr([*both[:2], "of both processes", *both[2:]])
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == [expected] * 2


def ending(groups: Iterator[None], folder: Path) -> None:
    """What each of two other processes goes through."""
    rank = int(os.environ["RANK"])
    written: list[str] = []
    if rank == 1:
        sys.addaudithook(lambda event, arguments: written.extend(changed(event, arguments, folder)))
    next(groups)
    train(settings(folder / "whole"), ON_CPU)
    (folder.parent / f"written-{rank}").write_text("\n".join(written))

    next(groups)
    if rank == 1:
        BatchSampler.__iter__ = unreadable  # type: ignore[method-assign]
    notes(folder.parent / f"unreadable-{rank}", settings(folder / "unreadable"))

    next(groups)
    try:
        with distributed.group("cpu", timeout_s=5):
            differing(rank, folder.parent / f"differing-{rank}")
            started = time.monotonic()
            while rank and not (folder.parent / "late-0").exists() and time.monotonic() < started + 60:
                time.sleep(0.1)
            distributed.barrier()
    except LostProcess as error:
        (folder.parent / f"late-{rank}").write_text(f"{time.monotonic() - started}\n{error}")


def differing(rank: int, file: Path) -> None:
    distributed.check_same("alike", "what is alike", "do nothing")
    try:
        distributed.check_same((3 - rank, True), "the resumed step", "use one folder")
    except ValueError as error:
        file.write_text(str(error))


def changed(event: str, arguments: Any, folder: Path) -> Iterator[str]:
    """Whatever Python changes in a folder, seen from below everything that could do it."""
    creating = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if creating or event in ("os.mkdir", "os.rename", "os.link", "os.remove", "os.symlink"):
        yield from (f"{event} {path}" for path in map(str, arguments) if path.startswith(str(folder)))


def unreadable(sampler: BatchSampler) -> Iterator[Any]:
    raise ValueError("image frame_17.png is damaged")
    yield


def notes(file: Path, run: Run) -> None:
    started = time.monotonic()
    try:
        train(run, ON_CPU)
    except (ValueError, LostProcess) as error:
        file.write_text(f"{time.monotonic() - started}\n{type(error).__name__} {error}")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ended") / "runs"
    folder.mkdir()
    processes.run(2, ending, folder, num_groups=3)
    return folder


def test_a_run_restarted_after_a_kill_ends_as_one_that_nothing_interrupted(restarted: Path, ended: Path):
    assert scene_run.last_state(restarted / "run")["step"] == 6
    assert scene_run.differences(scene_run.last_state(restarted / "run"), scene_run.last_state(ended / "whole")) == []
    assert scene_run.rows(restarted / "run") == scene_run.rows(ended / "whole")
    assert "resumed   at step 2" in (restarted / "run" / "train.log").read_text()


def test_no_loader_process_outlives_a_killed_run(restarted: Path):
    pids = [int(pid) for rank in (0, 1) for pid in (restarted / f"workers-{rank}").read_text().split()]

    assert len(pids) == 2
    assert not [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    """Also where nobody asks how orphans ended (a container without an init): they stay listed, as state Z."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    if not Path("/proc/self/status").exists():  # not Linux
        return True
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_the_first_process_alone_writes(ended: Path):
    assert (ended / "whole" / "checkpoints" / "last.pt").exists()
    assert (ended.parent / "written-1").read_text() == ""


def test_what_a_second_process_writes_would_be_seen(tmp_path: Path):
    seen: list[str] = []
    opened = (str(tmp_path / "a"), "w", os.O_WRONLY)
    seen += changed("open", opened, tmp_path)
    seen += changed("open", (str(tmp_path / "a"), "r", os.O_RDONLY), tmp_path)

    assert seen == [f"open {tmp_path / 'a'}"]


def test_a_process_that_fails_alone_does_not_leave_the_others_waiting(ended: Path):
    failed, lost = ((ended.parent / f"unreadable-{rank}").read_text() for rank in (1, 0))

    assert "ValueError image frame_17.png is damaged" in failed
    assert "LostProcess process 0 of 2 lost another one" in lost and "start again, a training with --resume" in lost
    assert float(lost.split()[0]) < 60, "it would wait for 600 s for one that stays away"


def test_processes_that_resume_from_unlike_folders_all_say_so(ended: Path):
    for rank in (0, 1):
        text = (ended.parent / f"differing-{rank}").read_text()

        assert text == (
            "the resumed step differs between the processes: (3, True) in process 0, (2, True) in process 1; all need "
            "the same; use one folder"
        )


def test_a_process_that_stays_away_is_given_up_after_the_timeout(ended: Path):
    seconds, text = (ended.parent / "late-0").read_text().split("\n", 1)

    assert 4 < float(seconds) < 60
    assert "kept it waiting for 5 s" in text
