"""Losses that come late in a training, and auxiliary predictions that only training sees."""

import json
from pathlib import Path

import pytest
import scene_run
import torch

import visionmtl
from visionmtl.engine import checkpoint
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import train

SUPERVISED = {"deep_supervision": {"levels": [3, 4], "weight": 0.5}}


def parts(folder: Path, task: str) -> list[set[str]]:
    """Names of a task's loss parts by step."""
    return [set(row["losses"][task]) for row in scene_run.rows(folder)]


def test_a_region_loss_begins_late_and_so_after_a_resume(tmp_path: Path):
    late = {"segmentation": {"region_loss": "dice", "late_losses_from": 0.5, "hardest": 0.5}}
    run = scene_run.run(tmp_path / "a", ("segmentation",), tasks=late, train={"epochs": 2})
    train(run, TrainOptions(device="cpu"))
    assert parts(tmp_path / "a", "segmentation") == [{"cross_entropy"}] * 4 + [{"cross_entropy", "dice"}] * 4

    again = run.model_copy(update={"output": str(tmp_path / "b")})
    train(again, TrainOptions(device="cpu", max_steps=5))
    train(again, TrainOptions(device="cpu", resume="auto"))
    assert scene_run.differences(scene_run.last_state(tmp_path / "a"), scene_run.last_state(tmp_path / "b")) == []
    with pytest.raises(ValueError, match=r"late_losses_from is 0\.5, but hardest and region_loss are unset"):
        scene_run.run(None, ("segmentation",), tasks={"segmentation": {"late_losses_from": 0.5}})


def test_early_losses_are_those_without_the_settings():
    plain, late = (
        scene_run.run(None, ("segmentation",), tasks={"segmentation": changes}).tasks["segmentation"]
        for changes in ({}, {"region_loss": "lovasz", "late_losses_from": 0.25})
    )
    assert late.early() == (0.25, plain) and plain.early() is None


@pytest.mark.parametrize(("share", "epochs"), [(0.05, 4), (0.9, 2)])
def test_losses_that_begin_at_once_or_never_are_an_error(share: float, epochs: int):
    late = {"segmentation": {"region_loss": "dice", "late_losses_from": share}}
    run = scene_run.run(None, ("segmentation",), tasks=late, train={"epochs": epochs})
    with pytest.raises(ValueError, match=f"up to {share} of train.epochs {epochs}, which is none or all of them"):
        scene_run.state(run)


def test_auxiliary_heads_teach_and_are_not_predicted(tmp_path: Path):
    run = scene_run.run(tmp_path, model=SUPERVISED, train={"epochs": 1})
    train(run, TrainOptions(device="cpu"))

    assert parts(tmp_path, "depth")[0] == {"silog", "gradient", "initial_silog", "initial_gradient"}
    assert parts(tmp_path, "segmentation")[0] == {"cross_entropy", "initial_cross_entropy"}
    assert not any(name.startswith("initial") for name in parts(tmp_path, "detection")[0])
    state = checkpoint.load(tmp_path)
    heads = {name.split(".")[1] for name in state["net"] if name.startswith("auxiliary.")}
    assert heads == {"segmentation", "depth"}
    untaught = {name: value for name, value in scene_run.untrained(run).state_dict().items() if "auxiliary" in name}
    assert all(not torch.equal(state["net"][name], value) for name, value in untaught.items())
    net = checkpoint.open_model(tmp_path).net
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with torch.no_grad():
        assert set(net(image)) == {"detection", "segmentation", "depth"}
        before = net(image, ["depth"])["depth"]
        net.keep(["depth"])
        assert not len(net.auxiliary) and torch.equal(net(image)["depth"], before)
    assert visionmtl.load(tmp_path, device="cpu", tasks=["segmentation"]) is not None
    json.dumps(run.model_dump(mode="json"))


def test_weight_scales_auxiliary_losses(tmp_path: Path):
    def first_losses(weight: float) -> dict[str, float]:
        run = scene_run.run(
            tmp_path / f"{weight}", ("depth",), model={"deep_supervision": {"levels": [3], "weight": weight}}
        )
        train(run, TrainOptions(device="cpu", max_steps=1))
        return scene_run.rows(tmp_path / f"{weight}")[0]["losses"]["depth"]

    half, whole = first_losses(0.5), first_losses(1.0)
    assert whole["initial_silog"] == pytest.approx(2 * half["initial_silog"]) and whole["silog"] == half["silog"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deep_supervision": {"levels": [2, 3]}}, r"levels names \[2\], which the decoder of task"),
        ({**SUPERVISED, "sharing": {"type": "pad_net"}}, "sharing 'pad_net' has predictions or decoders of its own"),
    ],
)
def test_supervision_that_does_not_fit_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        scene_run.untrained(scene_run.run(model=changes))


def test_it_would_have_no_effect_without_dense_tasks():
    with pytest.raises(ValueError, match="deep_supervision would have no effect: none of detection"):
        scene_run.untrained(scene_run.run(None, ("detection",), model=SUPERVISED))
