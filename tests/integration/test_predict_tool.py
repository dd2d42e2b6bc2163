"""tools/predict.py: labels that the folder reader reads back as they were predicted, and official files."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import scene_run
import torch
import yaml
from contract import SIZE, decoder, random_maps
from write_folder import FolderData

from visionmtl.cli import eval as evaluate
from visionmtl.cli import predict
from visionmtl.data.loader import Data
from visionmtl.datasets import NamedDataset, open_datasets
from visionmtl.engine.checkpoint import open_model
from visionmtl.inference.predictor import load
from visionmtl.inference.pseudo_labels import Labeller, folder_sources, label
from visionmtl.inference.results_io import open_predictions
from visionmtl.io.images import read_image
from visionmtl.modeling.heads.aligned import Aligned
from visionmtl.run import load_data
from visionmtl.structures import IGNORE, ImageMeta, Sample
from visionmtl.tasks.base import Task
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.segmentation import Segmentation


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a network that is sure of some boxes and pixels."""
    folder = tmp_path_factory.mktemp("trained")
    return scene_run.save_sure(scene_run.run(folder), folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number, name in enumerate(("a.png", "room one/b.jpg", "room one/deep/a.png", "é.webp")):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        assert cv2.imwrite(str(file), cv2.resize(pixels, (70 - number, 50), interpolation=cv2.INTER_CUBIC))
    return folder


def run(*arguments: object) -> int:
    return predict.main([*map(str, arguments), "--device", "cpu"])


def samples(dataset: NamedDataset) -> dict[str, Sample]:
    return {one.image_id: one for one in map(dataset.read, range(len(dataset)))}


def opened(folder: Path) -> NamedDataset:
    """The written data set, through the data block beside it."""
    data = yaml.safe_load((folder / "data.yaml").read_text())["data"]
    whole = Data.model_validate({**data, "val": data["train"], "size": [64, 64]})
    return open_datasets(whole.train)[0]


@pytest.mark.parametrize("images", ["link", "copy", "refer"])
def test_labels_are_read_back_as_they_were_predicted(images: str, trained: Path, photos: Path, tmp_path: Path):
    out = tmp_path / "out"
    confidence = {"detection": 0.3, "segmentation": 0.4, "depth": 0.9}
    given = [f"--confidence={name}={value}" for name, value in confidence.items()]
    assert run(trained, photos, "--as-labels", out, "--images", images, *given) == 0

    net = open_model(trained).net
    labeller = Labeller(net, (64, 64), "fp32", confidence=confidence)
    wanted = {one.path: one for one in label(labeller, folder_sources(photos), 2, fill=False, failed=[])}
    read = samples(opened(out))
    assert set(read) == set(wanted) == {"a", "room one/b", "room one/deep/a", "é"}
    counts = [0, 0, 0]
    for name, one in wanted.items():
        boxes, ours = one.labels["boxes"], read[name].boxes
        assert ours is not None
        np.testing.assert_array_equal(ours.xyxy, boxes.xyxy)
        np.testing.assert_array_equal(ours.labels, boxes.labels)
        np.testing.assert_array_equal(ours.area, boxes.area)
        np.testing.assert_array_equal(read[name].segmentation, one.labels["segmentation"])
        millimetres = np.rint(one.labels["depth_m"].astype(np.float64) * 1000)
        np.testing.assert_array_equal(read[name].depth_m, (millimetres * 0.001).astype(np.float32))
        np.testing.assert_array_equal(read[name].image, read_image(photos / next(photos.rglob(f"{name}.*"))))
        counts[0] += len(boxes.labels)
        counts[1] += int((one.labels["segmentation"] == IGNORE).sum())
        counts[2] += int((one.labels["depth_m"] == 0).sum())
    assert all(counts), "some of each is there, or the test proves little"
    spaces = opened(out).provides
    for name, field in (("detection", "boxes"), ("segmentation", "segmentation")):
        assert net.spaces[name] is not None and spaces[field] is not None
        assert (spaces[field].name, spaces[field].classes) == (net.spaces[name].name, net.spaces[name].classes)
    file = out / "images" / "a.png"
    assert file.is_symlink() == (images == "link") and (out / "images").is_symlink() == (images == "refer")
    record = json.loads((out / "labels.json").read_text())
    assert record["labels"]["boxes"] == {"predicted": 4, "kept": 0} and len(record["sha256"]) == 64


def test_a_folder_that_is_referred_to_may_hold_more_images_than_were_labelled(trained, photos: Path, tmp_path: Path):
    assert run(trained, photos, "--as-labels", tmp_path / "out", "--images", "refer", "--num", "2") == 0
    read = samples(opened(tmp_path / "out"))
    assert len(read) == 4 and sum(one.depth_m is not None for one in read.values()) == 2


@pytest.mark.parametrize("lacking", [0, 1], ids=["all classes", "a class fewer"])
def test_a_data_set_keeps_its_labels_and_gets_those_it_lacks(trained: Path, tmp_path: Path, lacking: int):
    """Boxes of one image and depth of two are missing; segmentation is of other classes and stays as it is."""
    data = FolderData(tmp_path / "data")
    space = open_model(trained).net.spaces["detection"]
    assert space is not None
    categories = [{"id": number, "name": name} for number, name in enumerate(space.classes)][lacking:]
    content = json.loads((data.root / "train.json").read_text())
    content["annotations"] = [{**one, "category_id": 2} for one in content["annotations"]]
    content |= {"categories": categories, "images": content["images"][:3]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] < 4]
    data.annotate("train", content)
    for number in (1, 2):
        (data.root / f"depth/train/{number}.png").unlink()
    plain = data.settings("train")
    plain["boxes"] |= {"space": space.name, "missing": "unlabelled"}
    plain["depth"] |= {"missing": "unlabelled"}
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"data": {"train": [plain], "val": [plain], "size": [64, 64]}}))
    (before,) = open_datasets(load_data(config).train)
    out = tmp_path / "out"

    assert run(trained, config, "--as-labels", out, "--fill", "--tasks", "detection,depth") == 0

    own, filled = samples(before), samples(opened(out))
    assert set(own) == set(filled)
    for name, one in own.items():
        both = filled[name]
        assert both.boxes is not None and both.depth_m is not None
        np.testing.assert_array_equal(both.segmentation, one.segmentation)
        np.testing.assert_array_equal(both.image, one.image)
        if one.boxes is not None:
            np.testing.assert_array_equal(both.boxes.xyxy, one.boxes.xyxy)
            np.testing.assert_array_equal(both.boxes.labels, one.boxes.labels + lacking)
        if one.depth_m is not None:
            np.testing.assert_array_equal(both.depth_m, one.depth_m)
        else:
            assert (both.depth_m > 0).all()
    record = json.loads((out / "labels.json").read_text())
    assert record["labels"] == {
        "boxes": {"predicted": 1, "kept": 3}, "segmentation": {"predicted": 0, "kept": 4},
        "depth_m": {"predicted": 2, "kept": 2},
    }  # fmt: skip
    assert opened(out).provides["segmentation"].classes == ("floor", "wall")  # type: ignore[union-attr]


