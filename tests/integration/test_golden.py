"""Golden: the losses of the first five steps of a fixed run, to five digits.

When they were supposed to move, write them anew and say in the commit why:
UPDATE_GOLDEN=1 python -m pytest tests/integration/test_golden.py
"""

import json
import os
import platform
from pathlib import Path
from typing import Literal

import contract
import pytest
import scene_run
import torch

from visionmtl.datasets import Dataset
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import train
from visionmtl.structures import Sample

FILE = Path(__file__).parent / "golden" / "first_steps.json"
STEPS = 5
TOLERANCE = 1e-4  # five digits are 5e-5; rounding moves them by 2e-6, see the test below


class Noise(Dataset, frozen=True):
    """Images that are the same to the bit on every machine, which drawn scenes are not."""

    type: Literal["test_golden.Noise"] = "test_golden.Noise"

    def build(self) -> "NoiseReader":
        return NoiseReader()


class NoiseReader:
    def __init__(self) -> None:
        self.provides = {"boxes": contract.SPACE, "segmentation": contract.SPACE, "depth_m": None, "normals": None}

    def __len__(self) -> int:
        return 12

    def read(self, index: int) -> Sample:
        return contract.sample(index, size=(64, 64))


def first_steps(folder: Path, **changes: object) -> list[dict[str, dict[str, float]]]:
    """By step, task and part.

    Plain SGD, since the first steps of Adam have the size of its rate whatever the gradient: the rounding of a
    gradient near zero would become a whole step, and no two machines would agree. No dropout: its random numbers
    come from kernels that differ between processors. No zoom: resizing rounds to grey levels.
    """
    run = scene_run.run(
        folder,
        (*scene_run.TASKS, "normals"),
        **{
            "tasks": {"segmentation": {"dropout": 0.0}},
            "data": {"train": [Noise()], "val": [Noise()], "augment": {"flip": 0.5, "saturation": 0.2}},
            "optim": {"name": "sgd", "lr": 0.01, "weight_decay": 1e-4, "clip_norm": 10.0},
            **changes,
        },
    )
    train(run, TrainOptions(max_steps=STEPS))
    return [row["losses"] for row in scene_run.rows(folder)]


def flat(steps: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    return {
        f"step {at} {task}/{part}": value
        for at, losses in enumerate(steps, 1)
        for task, parts in losses.items()
        for part, value in parts.items()
    }


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return flat(first_steps(tmp_path_factory.mktemp("golden") / "run"))


def test_the_first_steps_have_the_losses_they_always_had(losses: dict[str, float]):
    if os.environ.get("UPDATE_GOLDEN"):
        FILE.parent.mkdir(exist_ok=True)
        rounded = {name: float(f"{value:.5g}") for name, value in losses.items()}
        made_with = f"torch {torch.__version__}, {platform.machine()}"
        FILE.write_text(json.dumps({"made_with": made_with, "losses": rounded}, indent=1) + "\n", encoding="utf-8")
        pytest.skip(f"wrote {FILE.name}; look at the difference before you commit it")

    expected = json.loads(FILE.read_text(encoding="utf-8"))["losses"]

    assert losses == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_rounding_moves_them_less_than_the_tolerance(losses: dict[str, float], tmp_path: Path):
    """What another processor does to a sum, done here: other kernels, another order. A factor of 10 is the margin."""
    with torch.backends.mkldnn.flags(enabled=False):
        other = flat(first_steps(tmp_path / "run", train={"channels_last": False}))

    assert other == pytest.approx(losses, rel=TOLERANCE / 10)
    assert other != losses, "the kernels were the same, so this measured nothing"


def test_gradients_made_of_rows_of_numbers_move_weights_in_any_memory_format(tmp_path: Path):
    """torch's fused kernels do not look how a gradient lies: in another order than its weight it would be shuffled."""
    balance = {"type": "upgrad", "level": "parameters"}
    last, first = (
        flat(first_steps(tmp_path / str(yes), balance=balance, train={"channels_last": yes})) for yes in (True, False)
    )

    assert last == pytest.approx(first, rel=TOLERANCE)


def test_a_changed_setting_moves_them_more_than_the_tolerance(losses: dict[str, float], tmp_path: Path):
    other = flat(first_steps(tmp_path / "run", balance={"type": "uncertainty"}))

    with pytest.raises(AssertionError):
        assert other == pytest.approx(losses, rel=TOLERANCE)
