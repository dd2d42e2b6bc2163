"""Loader workers that die or hang are named with their file; nothing of them has a name in /dev/shm."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visionmtl.data.watched_loader import HungWorker, LostWorker, WatchedLoader
from visionmtl.data.workers import now_reading, now_resting

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")


class Numbers:
    """Items 0 to 11; one of them does something first."""

    def __init__(self, at: int = -1, does: Callable[..., Any] = os.getpid, *args: Any) -> None:
        self.at, self.does, self.args = at, does, args

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        now_reading(index)
        if index == self.at:
            self.does(*self.args)
        return index


class Large(Numbers):
    """Items that a pipe does not hold."""

    def __getitem__(self, index: int) -> Any:
        now_reading(index)
        return np.full(5_000_000, index, np.uint8)


def place(index: int) -> str:
    return f"image {index} of drawn (/data/{index}.png)"


def same(items: list[Any]) -> list[Any]:
    now_resting()
    return items


def loader(dataset: Any, workers: int = 1, timeout_s: float = 60) -> Any:
    return WatchedLoader(
        dataset, num_workers=workers, place=place, timeout_s=timeout_s, batch_size=2, collate_fn=same,
        persistent_workers=True,
    )  # fmt: skip


def kill_self(number: int) -> None:
    os.kill(os.getpid(), number)


def kill_server() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def gone(pids: list[int], within_s: float = 20) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and any(map(alive, pids)):
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_every_pass_has_all_items_in_order_and_nothing_has_a_name_in_shared_memory():
    batches = loader(Numbers(), workers=2)
    whole = [[index, index + 1] for index in range(0, 12, 2)]
    assert list(batches) == whole
    some = iter(batches)
    assert next(some) == [0, 1]  # and then the pass is left
    del some
    assert list(batches) == whole

    pids = [pid for pid, _, _ in batches._activity.snapshot()]
    assert len(set(pids)) == 2 and all(map(alive, pids))
    for pid in (os.getpid(), *pids):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        named = [line for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")]
        assert not named, f"process {pid} would leave these behind when all are killed"
        held = int(next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigBlk" in x)[7:], 16)
        if pid != os.getpid():
            assert all(held >> number - 1 & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
    batches._iterator._shutdown_workers()
    assert gone(pids)


@pytest.mark.parametrize(
    ("does", "args", "said"),
    [
        (
            kill_self,
            [signal.SIGKILL],
            r"killed by signal 9 \(SIGKILL\) \[memory: .*\] while it read IMAGE.*data.workers",
        ),
        (kill_self, [signal.SIGSEGV], r"signal 11 \(SIGSEGV\) while it read IMAGE.*a decoder crashed.*this one"),
        (os._exit, [3], "ended with exit status 3 while it read IMAGE"),
        pytest.param(  # slow: the next test has to start another server
            kill_server, [], r"(exit status 255|SIGKILL).* while it read IMAGE", marks=pytest.mark.slow
        ),
    ],
)
def test_a_worker_that_dies_is_named_with_its_end_and_its_file(does: Any, args: list[Any], said: str):
    batches, numbers = loader(Numbers(5, does, *args)), []
    with pytest.raises(LostWorker, match=said.replace("IMAGE", r"image 5 of drawn \(/data/5.png\)")) as error:
        numbers.extend(item for batch in batches for item in batch)
    assert "loader worker 1 of 1 (process " in str(error.value) and numbers in ([0, 1], [0, 1, 2, 3])


class Undeliverable(Numbers):
    """Items that no message can hold."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def __getitem__(self, index: int) -> Any:
        now_reading(index)
        return _Undeliverable(self.error)


class _Undeliverable:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), r"no room in shared memory .*size"),
        (OSError(errno.EMFILE, "Too many open files"), "no more files open .*ulimit"),
        (TypeError("cannot pickle a lock"), "could not hand over its batch .*printed"),
    ],
)
def test_a_batch_that_cannot_be_handed_over_is_an_error_and_no_endless_wait(error: Exception, said: str):
    with pytest.raises(LostWorker, match=said):
        list(loader(Undeliverable(error)))


def read_fifo(path: str) -> None:
    Path(path).read_bytes()


@pytest.mark.parametrize("kind", ["fifo", "stopped"])
def test_a_worker_that_hangs_is_named_with_its_file_and_killed(kind: str, tmp_path: Path):
    os.mkfifo(tmp_path / "5.png")
    hangs = {"fifo": (read_fifo, str(tmp_path / "5.png")), "stopped": (kill_self, signal.SIGSTOP)}[kind]
    batches = loader(Numbers(5, *hangs), workers=2, timeout_s=2)
    with pytest.raises(
        HungWorker, match=r"has stood still for 2 s while it read image 5 of drawn \(/data/5.png\)"
    ) as e:
        list(batches)
    assert ("stopped by a signal" in str(e.value)) == (kind == "stopped") and "data.timeout_s allows 2 s" in str(
        e.value
    )
    assert gone([pid for pid, _, _ in batches._activity.snapshot()])


def test_half_a_message_of_a_dead_worker_does_not_hold_the_training():
    batches = loader(Large())
    running = iter(batches)
    next(running)
    ((pid, _, _),) = batches._activity.snapshot()
    deadline = time.monotonic() + 20
    while batches._activity.snapshot()[0][1] >= 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # it writes 10 MB into a pipe of 64 kB, which nobody reads
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(LostWorker, match=r"SIGKILL.* after it had read image \d+ of drawn"):
        list(running)


SCRIPT = """
import torch
from visionmtl.data.watched_loader import WatchedLoader
print("the script runs", flush=True)

class Squares(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, index): return index * index
"""


@pytest.mark.parametrize(
    ("guard", "data", "runs"), [("", "[0, 1, 4, 9]", 1), ('if __name__ == "__main__":', "Squares()", 2)]
)
def test_a_script_runs_again_in_a_worker_only_for_what_it_defines(tmp_path: Path, guard: str, data: str, runs: int):
    lines = ["    " * bool(guard) + f"loader = WatchedLoader({data}, batch_size=2, num_workers=1, place=str)"]
    lines.append("    " * bool(guard) + "print([batch.tolist() for batch in loader])")
    script = tmp_path / "script.py"
    script.write_text("\n".join([SCRIPT, guard, *lines]))

    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100)

    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert told.count("the script runs") == runs and told[-1] == "[[0, 1], [4, 9]]"