def test_labels_of_another_label_space_are_not_mixed(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = FolderData(tmp_path / "data")
    config = tmp_path / "mine.yaml"
    plain = data.settings("train")
    config.write_text(yaml.safe_dump({"data": {"train": [plain], "val": [plain], "size": [64, 64]}}))
    assert run(trained, config, "--as-labels", tmp_path / "out", "--fill") == 2
    assert "with the classes of folder_boxes, and task 'detection' has learnt those of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "the folder that stayed empty is gone"


def test_kept_labels_of_two_lists_of_classes_are_not_mixed(trained: Path, tmp_path: Path, capsys):
    plain = []
    for name in ("a", "b"):
        data = FolderData(tmp_path / name)
        settings = data.settings("train")
        plain.append({**settings, "name": name, "boxes": {**settings["boxes"], "space": f"boxes_{name}"}})
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"data": {"train": plain, "val": plain, "size": [64, 64]}}))

    assert run(trained, config, "--as-labels", tmp_path / "out", "--fill", "--tasks", "depth") == 2

    assert "data sets a and b label 'boxes' with the classes of boxes_a and of boxes_b" in capsys.readouterr().err


def test_where_the_data_of_a_config_lie_can_be_said(trained: Path, tmp_path: Path):
    data = FolderData(tmp_path / "data")
    plain = {**data.settings("train"), "root": "${data.root}"}
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"data": {"root": "???", "train": [plain], "val": [plain], "size": [64, 64]}}))

    assert run(trained, config, f"data.root={data.root}", "--output", tmp_path / "out", "--tasks", "depth") == 0

    assert len(list((tmp_path / "out" / "depth").rglob("*.png"))) == 4


