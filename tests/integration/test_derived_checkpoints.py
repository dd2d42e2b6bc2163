"""Checkpoints made of others: soups are means of weights, calibrated depth is a straight line of what it was."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scene_run
import torch

import visionmtl
from visionmtl.cli import main
from visionmtl.engine import checkpoint
from visionmtl.engine.calibration import _LineFit, calibrate
from visionmtl.engine.soup import make_soup
from visionmtl.structures import Sample
from visionmtl.tasks.depth import Depth


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two run folders of one architecture, and one of another."""
    folders = [tmp_path_factory.mktemp("run") for _ in range(3)]
    for folder, channels in zip(folders, (16, 16, 8), strict=True):
        run = scene_run.run(folder, ("segmentation", "depth"), model={"pyramid": {"channels": channels}})
        scene_run.save_untrained(run, folder)
    state = checkpoint.load(folders[1])
    for value in state["net"].values():
        if value.is_floating_point():
            value += 1
    checkpoint.save(folders[1] / "checkpoints" / "last.pt", state)
    return folders


def test_a_soup_is_the_mean_of_all_weights(runs: list[Path], tmp_path: Path):
    assert main(["soup", str(runs[0]), str(runs[1]), "--output", str(tmp_path / "soup.pt")]) == 0

    first, soup = (checkpoint.load(path) for path in (runs[0], tmp_path / "soup.pt"))
    for name, value in first["net"].items():  # the second lies 1 above the first, so the mean 0.5
        expected = value + 0.5 if value.is_floating_point() else value
        torch.testing.assert_close(soup["net"][name], expected)
    assert soup["ema"] is None and soup["optimizer"]["param_groups"] == []
    assert checkpoint.open_model(tmp_path / "soup.pt").step == first["step"]


def test_weights_without_a_training_go_into_a_soup(runs: list[Path], tmp_path: Path):
    weights, soup = tmp_path / "first.safetensors", tmp_path / "soup.pt"
    checkpoint.save_weights(weights, checkpoint.open_model(runs[0]))
    assert main(["soup", str(weights), str(runs[1]), "--output", str(soup)]) == 0
    for name, value in checkpoint.open_model(runs[0]).net.state_dict().items():
        expected = value + 0.5 if value.is_floating_point() else value
        torch.testing.assert_close(checkpoint.load(soup)["net"][name], expected)
    with pytest.raises(ValueError, match="was written with no weight average"):  # the state of a training is not in it
        visionmtl.train(scene_run.run(tmp_path / "on", ("segmentation", "depth")), resume=soup)


def test_what_cannot_be_averaged_is_refused(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = ["--output", str(tmp_path / "soup.pt")]

    assert main(["soup", str(runs[0]), str(runs[2]), *output]) == 2
    assert "is another network than" in capsys.readouterr().err
    farther = tmp_path / "farther"
    changes: dict[str, Any] = {"model": {"pyramid": {"channels": 16}}, "tasks": {"depth": {"max_depth_m": 40}}}
    scene_run.save_untrained(scene_run.run(farther, ("segmentation", "depth"), **changes), farther)
    assert main(["soup", str(runs[0]), str(farther), *output]) == 2
    assert "is another network than" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(runs[0])
    assert main(["soup", str(runs[0]), str(tmp_path / "link"), *output]) == 2
    assert "needs two or more, each once" in capsys.readouterr().err
    (tmp_path / "soup.pt").write_text("")
    assert main(["soup", str(runs[0]), str(runs[1]), *output]) == 2
    assert "nothing is written over" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["log", "bins"])
def test_calibrated_depth_is_the_line_that_was_fitted(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = scene_run.run(tmp_path, ("depth",), tasks={"depth": {"head": head}})
    scene_run.save_sure(run, tmp_path)
    if head == "bins":  # by chance what is nearer is farther
        assert main(["calibrate", str(tmp_path), "--output", str(tmp_path / "new.pt"), "--device", "cpu"]) == 2
        assert "a slope above 0 is needed; train further first" in capsys.readouterr().err
        path = checkpoint.find(tmp_path)
        state = checkpoint.load(path)
        state["net"]["decoders.depth.out.weight"] *= -1
        checkpoint.save(path, state)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)

    assert main(["calibrate", str(tmp_path), "--output", str(tmp_path / "new.pt"), "--device", "cpu"]) == 0
    slope, offset = map(float, capsys.readouterr().out.partition("becomes ")[2].split(";")[0].split(" * ln d "))
    before, after = (visionmtl.load(path, device="cpu")(image).depth_m for path in (tmp_path, tmp_path / "new.pt"))

    line = np.clip(np.exp(slope * np.log(before) + offset), 0.1, 12)
    np.testing.assert_allclose(after, line, rtol=2e-3)  # four digits of slope and offset are printed
    # fitting again finds nothing left to do
    again = ["calibrate", str(tmp_path / "new.pt"), "--output", str(tmp_path / "again.pt"), "--device", "cpu"]
    assert main(again) == 0
    slope, offset = map(float, capsys.readouterr().out.partition("becomes ")[2].split(";")[0].split(" * ln d "))
    assert slope == pytest.approx(1, abs=0.02) and offset == pytest.approx(0, abs=0.02)


