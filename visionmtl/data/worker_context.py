"""How loader workers start where there is a fork server: nothing of theirs has a name on disk or outlives the run.

`multiprocessing` gives every lock of a fork server's children a name in /dev/shm, which stays there when the process
group is killed. The queues here lock with pipes, which end with the last process that has them open.
"""

import ctypes
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.spawn
import os
import signal
import sys
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from multiprocessing.reduction import ForkingPickler
from typing import Any

HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that only the training process answers. Ctrl-C and job schedulers send them to the whole process group, but
batches are needed until the training process has saved its state."""


_preparation = multiprocessing.spawn.get_preparation_data


class _Popen(Popen):
    def _launch(self, process_obj: Any) -> None:
        """Without the main module, see `_Process`."""

        def without_main(name: str) -> dict[str, Any]:
            return {key: value for key, value in _preparation(name).items() if not key.startswith("init_main")}

        multiprocessing.spawn.get_preparation_data = without_main
        try:
            super()._launch(process_obj)  # type: ignore[misc]
        finally:
            multiprocessing.spawn.get_preparation_data = _preparation

    def terminate(self) -> None:
        """With a signal that is not held back."""
        self.kill()


class _Process(ForkServerProcess):
    """One that runs the main module again only where something of its own is defined there.

    `multiprocessing` always does: a script that trains without `if __name__ == "__main__":` would train in each worker.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        content = bytes(ForkingPickler.dumps(self.__dict__))
        return _rebuild, (_preparation(self.name) if b"__main__" in content else None, content)

    @staticmethod
    def _Popen(process_obj: Any) -> _Popen:
        return _Popen(process_obj)


def _rebuild(preparation: dict[str, Any] | None, content: bytes) -> _Process:
    """preparation: of the main module, where `content` is in need of it."""
    if preparation is not None:
        multiprocessing.spawn.prepare(preparation)
    process = _Process.__new__(_Process)
    process.__dict__.update(ForkingPickler.loads(content))
    return process


class _Lock:
    """A pipe that holds one byte while nobody has the lock.

    A process that is killed while it has the lock keeps it: what it was writing is only half there, and nobody may
    write behind it.
    """

    def __init__(self, context: "WorkerContext") -> None:
        self._reader, self._writer = context.Pipe(duplex=False)
        self.release()

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """See `threading.Lock.acquire`; where several wait with a timeout, it is the least time."""
        if not self._reader.poll(timeout if block else 0):
            return False
        os.read(self._reader.fileno(), 1)
        return True

    def release(self) -> None:
        """See `threading.Lock.release`."""
        os.write(self._writer.fileno(), b"1")

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self.release()


class _Unbounded:
    """In place of the semaphore that limits how much a queue holds."""

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """There is always room."""
        return True

    def release(self) -> None:
        """Nothing was taken."""


class _Event:
    """What DataLoader needs of `threading.Event`."""

    def __init__(self, context: "WorkerContext") -> None:
        self._flag = context.RawValue(ctypes.c_bool, False)

    def set(self) -> None:
        """See `threading.Event.set`."""
        self._flag.value = True

    def is_set(self) -> bool:
        """See `threading.Event.is_set`."""
        return bool(self._flag.value)


class WorkerContext(ForkServerContext):
    """A `multiprocessing` context with the processes, queues and events that DataLoader asks for."""

    Process = _Process

    def Lock(self) -> Any:
        """Of a queue."""
        return _Lock(self)

    def BoundedSemaphore(self, value: int = 1) -> Any:
        """Of a queue without a limit, which DataLoader's are."""
        return _Unbounded()

    def Event(self) -> Any:
        """Set once."""
        return _Event(self)


def start_server() -> None:
    """Start the fork server, if it does not run yet; it and all its children hold back `HELD_BACK`."""
    multiprocessing.resource_tracker.ensure_running()  # its start would let the first two through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_server() -> None:
    """Let the kernel kill this process when the fork server ends, which ends with the process that it works for.

    So ends a worker that was stopped, or that hangs in a decoder, too; the kernel's part is for Linux only.
    """
    server: Any = multiprocessing.forkserver._forkserver
    if server._forkserver_alive_fd is not None:  # while anybody holds it, the server does not end
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
