"""The Cityscapes reader and the scores against the official scripts, on drawn metas and on the real ones."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from write_cityscapes import write_cityscapes

from visionmtl.datasets.cityscapes import Cityscapes, CityscapesReader
from visionmtl.io.cityscapes import CITYSCAPES19, THINGS8
from visionmtl.metrics.segmentation import SegmentationMeter
from visionmtl.structures import IGNORE, Boxes


def opened(root: Path, split: str, *labels: str) -> CityscapesReader:
    return Cityscapes(root=str(root), split=split, labels=labels).build()


def rows(boxes: Boxes) -> list[str]:
    """Official: [x, y, width, height], category, crowd, area."""
    xywh = np.concatenate([boxes.xyxy[:, :2], boxes.xyxy[:, 2:] - boxes.xyxy[:, :2]], axis=1)
    ids = np.array(THINGS8.ids)[boxes.labels]
    return sorted(
        map(repr, zip(xywh.astype(int).tolist(), ids.tolist(), boxes.crowd.tolist(), boxes.area.tolist(), strict=True))
    )


def official_rows(annotation: dict) -> list[str]:
    things = [one for one in annotation["segments_info"] if one["category_id"] in THINGS8.ids]
    return sorted(repr((one["bbox"], one["category_id"], bool(one["iscrowd"]), float(one["area"]))) for one in things)


def perturbed(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shifted, with guesses where nothing is labelled and blocks of any class, one of them absent from the truth."""
    guess = np.where(truth == IGNORE, rng.integers(0, 19, truth.shape), truth).astype(np.uint8)
    guess = np.roll(guess, (3, 7), axis=(0, 1))
    height, width = truth.shape
    for _ in range(30):
        y, x = rng.integers(height), rng.integers(width)
        guess[y : y + height // 8, x : x + width // 8] = rng.integers(19)
    guess[:2] = 16  # trains, which no meta here has
    return guess


def check_scores(reader: CityscapesReader, root: Path, split: str, folder: Path) -> dict:
    """Our meter on perturbed predictions, and the official script on files of the same; returns ours."""
    script = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    meter, rng = SegmentationMeter(CITYSCAPES19), np.random.default_rng(0)
    predictions, truths = [], []
    for index in range(len(reader)):
        sample = reader.read(index)
        guess = perturbed(sample.segmentation, rng)
        meter.update(guess, sample)
        predictions.append(str(folder / f"{sample.image_id}.png"))
        assert cv2.imwrite(predictions[-1], np.array(CITYSCAPES19.ids, np.uint8)[guess])
        truths += map(str, (root / "gtFine" / split).glob(f"*/{sample.image_id}_gtFine_labelIds.png"))

    script.args.evalInstLevelScore, script.args.JSONOutput, script.args.quiet = False, False, True
    official, ours = script.evaluateImgLists(predictions, truths, script.args), meter.compute()
    ids = np.array(CITYSCAPES19.ids)
    assert (meter.confusion() == np.array(official["confMatrix"])[np.ix_(ids, ids)]).all()
    assert ours["miou"] == pytest.approx(official["averageScoreClasses"], abs=1e-12)
    for name, scores in ours["per_class"].items():
        theirs = official["classScores"][name]
        assert np.isnan(theirs) if scores["iou"] is None else scores["iou"] == theirs
    assert "train" in ours["absent_but_predicted"]
    return ours


def test_miou_is_that_of_the_official_script(tmp_path):
    write_cityscapes(tmp_path, num_train=0, num_val=3, size=(64, 128), parts=("labelIds",))
    ours = check_scores(opened(tmp_path, "val", "segmentation"), tmp_path, "val", tmp_path)
    assert 0 < ours["miou"] < 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_miou_on_the_real_frames_is_that_of_the_official_script(real_data, split, tmp_path):
    root = real_data / "cityscapes"
    ours = check_scores(opened(root, split, "segmentation"), root, split, tmp_path)
    print(f"\n{split}: miou {ours['miou']:.12f} over {ours['pixels']} pixels")


def test_real_depth_is_the_formula_in_float64(real_data):
    root = real_data / "cityscapes"
    reader, worst_m, measured = opened(root, "train", "depth_m"), 0.0, 0
    for sample in map(reader.read, range(len(reader))):
        if sample.depth_m is None:
            continue
        stem = f"train/{sample.image_id.split('_')[0]}/{sample.image_id}"
        codes = cv2.imread(str(root / f"disparity/{stem}_disparity.png"), cv2.IMREAD_UNCHANGED).astype(np.float64)
        labels = cv2.imread(str(root / f"gtFine/{stem}_gtFine_labelIds.png"), cv2.IMREAD_UNCHANGED)
        camera = json.loads((root / f"camera/{stem}_camera.json").read_text())
        known = (codes > 1) & ~np.isin(labels, [1, 2, 3])

        expected = np.zeros(codes.shape)
        expected[known] = camera["extrinsic"]["baseline"] * camera["intrinsic"]["fx"] / ((codes[known] - 1) / 256)
        assert (sample.depth_m[~known] == 0).all() and (sample.depth_m[known] > 0).all()
        worst_m, measured = max(worst_m, np.abs(sample.depth_m - expected).max()), measured + 1
    print(f"\nworst difference on {measured} metas: {worst_m:.2e} m")
    assert measured == 3 and worst_m < 1e-3


def test_real_boxes_are_those_of_the_official_panoptic_script(real_data, tmp_path, capsys):
    script = pytest.importorskip("cityscapesscripts.preparation.createPanopticImgs")
    (tmp_path / "train").symlink_to(real_data / "cityscapes" / "gtFine" / "train")
    script.convert2panoptic(str(tmp_path), str(tmp_path), setNames=["train"])
    content = json.loads((tmp_path / "cityscapes_panoptic_train.json").read_text())
    capsys.readouterr()

    official = {one["image_id"]: official_rows(one) for one in content["annotations"]}
    reader = opened(real_data / "cityscapes", "train", "boxes")
    ours = {sample.image_id: rows(sample.boxes) for sample in map(reader.read, range(len(reader))) if sample.boxes}
    print(f"\n{len(ours)} metas, {sum(map(len, ours.values()))} boxes")
    assert ours == official and len(ours) == 3


def test_real_validation_boxes_are_those_of_the_official_json(real_data):
    root = real_data / "cityscapes"
    content = json.loads((root / "gtFine" / "cityscapes_panoptic_val.json").read_text())
    official = {one["image_id"]: one for one in content["annotations"]}
    reader = opened(root, "val", "boxes", "segmentation")
    for sample in map(reader.read, range(len(reader))):
        assert rows(sample.boxes) == official_rows(official[sample.image_id])
        for label, name in enumerate(THINGS8.classes):  # the label map tells the same pixels
            pixels = (sample.segmentation == CITYSCAPES19.classes.index(name)).sum()
            assert pixels == sample.boxes.area[sample.boxes.labels == label].sum()
