"""Kills trainings with SIGKILL at random moments, resumes them to the end, and compares them with an undisturbed one.

python tests/chaos/kills.py                       all series
python tests/chaos/kills.py write=200 main=0      other numbers of kills
"""

import argparse
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _processes import Child, fork_the_server, shared_files  # isort: skip - it comes first: it sets the path

import scene_run
import torch
from write_folder import FolderData

from visionmtl.engine import checkpoint
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import train

SERIES = {"main": 60, "write": 50, "worker": 30, "group": 40, "rank": 20}
"""Kills of: the training process; the same in a checkpoint write; a loader worker; all processes at once; one of two
ranks under torchrun's agent."""
HANGS_S = 300.0
LIVELY: dict[str, Any] = {  # everything that has a state or draws random numbers
    "model": {"encoder": {"drop_path": 0.3}},
    "balance": {"type": "uncertainty"},
    "data": {"augment": {"flip": 0.5, "zoom": [0.8, 1.2], "brightness": 0.2}, "sampling": {"epoch_images": 16}},
    "optim": {"clip_norm": 1.0, "schedule": "cosine", "warmup_steps": 2},
    "train": {"epochs": 12, "accumulate": 2, "keep": 2, "eval_every_epochs": 4, "checkpoint_every": 3, "loggers": []},
}


def start(folder: Path, files: FolderData, workers: int = 0) -> None:
    """Begin or go on, as a user would who always gives --resume."""
    torch.set_num_threads(1)
    if workers:
        fork_the_server()
    data = {"workers": workers, "train": [files.settings("train")], "val": [files.settings("val")]}
    run = scene_run.run(folder, ["segmentation", "depth"], **scene_run.merged(LIVELY, {"data": data}))
    train(run, TrainOptions(resume="auto", device="cpu"))