def test_nothing_is_written_over_and_nothing_without_effect_is_taken(
    trained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    assert run(trained, photos, "--as-labels", full) == 2
    assert "is not an empty folder" in capsys.readouterr().err and [f.name for f in full.iterdir()] == ["mine.txt"]

    out = tmp_path / "out"
    cv2.imwrite(str(photos / "a.jpg"), np.zeros((9, 9, 3), np.uint8))
    for arguments, message in (
        (("--as-labels", out), "are both called 'a' without ending"),
        ((), "one of them is needed"),
        (("--output", out, "--fill"), "--fill would have no effect with --output"),
        (("--as-labels", out, "--fill"), "is for the data sets of a config"),
        (("--as-labels", out, "--confidence", "0.5"), "TASK=X is needed"),
        (("--as-labels", out, "--confidence", "depth=2"), "a number X from 0 to 1"),
        (("--as-labels", out, "--confidence", "depth=1", "--confidence", "depth=0"), "depth has 1 already; one is"),
        (("--as-labels", out, "--unsure", "0.7"), "a score from 0 to below that"),
        (("--as-labels", photos / "labels"), "whose files it would join; a folder outside of it is needed"),
        (("--output", photos / "room one" / "out"), "whose files it would join; a folder outside of it is needed"),
        (("--output", out, "--tasks", "depth", "--intrinsics", "9,9,0,0"), "depth do not predict boxes; leave"),
        (("--output", out), "two images are called 'a'; one submission holds each image once; rename one"),
    ):
        assert run(trained, photos, *arguments) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()


def test_files_of_several_data_sets_are_scored_under_the_images_own_ids(trained: Path, tmp_path: Path):
    data = FolderData(tmp_path / "data")
    sets = [{**data.settings("train"), "name": "rooms"}, {**data.settings("val"), "name": "yards"}]
    config = tmp_path / "mine.yaml"
    tasks = {"depth": {"type": "depth", "max_depth_m": 12.0}}
    both = {"train": sets, "val": sets, "size": [64, 64]}
    config.write_text(yaml.safe_dump({"model": {"encoder": {"name": "test_convnext"}}, "tasks": tasks, "data": both}))
    assert run(trained, config, "--output", tmp_path / "out", "--tasks", "depth") == 0

    scores = tmp_path / "scores.json"
    assert evaluate.main([str(config), "--from-predictions", str(tmp_path / "out"), "--json", str(scores)]) == 0

    assert {key for key in json.loads(scores.read_text())["results"] if "@" in key} == {"depth@rooms", "depth@yards"}


def test_predictions_go_to_official_files_too(trained: Path, photos: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert run(trained, photos, "--output", out, "--batch-size", 4) == 0
    predictor = load(trained, "cpu")
    sources = folder_sources(photos)
    results = predictor([one.file for one in sources if one.file])
    for name, task in predictor.net.tasks.items():
        file = out / (f"{name}.json" if task.field == "boxes" else name)
        predictions = open_predictions(file, task, predictor.net.spaces[name])
        for source, result in zip(sources, results, strict=True):
            found = predictions.read(Sample(image=result.image, image_id=source.path))[1]
            if task.field == "segmentation":
                np.testing.assert_array_equal(found, result.segmentation)
            if task.field == "depth_m":
                np.testing.assert_allclose(found, result.depth_m, atol=0.5 / 256)
            if task.field == "boxes" and result.boxes is not None:
                np.testing.assert_array_equal(found.xyxy, result.boxes.xyxy)


def test_a_damaged_image_ends_neither_labels_nor_predictions(
    trained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:99])
    for kind in ("--as-labels", "--output"):
        out = tmp_path / kind.strip("-")
        assert run(trained, photos, kind, out) == 2
        said = capsys.readouterr()
        assert "no predictions for 1 of the images:\n  cut" in said.err and f"written: {out}" in said.out
    assert list(samples(opened(tmp_path / "as-labels"))) == ["a", "room one/b", "room one/deep/a", "é"]


def test_a_submission_of_no_image_is_not_written(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (photos := tmp_path / "photos").mkdir()
    (photos / "cut.png").write_bytes(b"\x89PNG")
    assert run(trained, photos, "--output", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert "no predictions for 1 of the images:\n  cut" in said.err and "written" not in said.out
    assert not (tmp_path / "out").exists()


def test_linked_folders_are_read_and_hidden_ones_are_not(photos: Path, tmp_path: Path):
    (tmp_path / "more").mkdir()
    (photos / "a.png").rename(tmp_path / "more" / "c.png")
    (photos / "link").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(photos)
    (photos / ".thumbs").mkdir()
    (photos / ".thumbs" / "t.png").write_bytes(b"")
    assert [one.path for one in folder_sources(photos)] == ["link/c", "room one/b", "room one/deep/a", "é"]


def test_names_that_are_no_utf8_are_refused_before_the_work(
    trained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (photos / "a.png").rename(photos / "\udcff.png")
    for kind in ("--as-labels", "--output"):
        assert run(trained, photos, kind, tmp_path / "out") == 2
        assert "rename it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_depth_that_16_bits_do_not_hold_is_refused(
    trained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    far = ("tasks.depth.min_depth_m=70", "tasks.depth.max_depth_m=300")
    assert run(trained, photos, "--output", tmp_path / "out", *far) == 2
    assert "reaches 300 m, and 16 bits hold 256 m at 256 units a metre; 218 units or fewer" in capsys.readouterr().err
    assert run(trained, photos, "--output", tmp_path / "out", "--depth-units", 218, *far) == 0
    assert cv2.imread(str(tmp_path / "out/depth/a.png"), cv2.IMREAD_UNCHANGED).min() >= 70 * 218


# ---- what a confidence means ----

META = [ImageMeta(size=(4, 4), content_size=(4, 4))]


def test_pixels_below_their_confidence_are_not_labelled():
    raw = torch.tensor([0.9, 0.6, 0.5, 0.2]).logit().view(1, 1, 1, 4).expand(1, 1, 4, 4)
    raw = torch.cat([raw, torch.zeros_like(raw)], dim=1)  # the shares of class 0 are 0.9, 0.6, 0.5 and 0.2
    (labels,) = Segmentation().pseudo_labels(raw, None, META, (4, 4), 0.7, None)
    assert labels[0].tolist() == [0, IGNORE, IGNORE, 1] and labels.dtype == np.uint8


def test_depth_that_the_mirrored_view_does_not_confirm_is_not_labelled():
    task = Depth()
    one = torch.tensor([1.0, 2.0, 4.0, 8.0]).log().expand(1, 1, 4, 4)
    mirrored = torch.tensor([1.0, 1.9, 2.0, 8.0]).log().flip(-1).expand(1, 1, 4, 4)
    assert task.labels_need_mirror(0.9) and not task.labels_need_mirror(0)
    (labels,) = task.pseudo_labels(one, mirrored, META, (4, 4), 0.9, None)
    assert labels[0].tolist() == pytest.approx([1, (2 * 1.9) ** 0.5, 0, 8])


def test_boxes_between_two_scores_are_neither_right_nor_wrong():
    task = Detection(head=Aligned(levels=(3, 4), num_convs=1), max_iou=1, max_detections=1000)
    with torch.no_grad():
        raw = decoder(task)(random_maps(task.levels, 1))
    raw = {**raw, "logits": raw["logits"] * 0 + torch.linspace(-3, 3, raw["logits"].shape[1])[:, None]}
    metas = [ImageMeta(size=SIZE, content_size=SIZE)]
    ((found,), (all_of_them,)) = (task.pseudo_labels(raw, None, metas, SIZE, 0.6, unsure) for unsure in (0.3, None))
    scores = task.predict(raw, metas, SIZE)[0].scores
    assert len(found.labels) == (scores >= 0.3).sum() and found.crowd.sum() == ((scores >= 0.3) & (scores < 0.6)).sum()
    assert len(all_of_them.labels) == (scores >= 0.6).sum() > 0 and not all_of_them.crowd.any() and found.crowd.any()
    sides = found.xyxy[:, 2:] - found.xyxy[:, :2]
    np.testing.assert_allclose(found.area, sides.prod(axis=1), rtol=1e-6)


def test_a_task_that_cannot_label_says_so():
    class Other(Depth, frozen=True):
        pseudo_labels = Task.pseudo_labels

    with pytest.raises(ValueError, match=r"does not say how its predictions become labels.*--tasks"):
        Other().pseudo_labels(torch.zeros(1), None, META, (4, 4), 0.5, None)
