"""The example that compares every way of adding a task trains all its runs, reports them, and repeats none."""

import runpy
from pathlib import Path

import pytest
from contract import found

from visionmtl.transfer.base import Extend

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "examples" / "forgetting.py"))
SMALL = (
    "data.train.0.num_images=4", "data.val.0.num_images=4", "data.size=[64,64]", "model.encoder.name=test_resnet",
    "model.pyramid.channels=16", "train.batch_size=2", "train.epochs=1", "train.eval_every_epochs=1",
    "optim.warmup_steps=1",
)  # fmt: skip


@pytest.mark.slow
def test_two_steps_of_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    EXAMPLE["main"]([str(tmp_path), *SMALL, "--seeds", "0"])
    text = (tmp_path / "forgetting.md").read_text()
    capsys.readouterr()
    for table in text.split("**")[2::2]:
        rows = {row.split("|")[1].strip(): row.split("|") for row in table.splitlines() if row.startswith("| ")}
        assert rows["frozen"][4].strip() == "+0.000"  # nothing of the old network moves
        assert {row[2].strip() for way, row in rows.items() if way != "way"} == {"1"}

    EXAMPLE["main"]([str(tmp_path), *SMALL, "--seeds", "0"])
    assert "seed 0" not in capsys.readouterr().out
    assert (tmp_path / "forgetting.md").read_text() == text


def test_every_way_on_disk_is_compared():
    assert {case.values[0]().type for case in found(Extend)} == set(EXAMPLE["METHODS"])
