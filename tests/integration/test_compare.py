"""`tools/compare.py`: runs over seeds, each trained once, stopped without loss, reported; folders of finished runs."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scene_run
import torch
import yaml

from visionmtl.cli import main
from visionmtl.run import dump

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COMPARISON = {
    "config": "run.yaml",
    "seeds": [0, 1],
    "held_out": 0.25,
    "leave_one_out": "equal",
    "affinity": "equal",
    "baseline": "equal",
    "metrics": {"segmentation": ["miou", "pixel_accuracy"], "depth": ["abs_rel"]},
    "runs": {
        "equal": {},
        "single_depth": {"tasks": ["depth"]},
        "single_segmentation": {"tasks": ["segmentation"]},
        "upgrad": {"overrides": ["balance=upgrad"]},
        "tuned": {"search": {"weights": {"depth": [0.5, 2.0]}, "trials": 2}},
    },
}

PLAIN = {"leave_one_out": None, "affinity": None, "baseline": None}


def write(folder: Path, **changes: object) -> Path:
    """A comparison of tiny runs, and their config."""
    run = scene_run.run(names=("segmentation", "depth"), data={"train": [scene_run.scenes(16)]})
    (folder / "run.yaml").write_text(dump(run), encoding="utf-8")
    file = folder / "comparison.yaml"
    file.write_text(yaml.safe_dump({**COMPARISON, **changes}, sort_keys=False), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a whole comparison."""
    folder = tmp_path_factory.mktemp("compare")
    arguments = ["--output", str(folder / "out"), "--threads", "1", "--device", "cpu", "--no-costs"]
    assert main(["compare", str(write(folder)), *arguments]) == 0
    return folder / "out"


def test_every_run_and_seed_is_reported_with_both_conventions(compared: Path):
    report = json.loads((compared / "comparison.json").read_text())
    rows = {row["run"]: row for row in report["rows"]}

    without = ["equal-without-segmentation", "equal-without-depth"]
    assert list(rows) == [*COMPARISON["runs"], *without] and all(row["seeds"] == 2 for row in rows.values())
    transfer = {task: of["mean"] for task, of in rows["equal"]["transfer"].items()}
    alone, joint = (rows[name]["metrics"] for name in ("single_depth", "equal"))
    expected = [
        1 - ours / theirs
        for ours, theirs in zip(joint["depth/abs_rel"]["values"], alone["depth/abs_rel"]["values"], strict=True)
    ]
    assert rows["equal"]["transfer"]["depth"]["values"] == pytest.approx(expected)
    assert rows["equal"]["delta_m_per_task"]["mean"] == pytest.approx(sum(transfer.values()) / 2)
    assert rows["single_depth"]["delta_m_per_task"] is None, "a reference is not compared with itself"

    text = (compared / "report.md").read_text()
    assert "14 of 14 runs are finished" in text and "Δm per task" in text and "Δm over metrics" in text
    assert (compared / "delta_m.png").is_file() and (compared / "transfer_depth.png").is_file()
    page = (compared / "report.html").read_text()
    assert page.count("data-chart") >= 3 and page.count('class="sortable"') == text.count("\n|--")
    lines = list(csv.DictReader((compared / "results.csv").open()))
    assert {line["figure"] for line in lines} >= {"depth/abs_rel", "transfer/depth", "delta_m/per_task"}


def test_runs_that_are_not_wanted_this_time_stay_in_the_report(compared: Path, tmp_path: Path):
    shutil.copytree(compared.parent, tmp_path / "copy")
    output = tmp_path / "copy/out"
    for seed in (0, 1):  # now of other settings
        file = output / f"runs/upgrad/{seed}/result.json"
        result = json.loads(file.read_text())
        result["settings"]["optim"]["lr"] *= 2
        file.write_text(json.dumps(result))
    command = ["compare", str(tmp_path / "copy/comparison.yaml"), "--output", str(output), "--no-train"]
    assert main([*command, "--only", "single_segmentation"]) == 0
    rows = {row["run"]: row for row in json.loads((output / "comparison.json").read_text())["rows"]}
    before = {row["run"]: row for row in json.loads((compared / "comparison.json").read_text())["rows"]}
    assert rows["equal"] == before["equal"] and list(rows) == [name for name in before if name != "upgrad"]


