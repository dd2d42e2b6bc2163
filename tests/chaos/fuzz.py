"""Damages files of every reader and looks at what reading them does: it reads them rightly, or refuses them by name.

    python tests/chaos/fuzz.py [--count 30000] [--seed 0] [--reader NAME] [--keep DIR]

Inputs are read in forked processes, a few hundred each, so that a hang (over 5 s), a death and a large allocation are
seen. What is neither read rightly nor refused by the project's own error in three parts, which names the file, is a
fault. The last line sums up; the exit code is 1 where there is a fault.
"""

import argparse
import contextlib
import gc
import io
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):
    os.environ.setdefault(variable, "1")
for variable in ("HF_HUB_OFFLINE", "NO_ALBUMENTATIONS_UPDATE"):
    os.environ.setdefault(variable, "1")

from _mutations import TOUCH, mutate  # noqa: E402
from _readers import Reader, readers  # noqa: E402

TIME_LIMIT_S = 5.0
MEMORY_LIMIT = 3 << 30
"""Bytes of address space above what the process has before it reads."""
_PER_PROCESS = 200
READ, REFUSED = "read", "refused"


@dataclass
class Tally:
    """What came of the inputs of one reader."""

    reader: Reader
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)
    """Number of the input, and what happened."""

    @property
    def total(self) -> int:
        return sum(self.counts.values()) + len(self.faults)


def fuzz(reader: Reader, count: int, seed: int, keep: Path | None = None) -> Tally:
    """Read `count` damaged versions of the reader's files. keep: a folder for the inputs that are faults."""
    tally = Tally(reader)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        sound = Path(place) / "sound"
        sound.mkdir()
        reader.write(sound)
        reader.read(sound)  # what is not damaged is read
        touched = Path(place) / "touched"
        first = 0
        while first < count:
            first = _run_process(reader, Path(place), range(first, min(count, first + _PER_PROCESS)), seed, tally)
        if touched.exists():
            tally.faults.append((-1, "a payload was executed"))
        for number, text in tally.faults if keep else ():
            assert keep is not None
            _keep(reader, sound, seed, number, text, keep)
    return tally


def damaged(reader: Reader, sound: Path, seed: int, number: int) -> tuple[str, bytes]:
    """The file that input `number` damages, and its content."""
    rng = random.Random(f"{reader.name}/{seed}/{number}")
    name = reader.files[number % len(reader.files)]
    other = sound / reader.files[rng.randrange(len(reader.files))]
    content = mutate((sound / name).read_bytes(), name, rng, other.read_bytes())
    return name, content.replace(TOUCH.encode(), str(sound.parent / "touched").encode())


def _run_process(reader: Reader, place: Path, numbers: range, seed: int, tally: Tally) -> int:
    """Read inputs in a forked process until it is done or dies; returns the number to go on with."""
    shutil.rmtree(place / "work", ignore_errors=True)
    shutil.copytree(place / "sound", place / "work")
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _read_all(reader, place, numbers, seed, send)
    os.close(send)
    at = numbers.start
    with os.fdopen(receive, "rb", buffering=0) as pipe:
        buffer = b""
        while at < numbers.stop:
            # the first input waits for what is imported on first use, too
            ready, _, _ = select.select([pipe], [], [], TIME_LIMIT_S + (10 if at == numbers.start else 0))
            received = pipe.read(1 << 16) if ready else b""
            if not received:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                how = f"no answer in {TIME_LIMIT_S:g} s" if not ready else _death(status)
                tally.faults.append((at, how))
                return at + 1
            buffer += received
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                verdict, _, text = line.decode().partition("\t")
                if verdict in (READ, REFUSED):
                    tally.counts[verdict] += 1
                else:
                    tally.faults.append((at, text))
                at += 1
    os.waitpid(child, 0)
    return at


