"""Trains a tiny network for many steps with loader workers, and watches the memory of every process.

python tests/chaos/soak.py --steps 10000
"""

from _processes import Child, fork_the_server, resident_bytes, shared_files  # isort: skip - first: it sets the path

import argparse
import json
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import scene_run
import torch
from write_folder import FolderData

from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import train

NUM_WORKERS = 2
NUM_EPOCHS = 10
WARM_UP = 0.25
"""Share of the steps before memory counts: two evaluations and checkpoints lie in them."""
ALLOWED = 0.02
MEBI = 2**20


def start(folder: Path, files: FolderData, steps: int) -> None:
    """The training, with a checkpoint and an evaluation in every epoch."""
    torch.set_num_threads(1)
    fork_the_server()
    changes = {
        "data": {
            "train": [files.settings("train")], "val": [files.settings("val")], "workers": NUM_WORKERS,
            "augment": {"flip": 0.5, "zoom": [0.8, 1.2], "brightness": 0.2},
            "sampling": {"epoch_images": 2 * steps // NUM_EPOCHS},
        },
        "train": {"epochs": NUM_EPOCHS, "log_every_steps": 20},
    }  # fmt: skip
    run = scene_run.run(folder, ["segmentation", "depth"], **scene_run.merged(changes, {"optim": {"lr": 1e-4}}))
    train(run, TrainOptions(device="cpu"))


def step_reached(folder: Path) -> int:
    """The last logged step."""
    with suppress(OSError, ValueError, IndexError), (folder / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
        return int(json.loads(file.read().splitlines()[-1])["step"])
    return 0


def growth(samples: list[tuple[int, int]]) -> tuple[float, float]:
    """Of (step, bytes): what a fitted line gains from end to end, and largest - smallest, as shares of the mean."""
    steps, memory = np.array(samples, dtype=float).T
    slope = np.polyfit(steps, memory, 1)[0]
    return float(slope * (steps[-1] - steps[0]) / memory.mean()), float(np.ptp(memory) / memory.mean())


def main(argv: list[str]) -> int:
    """Run it; 0 where the memory of every process stays flat within ALLOWED and nothing is left in /dev/shm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every-s", type=float, default=1.0, help="between two looks at the memory")
    args = parser.parse_args(argv)

    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    files, run = FolderData(folder / "data"), folder / "run"
    child = Child(lambda: start(run, files, args.steps), folder / "output.txt")
    samples: dict[int, list[tuple[int, int]]] = {}
    named: set[str] = set()
    while child.wait(args.every_s) is None:
        step = step_reached(run)
        for pid in (child.pid, *child.loader_workers()):
            with suppress(OSError, KeyError):  # it has just ended
                samples.setdefault(pid, []).append((step, resident_bytes(pid)))
        named |= shared_files(list(child.members()))
    if child.code != 0:
        print(child.tail(30))
        print(f"soak: FAILED, the training ended with {child.code}")
        return 1

    warmed = {pid: [pair for pair in of if pair[0] >= WARM_UP * args.steps] for pid, of in samples.items()}
    flat, figures = True, []
    for pid, of in warmed.items():
        if len(of) < 10:  # a worker of a loader that ended early
            continue
        slope, spread = growth(of)
        flat = flat and slope < ALLOWED and spread < ALLOWED
        figures.append(
            f"{'main' if pid == child.pid else 'worker'} {np.mean([b for _, b in of]) / MEBI:.0f} MiB, "
            f"{slope:+.2%} by a fitted line, {spread:.2%} from least to most"
        )
    left = [path for path in named if os.path.exists(path)]
    shutil.rmtree(folder)
    verdict = "flat" if flat else f"FAILED, more than {ALLOWED:.0%}"
    print(
        f"soak: {args.steps} steps, memory after step {WARM_UP * args.steps:.0f}: {'; '.join(figures)}: {verdict}; "
        f"{len(left)} files left in /dev/shm"
    )
    return 0 if flat and not left else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