def test_the_line_by_hand():
    """ln truth = 2 * ln prediction - ln 2 at three depths."""
    fit, guess = _LineFit(Depth(), (1, 4), (1, 4)), np.array([[1.0, 2.0, 3.0, 9.0]], np.float32)
    truth = np.array([[0.5, 2.0, 4.5, 0.0]], np.float32)  # the last is not measured

    fit.update(guess, Sample(image=np.zeros((1, 4, 3), np.uint8), image_id="", depth_m=truth))

    found = fit.compute()["fit"]
    assert found.slope == pytest.approx(2) and found.offset == pytest.approx(-math.log(2))
    errors = [math.log(0.5), 0, math.log(1.5)]
    assert found.rms_before == pytest.approx(math.sqrt(sum(e * e for e in errors) / 3)) and found.rms_after < 1e-6


def test_the_line_is_one_of_what_the_last_layer_gives_whatever_the_size_of_evaluation():
    """At twice the size of training everything looks twice as near, which metres are multiplied by."""
    fit, sizes = [], [((64, 96), (64, 96)), ((128, 192), (64, 96))]
    inside, truth = np.array([[1.0, 2.0, 3.0]], np.float32), np.array([[0.5, 2.0, 4.5]], np.float32)
    for size, nearer in zip(sizes, (1, 2), strict=True):
        meter = _LineFit(Depth(), *size)
        sample = Sample(image=np.zeros((1, 3, 3), np.uint8), image_id="", depth_m=nearer * truth)
        meter.update(nearer * inside, sample)
        fit.append(meter.compute()["fit"])

    assert [fit[0].slope, fit[0].offset] == pytest.approx([fit[1].slope, fit[1].offset])


def test_a_network_without_depth_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    scene_run.save_untrained(scene_run.run(tmp_path, ("segmentation",)), tmp_path)
    assert main(["calibrate", str(tmp_path), "--output", str(tmp_path / "new.pt")]) == 2
    assert "none of type depth" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["soup", "calibrate"])
def test_a_name_that_no_reader_would_know_is_refused_before_the_work(tool: str, tmp_path: Path, capsys):
    for seed in (0, 1):
        scene_run.save_untrained(scene_run.run(tmp_path / str(seed), seed=seed), tmp_path / str(seed))
    given = [str(tmp_path / "0"), str(tmp_path / "1")][: 2 if tool == "soup" else 1]

    assert main([tool, *given, "--output", str(tmp_path / "new.safetensors")]) == 2

    assert (
        "new.safetensors ends with '.safetensors', and a checkpoint is written; .pt is allowed"
        in capsys.readouterr().err
    )


def test_low_rank_matrices_of_another_factor_are_no_soup(tmp_path: Path):
    for alpha in (8.0, 64.0):
        run = scene_run.run(tmp_path / str(alpha), model={"sharing": {"type": "lora", "alpha": alpha}})
        scene_run.save_untrained(run, tmp_path / str(alpha))

    said = r"another network than .*: model.sharing \['lora', 64.0\] for \['lora', 8.0\]"
    with pytest.raises(ValueError, match=said):
        make_soup([tmp_path / "8.0", tmp_path / "64.0"], tmp_path / "soup.pt")


def test_what_lies_at_the_new_place_is_not_written_over(tmp_path: Path):
    (tmp_path / "mine.pt").write_text("mine")
    for write in (
        lambda: make_soup(["nyuv2-small", tmp_path / "other.pt"], tmp_path / "mine.pt"),
        lambda: calibrate(tmp_path / "other.pt", tmp_path / "mine.pt", torch.device("cpu")),
    ):
        with pytest.raises(ValueError, match=r"mine.pt exists already; nothing is written over"):
            write()
    assert (tmp_path / "mine.pt").read_text() == "mine"