def _death(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"the process died of {signal.Signals(os.WTERMSIG(status)).name}"
    return f"the process ended with {os.waitstatus_to_exitcode(status)}"


def _read_all(reader: Reader, place: Path, numbers: range, seed: int, send: int) -> None:
    """The forked process: one line a verdict."""
    try:
        gc.freeze()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, used + MEMORY_LIMIT))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        warnings.simplefilter("ignore")
        os.chdir(place)
        for number in numbers:
            verdict, text = _verdict(reader, place, seed, number)
            os.write(send, f"{verdict}\t{' '.join(text.split())[:400]}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(0)


def _verdict(reader: Reader, place: Path, seed: int, number: int) -> tuple[str, str]:
    name, content = damaged(reader, place / "sound", seed, number)
    file = place / "work" / name
    file.write_bytes(content)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            reader.read(place / "work")
        return READ, ""
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        return _judge(error, reader, file)
    finally:
        sound = place / "sound" / name
        file.write_bytes(sound.read_bytes())


def _judge(error: BaseException, reader: Reader, file: Path) -> tuple[str, str]:
    text = str(error)
    ours = type(error) is ValueError or type(error).__module__.startswith("visionmtl")
    if isinstance(error, OSError) and error.filename is not None:  # `cli.run_tool` makes one line of it
        ours, text = True, f"{error.filename}; {error.strerror}; {text}"
    if not ours or not isinstance(error, ValueError | OSError):
        import traceback

        frame = traceback.extract_tb(error.__traceback__)[-1]
        return "fault", f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {text[:200]}"
    folder = [file.parent.name] if file.parent.name != "work" else []
    if not any(name in text for name in (file.name, *folder, *reader.named)):
        return "fault", f"the file is not named: {text[:250]}"
    if text.count(";") < reader.parts - 1:
        return "fault", f"not in {reader.parts} parts: {text[:250]}"
    return REFUSED, ""


def _keep(reader: Reader, sound: Path, seed: int, number: int, text: str, keep: Path) -> None:
    if number < 0:
        return
    name, content = damaged(reader, sound, seed, number)
    folder = keep / "".join(sign if sign.isalnum() else "_" for sign in reader.name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{seed}-{number}-{Path(name).name}").write_bytes(content)
    with (folder / "faults.txt").open("a") as lines:
        lines.write(f"{seed}-{number}-{Path(name).name}\t{text}\n")


def shares(chosen: Sequence[Reader], count: int) -> Iterator[tuple[Reader, int]]:
    """How many of `count` inputs each reader gets."""
    whole = sum(reader.share for reader in chosen)
    for reader in chosen:
        yield reader, max(1, round(count * reader.share / whole))


def main() -> int:
    """Print the table; returns 1 where there are faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=int(os.environ.get("FUZZ_COUNT", "30000")), help="inputs in all")
    parser.add_argument("--seed", type=int, default=int(os.environ.get("FUZZ_SEED", "0")))
    parser.add_argument("--reader", action="append", default=[], help="only readers whose name holds this text")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that are faults")
    args = parser.parse_args()
    chosen = [reader for reader in readers() if not args.reader or any(text in reader.name for text in args.reader)]
    begin = time.monotonic()
    tallies = []
    print(f"{'reader':<32}{'inputs':>8}{'read':>8}{'refused':>9}{'faults':>8}{'ms each':>9}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["VISIONMTL_CACHE"] = cache
        for reader, count in shares(chosen, args.count):
            before = time.monotonic()
            tally = fuzz(reader, count, args.seed, args.keep)
            each_ms = (time.monotonic() - before) / count * 1000
            tallies.append(tally)
            print(
                f"{reader.name:<32}{tally.total:>8}{tally.counts[READ]:>8}{tally.counts[REFUSED]:>9}"
                f"{len(tally.faults):>8}{each_ms:>9.1f}", flush=True,
            )  # fmt: skip
            kinds = Counter(text[:160] for _, text in tally.faults)
            for text, times in kinds.most_common(8):
                print(f"    {times} x {text}")
    total, faults = (sum(each) for each in zip(*((t.total, len(t.faults)) for t in tallies), strict=True))
    is_read, refused = (sum(tally.counts[verdict] for tally in tallies) for verdict in (READ, REFUSED))
    print(
        f"fuzz: {total:,} inputs over {len(tallies)} readers in {time.monotonic() - begin:.0f} s, seed {args.seed}: "
        f"{is_read:,} read, {refused:,} refused, {faults} faults"
    )
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
