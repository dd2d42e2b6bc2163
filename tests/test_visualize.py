"""Claims about `visionmtl.inference.predictor` and tools/visualize.py: predictions at full size, and pictures of all of it."""

import re

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from visionmtl import run as config
from visionmtl.cli import main
from visionmtl.data.label_spaces import resolve_spaces
from visionmtl.data.loader import TrainLoader, val_loader
from visionmtl.datasets import open_datasets
from visionmtl.engine import checkpoint
from visionmtl.engine.checkpoint import open_model
from visionmtl.inference.predictor import picture, predict
from visionmtl.network import build_model
from visionmtl.ops.images import read_image
from visionmtl.ops.videos import read_frames

SMALL = [
    "data.train.0.num_images=4", "data.val.0.num_images=3", "data.train.0.size=[64,96]", "data.val.0.size=[64,96]",
    "data.size=[64,96]", "data.workers=0", "data.augment.brightness=0.4", "model.pyramid.channels=16",
]  # fmt: skip
NOISE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint of an untrained run."""
    run = config.load("configs/quickstart.yaml", SMALL)
    spaces = resolve_spaces(run.tasks, open_datasets(run.data.train))
    torch.manual_seed(0)
    net = build_model(run.model, run.tasks, spaces, run.data.size)
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "last.pt"
    plain = {name: space and space.plain() for name, space in spaces.items()}
    rest = {"spaces": plain, "net": net.state_dict(), "ema": None, "step": 7, "epoch": 1}
    checkpoint.save(path, {"run": run.model_dump(mode="json"), **rest})
    return path


@pytest.fixture(scope="module")
def opened(saved):
    return open_model(saved)


def drawn(saved, *arguments):
    return main(["visualize", str(saved), *map(str, arguments)])


def test_predictions_have_the_size_of_their_own_image(opened):
    found = predict(opened.net, [NOISE, NOISE[:20]], opened.run.data.size)

    assert [one["segmentation"].shape for one in found] == [(50, 70), (20, 70)]
    assert [one["depth"].shape for one in found] == [(50, 70), (20, 70)]
    assert found[0]["detection"].xyxy.shape[1] == 4


def test_predict_sees_what_validation_sees(opened):
    run, net = opened.run, opened.net
    batch = next(iter(val_loader(run.data, run.tasks, net.spaces, open_datasets(run.data.val), 1, workers=0)))
    with torch.inference_mode():
        expected = run.tasks["depth"].predict(net(batch.image)["depth"], batch.frames, run.data.size)

    found = predict(net, [batch.samples[0].image], run.data.size)

    assert (found[0]["depth"] == expected[0]).all()


def test_no_images_give_no_predictions(opened):
    assert predict(opened.net, [], opened.run.data.size) == []


def test_predict_refuses_what_is_not_an_rgb_image(opened):
    with pytest.raises(ValueError, match=r"image 1 is float32 \[50, 70, 3\]; uint8 .* is needed; read files"):
        predict(opened.net, [NOISE, NOISE.astype(np.float32)], opened.run.data.size)


def test_a_task_without_a_value_leaves_its_place_empty(opened):
    run, net = opened.run, opened.net
    prediction = predict(net, [NOISE], run.data.size)[0]

    one = picture(run.tasks, net.spaces, NOISE, {"prediction": prediction})
    two = picture(run.tasks, net.spaces, NOISE, {"prediction": prediction, "truth": {"depth": None}})

    assert two.shape[1] == one.shape[1] and two.shape[0] > one.shape[0]


def test_a_folder_a_glob_and_a_file_are_drawn_in_their_own_numbers(saved, tmp_path, capsys):
    for name in ("a.png", "b.jpg"):
        Image.fromarray(NOISE).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")

    assert drawn(saved, tmp_path, tmp_path / "*.jpg", tmp_path / "a.png", "--output", tmp_path / "out") == 0

    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["000_a.png", "001_b.png", "002_b.png", "003_a.png", "contact_sheet.png"]
    assert capsys.readouterr().out.count("written: ") == 5


def test_compare_draws_validation_images_into_the_run_folder(saved):
    assert drawn(saved, "--num", 2, "--tasks", "depth,segmentation") == 0

    files = sorted((saved.parent.parent / "samples" / "compare").iterdir())
    assert [file.name[:4] for file in files] == ["000_", "001_", "cont"]
    assert read_image(files[0]).shape[1] > 3 * 480  # the image and two tasks, enlarged to be legible


def test_data_draws_the_batch_that_training_sees_first(saved, tmp_path):
    assert drawn("configs/quickstart.yaml", *SMALL, "--mode", "data", "--num", 2, "--output", tmp_path) == 0
    assert drawn(saved, "--mode", "data", "--num", 2, "--output", tmp_path / "same") == 0

    first = next(tmp_path.glob("000_*.png"))
    assert first.read_bytes() == (tmp_path / "same" / first.name).read_bytes()
    order = np.random.default_rng([0, 0]).permutation(4)
    assert first.stem.endswith(f"{order[0]}")


def test_several_data_sets_are_drawn_in_the_shares_and_the_order_of_training(tmp_path):
    one = "{type: scenes, split: train, num_images: %d, size: [64, 96], name: %s, weight: %d}"
    mixed = f"data.train=[{one % (6, 'many', 1)},{one % (2, 'few', 9)}]"
    settings = [mixed, *SMALL[3:], "data.val.0.num_images=3", "data.val.0.size=[64,96]"]
    assert drawn("configs/quickstart.yaml", *settings, "--mode", "data", "--num", 6, "--output", tmp_path) == 0

    run = config.load("configs/quickstart.yaml", settings)
    sources = open_datasets(run.data.train)
    loader = TrainLoader(run.data, run.tasks, resolve_spaces(run.tasks, sources), sources, 1, run.seed)
    ids = [source.read(index).image_id for source in sources for index in range(len(source))]
    drawn_ids = [re.sub(r"[^A-Za-z0-9.-]+", "_", ids[index]) for index, _ in loader.draws(0)[:6]]
    assert [file.stem.partition("_")[2] for file in sorted(tmp_path.glob("0*.png"))] == drawn_ids


def test_a_setting_of_the_run_can_be_replaced(saved, tmp_path):
    assert drawn(saved, "data.val.0.num_images=1", "--output", tmp_path) == 0

    assert [file.name[:4] for file in tmp_path.iterdir()] == ["000_"]


def test_a_video_becomes_a_video(saved, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "in.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (70, 50))
    for _ in range(3):
        writer.write(NOISE)
    writer.release()

    assert drawn(saved, tmp_path / "in.avi", "--num", 2, "--output", tmp_path, "--tasks", "depth") == 0

    frames_per_s, frames = read_frames(str(tmp_path / "in.mp4"))
    assert frames_per_s == 10 and len(list(frames)) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.jpg"], "no image at 'nothing.jpg'; an image .*; check the path"),
        (["--tasks", "depht"], r"'depht' \(did you mean 'depth'\?\); this run has .*; correct --tasks"),
        (["--mode", "predict"], "predict was given 0 inputs; .*; name an image"),
        (["--num", "0"], "--num is 0; at least 1 is needed"),
        (["nothing.mp4"], "nothing.mp4 cannot be opened as a video; .*; check the path"),
        (["camera:front"], "names no camera; camera:0 is the first"),
    ],
)
def test_mistakes_are_explained(saved, tmp_path, capfd, arguments, said):
    assert drawn(saved, *arguments, "--output", tmp_path) == 1

    printed = " ".join(line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert re.search(said, printed)
