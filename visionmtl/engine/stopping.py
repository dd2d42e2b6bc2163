"""When a training stops before its end or saves within an epoch: signals, times, and how its processes agree."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

from visionmtl.config import durations
from visionmtl.engine.distributed import Ranks, max_over_ranks
from visionmtl.run import Train

ASKS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
"""Signals that ask a training to save and to leave. Job schedulers send USR1 some time before they kill."""
TOGETHER_S = 1.0
"""torchrun hands on the SIGINT of a Ctrl-C that the terminal has sent to its processes already."""
AGREE_EVERY_S = 2.0
"""How often several processes ask each other, about; each time, the host waits for the device once."""


class Interrupted(KeyboardInterrupt):
    """The training was left after Ctrl-C; the text says how it goes on."""


class Terminated(SystemExit):
    """The training was left after SIGTERM or SIGUSR1: the process ends with 128 + the signal's number."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(128 + number)
        self.text = text

    def __str__(self) -> str:
        return self.text


def leave(number: int, text: str) -> BaseException:
    """What is raised to leave a training after a signal, where all is saved."""
    return Interrupted(text) if number == signal.SIGINT else Terminated(number, text)


class StopSignals:
    """Within this context, a signal of ASKS is noted instead of ending the process; a second Ctrl-C ends it at once.

    Until the first step of this start is done there is nothing to save, and the first signal ends the process, too.
    Handlers belong to the main thread; in others, and where a signal was ignored before, nothing changes.
    """

    def __init__(self) -> None:
        self.received = 0
        """The number of the first signal; 0: none came."""
        self.nothing_to_save = True
        self._before: dict[int, Any] = {}
        self._received_at = 0.0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in ASKS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
            if hasattr(signal, "pthread_sigmask"):  # a fork server's process may have inherited that they are blocked
                self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before and hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.nothing_to_save:
            text = f"stopped by {name} before the first step of this start; nothing is lost; start it again"
            _say(text)
            raise leave(number, text)
        passed_s = time.monotonic() - self._received_at
        if self.received and number == signal.SIGINT and passed_s > TOGETHER_S * ("WORLD_SIZE" in os.environ):
            raise Interrupted("stopped at once by a second SIGINT; continue from the last checkpoint with --resume")
        if not self.received:
            self.received, self._received_at = number, time.monotonic()
            _say(f"{name}: saving after this step, then leaving; Ctrl-C stops at once")


def _say(text: str) -> None:
    """On stderr, past Python's buffers: a handler may interrupt a print."""
    os.write(2, f"visionmtl: {text}\n".encode())


class StopAsked(Exception):
    """An evaluation was left because a signal of this number asked for it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(frozen=True, slots=True)
class Border:
    """What all processes do after a step."""

    stop: bool = False
    signal: int = 0  # that asked for the stop; 0: options did
    save: bool = False


class StepBorders:
    """What is to be done after each step, the same on all ranks.

    A single process looks at its clock and its signals after every step. Several ask each other every so many steps
    that AGREE_EVERY_S goes by, for asking costs a wait for the device.
    """

    def __init__(
        self, settings: Train, signals: StopSignals, ranks: Ranks, max_time_s: float | None,
        asked: Callable[[], bool] | None,
    ) -> None:  # fmt: skip
        """max_time_s: from now on; asked: whether somebody else wants the training to stop"""
        every = settings.checkpoint_every
        self._steps = every if isinstance(every, int) else None
        self._seconds = durations.seconds(every) if isinstance(every, str) else None
        self._signals, self._ranks, self._max_time_s, self._asked = signals, ranks, max_time_s, asked
        self._began = self._saved = self._agreed = time.monotonic()
        self._since, self._ask_after = 0, 1  # steps since ranks agreed, and after how many they do so again

    def after(self, step: int) -> Border:
        """To be called by all ranks after each optimiser step."""
        save = self._steps is not None and step % self._steps == 0
        self._since += 1
        if self._ranks.world > 1 and self._since < self._ask_after:
            return Border(save=save)
        now = time.monotonic()
        late = self._max_time_s is not None and now - self._began > self._max_time_s
        stop = late or (self._asked is not None and self._asked())
        save_now = self._seconds is not None and now - self._saved >= self._seconds
        asked = [float(stop), float(self._signals.received), float(save_now), (now - self._agreed) / self._since]
        others_stop, number, due, step_s = max_over_ranks(asked, self._ranks.device)
        self._agreed, self._since = now, 0
        self._ask_after = max(1, min(int(AGREE_EVERY_S / max(step_s, 1e-9)), 10_000))
        return Border(bool(others_stop or number), int(number), save or bool(due))

    def saved(self) -> None:
        """The state was saved."""
        self._saved = time.monotonic()

    def check(self) -> None:
        """To be called by all ranks at one place of an evaluation; raises StopAsked on all if a signal came to any."""
        (number,) = max_over_ranks([float(self._signals.received)], self._ranks.device)
        if number:
            raise StopAsked(int(number))
