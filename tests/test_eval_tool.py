"""`tools/eval.py` on a checkpoint with random weights: tables, JSON, report, overrides and expectations."""

import json

import pytest
import torch

from visionmtl import checkpoint, config
from visionmtl.cli import main
from visionmtl.data import open_readers
from visionmtl.model import build_model
from visionmtl.spaces import resolve_spaces

SMALL = [
    "data.train.0.num_images=3",
    "data.val.0.num_images=3",
    "data.train.0.size=[64,96]",
    "data.val.0.size=[64,96]",
    "data.size=[64,96]",
    "data.workers=0",
    "train.batch_size=2",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The last.pt of a run folder, as training leaves it."""
    run = config.load("configs/quickstart.yaml", SMALL)
    spaces = resolve_spaces(run.tasks, open_readers(run.data.train))
    torch.manual_seed(0)
    net = build_model(run.model, run.tasks, spaces, run.data.size)
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(config.dump(run))
    plain = {name: space and space.plain() for name, space in spaces.items()}
    state = {"run": run.model_dump(mode="json"), "spaces": plain, "net": net.state_dict(), "ema": None}
    checkpoint.save(folder / "checkpoints" / "last.pt", {**state, "step": 7, "epoch": 1})
    return folder / "checkpoints" / "last.pt"


def evaluated(saved, *arguments):
    return main(["eval", str(saved), "--device", "cpu", *arguments])


def test_results_are_printed_by_protocol_and_kept_in_the_run_folder(saved, capsys):
    assert evaluated(saved) == 0

    words = " ".join(capsys.readouterr().out.split())
    assert "protocol coco " in words
    assert "protocol per_image: 0.3 < truth < 12 m" in words
    assert "cylinder │ 0.0000" in words  # a class table
    written = json.loads((saved.parent.parent / "eval" / "last-val.json").read_text())
    assert written["header"]["step"] == 7
    assert {name: result["images"] for name, result in written["results"].items()} == {
        "detection": 3,
        "segmentation": 3,
        "depth": 3,
    }
    assert 0 <= written["results"]["segmentation"]["miou"] <= 1


def test_a_missed_expectation_is_exit_status_1(saved, tmp_path, capsys):
    file = ("--json", str(tmp_path / "r.json"))

    assert evaluated(saved, *file, "--expect", "segmentation/miou>=0", "--expect", "depth/images=3+-0") == 0
    assert evaluated(saved, *file, "--expect", "segmentation/miou>=0", "--expect", "depth/rmse_m<=0") == 1
    assert "NOT MET: depth/rmse_m<=0 (found " in capsys.readouterr().out


def test_overrides_splits_and_limits_are_recorded_and_followed(saved, tmp_path):
    file = tmp_path / "r.json"

    assert (
        evaluated(saved, "tasks.depth.protocol=pooled", "--split", "test", "--limit-batches", "1", "--json", str(file))
        == 0
    )

    written = json.loads(file.read_text())
    assert written["results"]["depth"]["images"] == 2
    assert written["results"]["depth"]["protocol"].startswith("pooled")
    assert written["header"]["overrides"] == ["tasks.depth.protocol=pooled"]
    assert written["header"]["split"] == "test"


def test_the_report_shows_pictures(saved, tmp_path):
    page = tmp_path / "page.html"

    assert evaluated(saved, "--json", str(tmp_path / "r.json"), "--report", str(page)) == 0
    assert page.read_text().count("data:image/jpeg") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--expect", "segmentatio/miou>=0"], "no task 'segmentatio' (did you mean 'segmentation'?)"),
        (["--expect", "segmentation/mio>=0"], "segmentation has no 'mio' (did you mean 'miou'?)"),
        (["--split", "vall"], "settings do not fit"),
        (["train.batchsize=2"], "train.batchsize"),
    ],
)
def test_errors_are_one_line_and_exit_status_2(saved, tmp_path, capsys, arguments, message):
    assert evaluated(saved, "--json", str(tmp_path / "r.json"), *arguments) == 2

    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("text", ["miou>=0.5", "segmentation/miou=0.5", "segmentation/miou>=0.5+-0.1", "a/b>0.1"])
def test_an_expectation_out_of_grammar_is_refused_before_anything_runs(saved, text, capsys):
    with pytest.raises(SystemExit):
        evaluated(saved, "--expect", text)
    assert "is no expectation; allowed are TASK/METRIC>=X" in capsys.readouterr().err