def test_what_tasks_do_to_each_other_is_reported(compared: Path):
    titles = {table["title"]: table for table in json.loads((compared / "comparison.json").read_text())["tables"]}
    added = next(table for title, table in titles.items() if "leave one out" in title)
    affinity = next(table for title, table in titles.items() if "Look-ahead" in title)
    cosine = next(table for title, table in titles.items() if title.startswith("Cosine"))

    assert not (compared / "runs/equal-without-depth").exists(), "segmentation alone is its reference"
    assert [row[0] for row in added["rows"]] == ["segmentation", "depth"] and added["rows"][0][1] is None
    assert affinity["columns"] == ["step", "segmentation", "depth"] and len(affinity["rows"]) == 2
    assert [row[0] for row in cosine["rows"]] == ["upgrad"] and cosine["columns"][1] == "segmentation-depth"


def test_changes_against_a_baseline_are_paired_by_seed_on_both_sets_of_images(compared: Path):
    tables = json.loads((compared / "comparison.json").read_text())["tables"]
    by_images = {table["title"].partition(" on ")[2]: table for table in tables if "against equal" in table["title"]}
    assert list(by_images) == ["the held-out images", "the test data"]

    for key, table in zip(("held_out", "test"), by_images.values(), strict=True):
        rows = {row[0]: row[1:] for row in table["rows"]}
        assert table["columns"] == ["run", "seeds", "segmentation", "depth", "mean of tasks"] and "equal" not in rows
        assert rows["single_depth"][1] is None and rows["single_depth"][3] is None, "one task has no mean of tasks"
        errors = {
            name: [
                json.loads((compared / f"runs/{name}/{seed}/result.json").read_text())[key]["depth"]["abs_rel"]
                for seed in (0, 1)
            ]
            for name in ("upgrad", "equal")
        }
        change = sum(1 - ours / theirs for ours, theirs in zip(*errors.values(), strict=True)) / 2
        assert rows["upgrad"][2].startswith(f"{100 * change:+.2f} [")


def test_the_search_states_its_size_and_never_sees_the_test_data(compared: Path):
    trials = json.loads((compared / "comparison.json").read_text())["trials"]["tuned"]
    assert [trial["weights"]["segmentation"] for trial in trials] == [1, 1] and trials[0]["weights"]["depth"] == 1
    best = max(trials, key=lambda trial: trial["delta_m"])["number"]

    assert not (compared / "runs/tuned/trials/0").exists(), "the config's own weights are the run `equal`"
    loser = json.loads((compared / "runs/tuned/trials/1/0/result.json").read_text())
    assert (loser["test"] is None) == (best == 0)
    assert "tuned (2 trials)" in (compared / "report.md").read_text()


def test_finished_runs_are_not_trained_again_and_others_settings_are_refused(compared: Path, capsys):
    command = ["compare", str(compared.parent / "comparison.yaml"), "--output", str(compared), "--no-costs"]
    before = {file: file.stat().st_mtime_ns for file in compared.rglob("result.json")}
    capsys.readouterr()

    assert main([*command, "--threads", "1"]) == 0
    assert "runs to train" not in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in compared.rglob("result.json")}

    assert main([*command, "optim.lr=0.5"]) == 2
    assert "runs/equal/0 holds a finished run with other settings: optim.lr 0.002 (now 0.5)" in capsys.readouterr().err