def start_slow_writes(folder: Path, files: FolderData, tell: int) -> None:
    """As `start`, with checkpoint writes that take long; `tell` gets a byte when one begins, and when one has ended."""
    pause = random.Random(os.getpid())

    def slowed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(pause.uniform(0, 0.02))
            result = real(*args, **kwargs)
            time.sleep(pause.uniform(0, 0.02))
            return result

        return call

    class SlowFile:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: Any) -> Any:
            middle = len(data) // 2
            self._file.write(data[:middle])
            self._file.flush()
            time.sleep(pause.uniform(0, 0.0005))
            return middle + self._file.write(data[middle:])

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    def told(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            os.write(tell, b"(")
            result = real(*args, **kwargs)
            os.write(tell, b")")
            return result

        return call

    real_save = torch.save
    torch.save = lambda value, file, **more: real_save(
        value, SlowFile(file) if hasattr(file, "write") else file, **more
    )
    for name in ("fsync", "replace", "rename", "link", "unlink"):
        setattr(os, name, slowed(getattr(os, name)))
    checkpoint.save_step = told(checkpoint.save_step)
    start(folder, files)


def start_ranks(folder: Path, files: FolderData, restarts: int) -> None:
    """Two ranks under the agent of torchrun, which starts both anew when one dies."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        start_method="fork", max_restarts=restarts, monitor_interval=0.05,
    )  # fmt: skip
    elastic_launch(config, start)(folder, files)


class Failed(AssertionError):
    """What must not happen."""


class Harness:
    """Counts what was killed and compares what was finished."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.files = FolderData(folder / "data")
        self.random = random.Random(seed)
        self.kills = dict.fromkeys(SERIES, 0)
        self.resumes = self.from_checkpoint = self.trainings = self.starts = 0
        self.left_in_shm: set[str] = set()
        self.whole: dict[int, Path] = {}

    def undisturbed(self, ranks: int) -> Path:
        """The folder of a whole run of 1 or 2 processes."""
        if ranks not in self.whole:
            folder = self.folder / f"whole-{ranks}"
            child = self.child(
                lambda: start(folder, self.files) if ranks == 1 else start_ranks(folder, self.files, 0),
                f"whole-{ranks}",
            )
            if child.wait(HANGS_S) != 0:
                raise Failed(f"the undisturbed run ended with {child.code}\n{child.tail()}")
            self.whole[ranks] = folder
        return self.whole[ranks]

    def child(self, work: Callable[[], None], name: str) -> Child:
        self.starts += 1
        return Child(work, self.folder / f"{name}.txt")

    def compare(self, folder: Path, ranks: int = 1) -> None:
        """The weights and every other state bit for bit, and each row once."""
        whole = self.undisturbed(ranks)
        wrong = scene_run.differences(scene_run.last_state(folder), scene_run.last_state(whole))
        for kind in ("train", "val"):
            if (rows := scene_run.rows(folder, kind)) != (expected := scene_run.rows(whole, kind)):
                steps = [row["step"] for row in rows]
                wrong.append(f"rows of {kind}: {len(rows)} of {len(expected)}, steps {steps}")
        evaluated = [sorted(file.name for file in (each / "eval").iterdir()) for each in (folder, whole)]
        if evaluated[0] != evaluated[1]:
            wrong.append(f"evaluations {evaluated}")
        if wrong:
            raise Failed(f"{folder} differs from the undisturbed run in {wrong[:5]}")
        self.trainings += 1
        self.from_checkpoint += (self.folder / f"{folder.name}.txt").read_text(errors="replace").count("resumed   at")
        shutil.rmtree(folder)

    def series(self, name: str, count: int, attempt: Callable[[Path], bool], ranks: int = 1) -> None:
        """Trainings until `count` kills are done, and the last of them to its end.

        attempt: starts or resumes the training in a folder and kills it; whether it was at its end instead
        """
        number = 0
        while self.kills[name] < count:
            folder = self.folder / f"{name}-{number}"
            while not attempt(folder):
                self.resumes += 1
            self.compare(folder, ranks)
            number += 1

    def ended(self, child: Child, name: str, count: int) -> bool:
        """Wait for the end of a training that nobody kills any more; whether it is at its end."""
        if child.wait(HANGS_S) is None:
            child.kill_group()
            raise Failed(f"{name}: a process still ran after {HANGS_S:g} s\n{child.tail()}")
        if child.code == 0:
            return True
        raise Failed(
            f"{name}: ended with {child.code} without being killed, after {self.kills[name]}\n{child.tail(40)}"
        )

    def let_run(self, child: Child, folder: Path) -> None:
        """A third of the times a random time from the start on, else also some steps, so that trainings get on."""
        rows = folder / "metrics.jsonl"
        known = rows.stat().st_size if rows.exists() else 0
        if self.random.random() < 2 / 3:
            wanted = known + 500 * self.random.randint(1, 12)  # a row has 400 to 600 bytes
            while (rows.stat().st_size if rows.exists() else 0) < wanted and child.wait(0.01) is None:
                pass
        child.wait(self.random.uniform(0, 1.5))

    def main(self, count: int) -> None:
        def attempt(folder: Path) -> bool:
            child = self.child(lambda: start(folder, self.files), folder.name)
            if self.kills["main"] < count:
                self.let_run(child, folder)
            if self.kills["main"] >= count or child.code is not None:
                return self.ended(child, "main", count)
            os.kill(child.pid, signal.SIGKILL)
            child.wait(HANGS_S)
            self.kills["main"] += 1
            return False

        self.series("main", count, attempt)

    def write(self, count: int) -> None:
        def attempt(folder: Path) -> bool:
            told, tell = os.pipe()
            child = self.child(lambda: start_slow_writes(folder, self.files, tell), folder.name)
            os.close(tell)
            number, heard = self.random.randint(1, 3), b""
            while self.kills["write"] < count and heard.count(b"(") < number and child.code is None:
                if select.select([told], [], [], 0.001)[0]:
                    heard += os.read(told, 1)
                child.wait(0)
            if self.kills["write"] >= count or child.code is not None:
                os.close(told)
                return self.ended(child, "write", count)
            time.sleep(self.random.uniform(0, 0.25))
            os.kill(child.pid, signal.SIGKILL)
            child.wait(HANGS_S)
            while more := os.read(told, 100):
                heard += more
            os.close(told)
            self.kills["write" if heard.endswith(b"(") else "main"] += 1
            return False

        self.series("write", count, attempt)

    def with_workers(self, name: str, count: int) -> None:
        def attempt(folder: Path) -> bool:
            child = self.child(lambda: start(folder, self.files, workers=1), folder.name)
            killing = self.kills[name] < count
            while killing and not child.loader_workers() and child.wait(0.01) is None:
                pass
            if killing:
                self.let_run(child, folder)
            if not killing or child.code is not None:
                return self.ended(child, name, count)
            members, workers = child.members(), child.loader_workers()
            named = shared_files(list(members))
            if name == "group":
                child.kill_group()
            elif workers:
                os.kill(self.random.choice(workers), signal.SIGKILL)
            else:
                return self.ended(child, name, count)
            self.kills[name] += 1
            if child.wait(HANGS_S) is None:
                child.kill_group()
                raise Failed(f"{name}: still ran {HANGS_S:g} s after a worker was killed\n{child.tail()}")
            deadline = time.monotonic() + 10
            while (left := child.members()) and time.monotonic() < deadline:
                time.sleep(0.05)
            if left:
                child.kill_group()
                raise Failed(f"{name}: processes {left} outlive the training by 10 s")
            for path in named:
                if os.path.exists(path):
                    self.left_in_shm.add(path)
                    os.unlink(path)
            return child.code == 0

        self.series(name, count, attempt)

    def rank(self, count: int) -> None:
        def attempt(folder: Path) -> bool:
            child = self.child(lambda: start_ranks(folder, self.files, count), folder.name)
            while self.kills["rank"] < count:
                self.let_run(child, folder)
                if child.code is not None:
                    break
                if ranks := [pid for pid, parent in child.members().items() if parent == child.pid]:
                    os.kill(self.random.choice(ranks), signal.SIGKILL)
                    self.kills["rank"] += 1
                    self.resumes += 1
            return self.ended(child, "rank", count)

        self.series("rank", count, attempt, ranks=2)


def main(argv: list[str]) -> int:
    """Run the series; 0 where all held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", metavar="SERIES=KILLS", help=f"of {', '.join(SERIES)}; default: {SERIES}")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    args = parser.parse_args(argv)
    counts = SERIES | {name: int(number) for name, _, number in (text.partition("=") for text in args.counts)}
    folder = args.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)

    harness, started, failure = Harness(folder, args.seed), time.monotonic(), ""
    series = {
        "main": harness.main, "write": harness.write, "worker": lambda count: harness.with_workers("worker", count),
        "group": lambda count: harness.with_workers("group", count), "rank": harness.rank,
    }  # fmt: skip
    try:
        for name, run in series.items():
            run(counts[name])
            print(f"{name}: {harness.kills[name]} kills, {time.monotonic() - started:.0f} s", flush=True)
    except Failed as error:
        failure = str(error)
        print(failure)
    if not failure and not args.folder:
        shutil.rmtree(folder)
    of_each = ", ".join(f"{number} {name}" for name, number in harness.kills.items() if number)
    left = f"{len(harness.left_in_shm)} files left in /dev/shm"
    verdict = (
        f"FAILED, see {folder}: {failure.splitlines()[0]}"
        if failure
        else (f"all {harness.trainings} trainings ended as the undisturbed one bit for bit, each row once")
    )
    print(
        f"kills: {sum(harness.kills.values())} by SIGKILL ({of_each}), {harness.resumes} further starts, "
        f"{harness.from_checkpoint} from a checkpoint; {verdict}; {left}"
    )
    return 1 if failure or harness.left_in_shm else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
