"""Starts the processes of a run as torchrun would, but from a server that has imported everything already."""

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from visionmtl.data.workers import start_method


def run(world: int, work: Callable[..., None], *args: Any, num_groups: int = 1, timeout_s: float = 900) -> None:
    """Let `world` processes call work(groups, *args) to the end; `next(groups)` readies each of `num_groups` groups.

    work: a function of a module, since it is found by its name. What fails or takes longer is an error with its texts.
    """
    ports = free_ports(num_groups)
    context: Any = start_method()
    with tempfile.TemporaryDirectory() as folder:
        texts = [Path(folder) / str(rank) for rank in range(world)]
        processes = [
            context.Process(target=_work, args=(rank, world, ports, texts[rank], work, args)) for rank in range(world)
        ]
        deadline = time.monotonic() + timeout_s
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        said = "\n".join(f"process {rank}: {file.read_text()}" for rank, file in enumerate(texts) if file.exists())
    assert codes == [0] * world, f"exit codes {codes} (None: still ran after {timeout_s} s)\n{said}"


def free_ports(count: int) -> list[int]:
    """All are held until all are found, so that they differ."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _work(
    rank: int, world: int, ports: list[int], text: Path, work: Callable[..., None], args: tuple[Any, ...]
) -> None:
    with text.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    work(_groups(ports), *args)


def _groups(ports: list[int]) -> Iterator[None]:
    for port in ports:
        os.environ["MASTER_PORT"] = str(port)
        yield
