"""Memory that is full, said in one line: what was asked for, what was used, and which setting to change."""

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from visionmtl.data.workers import choose_workers, num_processes_here
from visionmtl.engine.logging import peak_memory_mb
from visionmtl.run import Run

_HOST_TEXTS = ("can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")
"""What torch's CPU allocator (Linux, Windows), the system and C++ say, in lower case."""
_DEVICE_TEXTS = ("cuda error: out of memory", "cublas_status_alloc_failed")
"""What CUDA and cuBLAS say where torch's own allocator was not asked."""


class OutOfMemory(MemoryError):
    """The memory is full: what a setting can cure."""


def is_full(error: BaseException) -> bool:
    """Whether an error says that memory of the host or of the device is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return any(text in str(error).lower() for text in (*_HOST_TEXTS, *_DEVICE_TEXTS))


@contextmanager
def explained(remedies: Sequence[str], where: str) -> Iterator[None]:
    """Turn an error that says that the memory is full into OutOfMemory, which names `remedies` in their order."""
    try:
        yield
    except OutOfMemory:
        raise
    except (torch.OutOfMemoryError, MemoryError, OSError, RuntimeError) as error:
        if not is_full(error):
            raise
        tries = "; ".join(f"{number}. {remedy}" for number, remedy in enumerate(remedies, 1))
        raise OutOfMemory(
            f"{where}: the memory of {_whose(error)} is full ({_asked(error)}; {_peak()}); less must be needed; try in "
            f"this order: {tries}; `visionmtl train CONFIG --dry-run` measures the peak before a run"
        ) from error


def train_remedies(run: Run) -> list[str]:
    """Settings that lower what a training step needs; what each costs is said with it."""
    train, data = run.train, run.data
    remedies = []
    if train.batch_size > 1:
        half = train.batch_size // 2
        factor = -(-train.batch_size // half)
        remedies.append(
            f"train.batch_size={half} train.accumulate={train.accumulate * factor}, which keeps the images of a step"
        )
    remedies.append(f"a data.size below {data.size[0]}x{data.size[1]}")
    if not train.compile:
        remedies.append("train.compile=true, which keeps fewer activations (train.activation_memory says how many)")
    elif train.activation_memory > 0.5:
        remedies.append(f"train.activation_memory=0.5 instead of {train.activation_memory:g}, at the cost of time")
    if train.precision == "fp32":
        remedies.append("train.precision=bf16")
    if run.optim.ema_decay:
        remedies.append("optim.ema_decay=null, one copy of the weights less")
    remedies.append("a smaller model.encoder.name")
    return [*remedies, *_fewer_workers(run)]


def eval_remedies(run: Run, batch_size: int, setting: str) -> list[str]:
    """Settings that lower what an evaluation needs. setting: what its batch size is called there."""
    remedies = [f"{setting} below {batch_size}"] if batch_size > 1 else []
    height, width = run.data.input_size
    remedies.append(f"a data.eval_size below {height}x{width}")
    return [*remedies, *_fewer_workers(run)]


def _fewer_workers(run: Run) -> list[str]:
    workers = choose_workers(run.data.workers, num_processes_here())[0]
    return [f"where the host is full: data.workers={workers // 2} instead of {workers}"] if workers else []


def _whose(error: BaseException) -> str:
    on_device = isinstance(error, torch.OutOfMemoryError) or any(text in str(error).lower() for text in _DEVICE_TEXTS)
    return "the GPU" if on_device else "this machine, or what this process may have of it,"


def _asked(error: BaseException) -> str:
    """How much was asked for, as far as the error says."""
    text = str(error)
    if match := re.search(r"[Tt]ried to allocate (\d+ bytes|[\d.]+ ?[KMGT]?i?B)", text):
        amount = match[1]
        if amount.endswith(" bytes"):
            amount = f"{int(amount.removesuffix(' bytes')) / 2**20:,.0f} MiB"
        return f"{amount} more was asked for"
    return text.partition("\n")[0][:120] or type(error).__name__


def _peak() -> str:
    return f"{peak_memory_mb():,.0f} MiB were in use at most"
