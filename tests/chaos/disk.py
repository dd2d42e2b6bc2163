"""Takes the disk or a file away from trainings; they must say so and end, and go on as if nothing had been.

python tests/chaos/disk.py
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _filler import FILLER
from kills import HANGS_S, Failed, Harness, start


def disturbed(harness: Harness, folder: Path, disturb: Callable[[], Callable[[], None]], expected: str) -> None:
    """Train until the first checkpoint, disturb, wait for the error, undo it, go on, compare.

    disturb: returns what undoes it; expected: what the error must name
    """
    child = harness.child(lambda: start(folder, harness.files), folder.name)
    while not (folder / "checkpoints" / "last.pt").exists() and child.wait(0.01) is None:
        pass
    undo = disturb()
    code = child.wait(HANGS_S)
    child.kill_group()
    undo()
    if code in (0, None) or expected not in child.output.read_text(errors="replace"):
        raise Failed(f"{folder.name}: ended with {code} (None: hung), and without naming {expected}\n{child.tail()}")
    again = harness.child(lambda: start(folder, harness.files), f"{folder.name}-again")
    if again.wait(HANGS_S) != 0:
        again.kill_group()
        raise Failed(f"{folder.name}: did not go on: {again.code}\n{again.tail()}")
    harness.compare(folder)


def full_disk(harness: Harness) -> str:
    """A small file system of its own, if this user may mount one."""
    small = harness.folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", small]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return "a full disk was not tried, since only root can mount a small one"

    def fill() -> Callable[[], None]:
        filling = subprocess.Popen([sys.executable, "-c", FILLER, small / "filler"], stdout=subprocess.DEVNULL)

        def undo() -> None:
            filling.kill()
            filling.wait()
            (small / "filler").unlink()

        return undo

    try:
        disturbed(harness, small / "run", fill, "No space left")
    finally:
        subprocess.run(["umount", "-l", small], check=True)
    return "full disk"


def lost_file(harness: Harness, how: str) -> str:
    """An image that vanishes, is cut short, or becomes a pipe that nobody writes to."""
    file = harness.files.root / "images" / "train" / "2.png"

    def take() -> Callable[[], None]:
        whole = file.read_bytes()
        file.unlink()
        if how == "cut":
            file.write_bytes(whole[: len(whole) // 2])
        elif how == "pipe":
            os.mkfifo(file)

        def undo() -> None:
            file.unlink(missing_ok=True)
            file.write_bytes(whole)

        return undo

    disturbed(harness, harness.folder / how, take, file.name)
    return f"image {how}"


def main() -> int:
    """Run them; 0 where all held."""
    folder, started = Path(tempfile.mkdtemp(prefix="chaos-")), time.monotonic()
    harness = Harness(folder, seed=0)
    try:
        harness.undisturbed(1)
        tried = [full_disk(harness), *(lost_file(harness, how) for how in ("vanished", "cut", "pipe"))]
    except Failed as error:
        print(error)
        print(f"disk: FAILED, see {folder}: {str(error).splitlines()[0]}")
        return 1
    shutil.rmtree(folder)
    print(
        f"disk: {', '.join(tried)}: each named in an error, and the resumed trainings ended as the undisturbed one bit "
        f"for bit ({time.monotonic() - started:.0f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
