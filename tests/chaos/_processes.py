"""Processes that are started by forking this one, which has imported everything, and what /proc knows of them."""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import forkserver, util
from pathlib import Path
from typing import Any

PROC = Path("/proc")

# scripts have neither the path nor the number of threads that pytest and `make chaos` give
sys.path[:0] = [str(Path(__file__).parents[1] / "fixtures"), str(Path(__file__).parents[2])]
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):
    os.environ[_variable] = "1"


class Child:
    """A process that leads a group of its own; its output goes to a file."""

    def __init__(self, work: Callable[[], None], output: Path) -> None:
        assert len(list((PROC / "self" / "task").iterdir())) == 1, (
            "this process has threads, and a fork would lose them"
        )
        self.output = output
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _run(work, output)
        with suppress(PermissionError):  # the child does the same; whoever is first
            os.setpgid(self.pid, self.pid)

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, negative for a signal; None where it still runs then."""
        deadline = time.monotonic() + timeout_s
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                break
            else:
                time.sleep(0.002)
        return self.code

    def members(self) -> dict[int, int]:
        """Processes of the group that live, with their parents: {pid: parent's pid}."""
        return {pid: parent for pid, parent, group, state in _stats() if group == self.pid and state not in "ZX"}

    def loader_workers(self) -> list[int]:
        """What the fork server of this process started."""
        members = self.members()
        return [pid for pid, parent in members.items() if parent in members and parent != self.pid]

    def kill_group(self) -> None:
        """SIGKILL to every process of the group at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def tail(self, lines: int = 15) -> str:
        """The end of what it wrote."""
        return "\n".join(self.output.read_text(errors="replace").splitlines()[-lines:])


def _run(work: Callable[[], None], output: Path) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        _end_with_harness()
        with output.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - the copy of the harness must end here, whatever happens
        traceback.print_exc()
    finally:
        os._exit(code)


def _end_with_harness() -> None:
    """A harness that is killed leaves no training behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def fork_the_server() -> None:
    """Start this process's server of loader workers as a fork too, for it would import everything anew."""
    spawn = util.spawnv_passfds

    def fork(path: Any, args: Any, kept: Any) -> int:
        code = args[-1] if isinstance(args[-1], str) else args[-1].decode()
        if "forkserver" not in code:
            return spawn(path, args, kept)
        if pid := os.fork():
            return pid
        try:
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                if descriptor > 2 and descriptor not in kept:
                    with suppress(OSError):
                        os.close(descriptor)
            exec(code, {})  # what `multiprocessing` would let a new interpreter run
        finally:
            os._exit(0)

    util.spawnv_passfds = fork
    try:
        forkserver.ensure_running()
    finally:
        util.spawnv_passfds = spawn


def _stats() -> Iterator[tuple[int, int, int, str]]:
    """pid, parent, group and state of every process."""
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            with suppress(OSError, ValueError):
                state, parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
                yield int(folder.name), int(parent), int(group), state


def shared_files(pids: Iterator[int] | list[int]) -> set[str]:
    """Files in /dev/shm that the processes have mapped or opened and that have a name there."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            for line in (PROC / str(pid) / "maps").read_text().splitlines():
                path = line.partition("/dev/shm/")
                if path[1] and not path[2].endswith("(deleted)"):
                    found.add("/dev/shm/" + path[2])
    return {path for path in found if os.path.exists(path)}


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    fields = dict(line.split(":", 1) for line in (PROC / str(pid) / "status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024