def test_a_folder_of_finished_runs_is_read(compared: Path, tmp_path: Path, capsys):
    assert main(["compare", str(compared / "runs"), "--output", str(tmp_path)]) == 0

    rows = {row["run"]: row for row in json.loads((tmp_path / "comparison.json").read_text())["rows"]}
    assert {"equal", "single_depth", "single_segmentation"} <= set(rows) and rows["equal"]["seeds"] == 2
    assert rows["equal"]["delta_m_per_task"] is not None
    assert "which nothing kept unseen" in (tmp_path / "report.md").read_text()
    assert main(["compare", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "holds no run with config.yaml" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_stopping_loses_nothing(tmp_path: Path):
    """Stopped in the middle of an epoch and started again, a run ends bit for bit as one that was never stopped."""
    changes = {
        "runs": {"equal": {}},
        "seeds": [0],
        "overrides": ["train.epochs=4", "train.eval_every_epochs=4"],
    } | PLAIN
    arguments = ["compare", str(write(tmp_path, **changes)), "--no-costs", "--threads", "1", "--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path / "whole")]) == 0

    rows = tmp_path / "cut/runs/equal/0/metrics.jsonl"
    command = [sys.executable, "-m", "visionmtl.cli", *arguments, "--output", str(tmp_path / "cut")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (rows.is_file() and '"step": 2' in rows.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "stopping 1 run(s) with a checkpoint" in said
    stopped = torch.load(rows.parent / "checkpoints/last.pt", weights_only=True)["step"]
    assert 2 <= stopped < 24

    assert main([*arguments, "optim.lr=0.5", "--output", str(tmp_path / "cut")]) == 2, "it goes on as what it began"
    assert main([*arguments, "--output", str(tmp_path / "cut")]) == 0
    cut, whole = (tmp_path / name / "runs/equal/0" for name in ("cut", "whole"))
    ends = [torch.load(folder / "checkpoints/last.pt", weights_only=True)["net"] for folder in (cut, whole)]
    assert not scene_run.differences(*ends)
    results = [json.loads((folder / "result.json").read_text()) for folder in (cut, whole)]
    assert results[0]["test"] == results[1]["test"]


def test_a_run_that_cannot_be_trained_is_told_and_the_others_go_on(tmp_path: Path, capsys):
    broken = {"overrides": ["data.train.0.num_images=1"]}  # fewer images than one step takes
    file = write(tmp_path, runs={"broken": broken, "equal": {}}, seeds=[0], **PLAIN)

    assert main(["compare", str(file), "--output", str(tmp_path / "out"), "--threads", "1", "--no-costs"]) == 2
    told = capsys.readouterr()
    assert "failed: broken, seed 0: " in told.err and "[2/2] equal, seed 0" in told.out


def test_test_data_that_are_not_there_are_told_before_the_training(tmp_path: Path, capsys):
    gone = f"data.val=[{{type: coco, root: {tmp_path / 'gone'}}}]"
    file = write(tmp_path, runs={"equal": {"overrides": [gone]}}, seeds=[0], **PLAIN)

    assert main(["compare", str(file), "--output", str(tmp_path / "out"), "--threads", "1", "--no-costs"]) == 2
    assert f"failed: equal, seed 0: found no {tmp_path / 'gone'}" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("metrics.jsonl"))


def test_a_run_that_diverges_is_a_result_of_its_folder_too(tmp_path: Path, capsys):
    file = write(tmp_path, runs={"wild": {"overrides": ["optim={name: sgd, lr: 1.0e+30}"]}}, seeds=[0], **PLAIN)

    assert main(["compare", str(file), "--output", str(tmp_path / "out"), "--threads", "1", "--no-costs"]) == 0
    assert "wild, seed 0: " in (tmp_path / "out/report.md").read_text()
    again = ["compare", str(tmp_path / "out/runs"), "--output", str(tmp_path / "again")]
    assert main(again) == 0
    assert "wild.0, seed 0: losses are not finite" in (tmp_path / "again/report.md").read_text()
    (tmp_path / "out/runs/wild/0/result.json").unlink()
    assert main(again) == 2
    assert "wild/0 was never evaluated; a comparison takes runs that have ended" in capsys.readouterr().err


def test_a_search_that_has_nothing_to_score_by_is_told(tmp_path: Path, capsys):
    wild = {"tasks": ["depth"], "overrides": ["optim={name: sgd, lr: 1.0e+30}"]}
    search = {"search": {"weights": {"depth": [0.5, 2.0]}, "trials": 2}}
    runs = {"single_depth": wild, "single_segmentation": {"tasks": ["segmentation"]}, "tuned": search}
    file = write(tmp_path, runs=runs, seeds=[0], **PLAIN)

    assert main(["compare", str(file), "--output", str(tmp_path / "out"), "--threads", "1", "--no-costs"]) == 2
    assert "failed: tuned: none of its 2 trials has a delta_m on the held-out images" in capsys.readouterr().err
