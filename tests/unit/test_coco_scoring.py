"""COCO results scored against annotations: ids meet in every form, masks count as masks, spoilt files are named."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from visionmtl.metrics.coco_ap import official_lines, score_files

SIZE = 96, 128  # H, W
ROW = {"image_id": 7, "category_id": 3, "bbox": [0, 0, 50, 50], "score": 0.5}


def save(folder: Path, rows, truth) -> tuple[Path, Path]:
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "rows.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return folder / "rows.json", folder / "truth.json"


def coco_files(folder: Path, rows, **changes) -> tuple[Path, Path]:
    truth = {
        "images": [{"id": 7, "height": 90, "width": 90}],
        "categories": [{"id": 3, "name": "car"}, {"id": 4, "name": "bus"}],
        # an id of 0 reads as "unmatched" in pycocotools: a perfect box would score 0
        "annotations": [{"id": 0, "image_id": 7, "category_id": 3, "bbox": [0, 0, 50, 50], "area": 2500}],
        **changes,
    }
    return save(folder, rows, truth)


def drawn(masks: bool = False) -> tuple[list[dict], dict]:
    """Results that hit some of 14 objects on 12 images, and the annotations."""
    rng, truth, rows = np.random.default_rng(0), [], []
    for number in range(14):
        x, y, w, h = (float(value) for value in rng.integers(5, 40, 4))
        one = {"image_id": number % 12 + 1, "category_id": 1 + number % 2, "bbox": [x, y, w, h]}
        truth.append({**one, "id": number + 1, "area": w * h, "iscrowd": int(number == 13)})
        rows.append({**one, "bbox": [x + number % 4, y, w, h], "score": float(rng.random())})
    for one in (*truth, *rows) if masks else ():
        x, y, w, h = one["bbox"]
        one["segmentation"] = rle.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], *SIZE)[0]
        one["segmentation"]["counts"] = one["segmentation"]["counts"].decode()
    images = [{"id": number, "height": SIZE[0], "width": SIZE[1]} for number in range(1, 13)]
    categories = [{"id": 1, "name": "box"}, {"id": 2, "name": "ball"}]
    return rows, {"images": images, "annotations": truth, "categories": categories}


def official_ap(rows, truth, kind: str = "bbox") -> float:
    """By pycocotools alone, from ids that are numbers."""
    index = COCO()
    index.dataset = copy.deepcopy(truth)
    index.createIndex()
    evaluation = COCOeval(index, index.loadRes(copy.deepcopy(rows)), kind)
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    return float(evaluation.stats[0])


@pytest.mark.parametrize("of_results", [int, str, float, "{:>012}".format])
@pytest.mark.parametrize("of_images", [int, str])
@pytest.mark.parametrize("of_annotations", [int, str, float])
def test_ids_meet_in_every_form(tmp_path, of_results, of_images, of_annotations):
    rows, truth = drawn()
    expected = official_ap(rows, truth)
    assert 0.2 < expected < 0.9

    for one in rows:
        one["image_id"], one["category_id"] = of_results(one["image_id"]), of_results(one["category_id"])
    for one in truth["annotations"]:
        one["image_id"], one["category_id"] = of_annotations(one["image_id"]), of_annotations(one["category_id"])
    for one in (*truth["images"], *truth["categories"]):
        one["id"] = of_images(one["id"])

    assert score_files(*save(tmp_path, rows, truth))[1]["ap"] == pytest.approx(expected, abs=1e-12)


def test_ids_may_be_texts_throughout(tmp_path):
    rows, truth = drawn()
    expected = official_ap(rows, truth)
    for one in (*rows, *truth["annotations"]):
        one["image_id"], one["category_id"] = f"caf\u00e9 {one['image_id']:02}", "ab"[one["category_id"] - 1]
    for one in truth["images"]:
        one["id"] = f"cafe\u0301 {one['id']:02}"  # the same on the screen
    for one in truth["categories"]:
        one["id"] = "ab"[one["id"] - 1]

    kind, result, notes = score_files(*save(tmp_path, rows, truth))

    assert result["ap"] == pytest.approx(expected, abs=1e-12) and kind == "bbox" and not notes


@pytest.mark.parametrize("form", ["compressed", "counts", "polygons"])
def test_masks_are_scored_in_every_form_as_pycocotools_scores_them(tmp_path, form):
    rows, truth = drawn(masks=True)
    expected = official_ap(rows, truth, "segm")
    assert 0.2 < expected < 0.9
    for one in (*rows, *truth["annotations"]):
        one["segmentation"] = in_form(one, form)
    for row in rows:
        del row["bbox"]

    kind, result, notes = score_files(*save(tmp_path, rows, truth))

    assert kind == "segm" and result["ap"] == pytest.approx(expected, abs=1e-12) and not notes


def in_form(one: dict, form: str):
    if form == "polygons":
        x, y, w, h = one["bbox"]
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if form == "compressed":
        return one["segmentation"]
    pixels = rle.decode({**one["segmentation"], "counts": one["segmentation"]["counts"].encode()}).T.ravel()
    ends = np.flatnonzero(np.diff(pixels, prepend=0))
    return {"size": [*SIZE], "counts": np.diff([0, *ends, pixels.size]).tolist()}


def test_results_with_boxes_and_masks_are_scored_as_asked_and_as_boxes_with_a_note(tmp_path):
    rows, truth = drawn(masks=True)
    for row in rows:
        row["bbox"] = [0, 0, 1, 1]
    files = save(tmp_path, rows, truth)

    assert score_files(*files, kind="segm")[1]["ap"] > 0.2
    kind, result, notes = score_files(*files)
    assert (kind, result["ap"]) == ("bbox", 0) and "its boxes are scored; --iou-type segm scores the masks" in notes[0]


def test_results_are_scored_and_what_does_not_count_is_counted(tmp_path):
    rows = [ROW, {**ROW, "category_id": 99}, {**ROW, "score": float("nan")}]

    kind, result, _ = score_files(*coco_files(tmp_path, rows))

    assert kind == "bbox"
    assert result["ap"] == pytest.approx(1)
    assert (result["ignored"], result["dropped"], result["absent"]) == (1, 1, ["bus"])
    assert official_lines(result)[3].endswith("area= small | maxDets=100 ] = -1.000")


def test_no_results_score_zero(tmp_path):
    assert score_files(*coco_files(tmp_path, []))[1]["ap"] == 0


def test_a_truth_without_area_or_crowd_flag_counts_as_in_training(tmp_path):
    annotation = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 50, 50]}

    result, notes = score_files(*coco_files(tmp_path, [ROW], annotations=[annotation]))[1:]

    assert result["ap"] == result["ap_medium"] == pytest.approx(1) and result["ap_small"] is None and not notes


def test_a_mask_without_area_has_that_of_its_pixels(tmp_path):
    small = {"size": [90, 90], "counts": [0, 100, 8000]}  # less than 32 x 32 pixels in a box of 90 x 90
    annotation = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 90, 90], "segmentation": small}
    row = {"image_id": 7, "category_id": 3, "score": 0.5, "segmentation": small}

    result = score_files(*coco_files(tmp_path, [row], annotations=[annotation]))[1]

    assert result["ap_small"] == pytest.approx(1) and result["ap_large"] is None


def test_more_classes_than_can_be_learned_are_scored(tmp_path):
    categories = [{"id": number, "name": str(number)} for number in range(1, 1204)]  # as many as LVIS has
    assert score_files(*coco_files(tmp_path, [ROW], categories=categories))[1]["ap"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "note", "ap"),
    [
        ({"iscrowd": None}, "1 annotations have null as iscrowd", 1),
        ({"area": None}, "1 annotations have null as area", 1),
        ({"area": "2500"}, "1 areas are negative or no number", 1),
        ({"image_id": 99}, "dropped 1 of 2 boxes: 1 of images the file does not list", 1),
        ({"bbox": [float("nan"), 0, 1, 1]}, "dropped 1 of 2 boxes: 1 with NaN or infinite", 1),
        # official evaluation keeps these two as objects to find
        ({"bbox": [5, 5, 0, 9]}, "1 boxes without width or height (scored", 0.5),
        ({"bbox": [95, 5, 9, 9]}, "1 boxes outside their image (scored", 0.5),
    ],
)
def test_what_is_odd_in_the_truth_is_told(tmp_path, change, note, ap):
    good = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 0}
    odd = {**good, "id": 2, "bbox": [60, 60, 20, 20], "area": 400, **change}
    rows = (
        [ROW, {**ROW, "bbox": odd["bbox"]}] if ap == 1 and "bbox" not in change and "image_id" not in change else [ROW]
    )

    _, result, notes = score_files(*coco_files(tmp_path, rows, annotations=[good, odd]))

    assert len(notes) == 1 and note in notes[0]
    assert result["ap"] == pytest.approx(ap, abs=0.01)


def test_image_ids_that_are_file_names_meet_the_images_of_these_names(tmp_path):
    """Numbered from the last image on, as a labelling program may, whatever the files are called."""
    rows, truth = drawn()
    expected = official_ap(rows, truth)
    for image in truth["images"]:
        image["file_name"], image["id"] = f"rooms/{image['id']:04}.jpg", 13 - image["id"]
    for one in truth["annotations"]:
        one["image_id"] = 13 - one["image_id"]
    files = save(tmp_path, rows, truth)

    _, result, notes = score_files(*files, by_name=True)
    assert result["ap"] == pytest.approx(expected, abs=1e-12) and not notes
    _, result, notes = score_files(*files)
    assert result["ap"] < expected / 2
    assert "is an id of" in notes[0] and notes[0].endswith("the file name of another image there; ids count")
    for image in truth["images"]:
        image["id"] = f"image {image['id']}"
    for one in truth["annotations"]:
        one["image_id"] = f"image {one['image_id']}"
    _, result, notes = score_files(*save(tmp_path, rows, truth))
    assert result["ap"] == pytest.approx(expected, abs=1e-12)
    assert "has file names of" in notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": [{"id": 3}]}, r"categories\[0\] is .* a text as name"),
        ({"images": [{"height": 90, "width": 90}]}, r"images\[0\] is .* a whole number or a text as id"),
        ({"images": [{"id": 7}, {"id": "007"}]}, r"images\[1\] is .* its own id"),
        ({"annotations": [[1]]}, r"annotations\[0\] is \[1\]; it needs an object"),
        ({"bbox": None}, "four numbers"),
        ({"bbox": ["10", 10, 30, 30]}, "four numbers"),
        ({"iscrowd": 2}, "0 or 1 as iscrowd"),
        ({"iscrowd": "0"}, "0 or 1 as iscrowd"),
        ({"category_id": [1]}, "a category_id that `categories` lists"),
        ({"category_id": 9}, "a category_id that `categories` lists"),
        ({"image_id": [1]}, "a whole number or a text as image_id"),
    ],
)
def test_a_spoilt_truth_is_named(tmp_path, change, message):
    annotation = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 50, 50]}
    lists = change if change.keys() & {"images", "categories", "annotations"} else {}
    files = coco_files(tmp_path, [ROW], **({"annotations": [{**annotation, **change}]} | lists))
    with pytest.raises(ValueError, match=rf"truth\.json: .*{message}.*; correct"):
        score_files(*files)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[{", "is no complete JSON"),
        ({"annotations": []}, "holds a dict; COCO results are a list"),
        ([[1]], r"entry\[0\] is \[1\]; it needs an object"),
        ([{**ROW, "bbox": [1, 2, 3]}], r"entry\[0\] is .* it needs bbox"),
        ([ROW, {**ROW, "bbox": ["1", 2, 3, 4]}], r"entry\[1\] is .* it needs bbox"),
        ([{**ROW, "bbox": [10**400, 1, 1, 1]}], r"entry\[0\] is .* it needs bbox"),
        ([{**ROW, "score": "0.5"}], r"entry\[0\] is .* a number as score"),
        ([{**ROW, "score": 10**400}], r"entry\[0\] is .* a number as score"),
        ([{**ROW, "category_id": [3]}], r"entry\[0\] is .* as category_id"),
        ([{**ROW, "image_id": True}], r"entry\[0\] is .* as image_id"),
        ([{**ROW, "image_id": 8}], "results for 1 image.s. that .* does not list, the first is 8"),
        ([ROW, {"image_id": 7, "category_id": 3, "score": 1, "segmentation": {}}], "masks alone in others"),
    ],
)
def test_broken_results_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        score_files(*coco_files(tmp_path, rows))


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [90, 91], "counts": [90 * 91]},  # of another size
        {"size": [90, 90], "counts": [90 * 90 - 1]},  # cut short
        {"size": [90, 90], "counts": "P`0"},
        {"size": [90, 90], "counts": [-1, 8101]},
        {"size": [0, 0], "counts": ""},  # pycocotools ends the process with SIGFPE
        {"size": [0, 0], "counts": [0]},
        {"size": [90, 90]},
        {"counts": [8100]},
        [],
        [[1e9, 0, 1, 1, 5, 5]],
    ],
)
@pytest.mark.parametrize("where", ["results", "truth"])
def test_a_mask_that_does_not_cover_its_image_is_named(tmp_path, segmentation, where):
    whole = {"size": [90, 90], "counts": [0, 8100]}
    of_row, of_truth = (segmentation, whole) if where == "results" else (whole, segmentation)
    row = {"image_id": 7, "category_id": 3, "score": 0.5, "segmentation": of_row}
    annotation = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [0, 0, 90, 90], "segmentation": of_truth}
    with pytest.raises(ValueError, match=r"\[0\] is .* it needs a segmentation"):
        score_files(*coco_files(tmp_path, [row], annotations=[annotation]))


@pytest.mark.parametrize("change", [{"images": [{"id": 7}]}, {"images": [{"id": 7, "height": 90, "width": 90}]}])
def test_masks_need_masks_and_sizes_in_the_truth(tmp_path, change):
    row = {"image_id": 7, "category_id": 3, "score": 0.5, "segmentation": {"size": [90, 90], "counts": [0, 8100]}}
    with pytest.raises(ValueError, match=r"annotations\[0\] is .* a segmentation .* an image with height and width"):
        score_files(*coco_files(tmp_path, [row], **change))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_cocos_reference_case_gives_the_published_lines_letter_by_letter(real_data, kind):
    folder = real_data / "coco" / "eval_reference"
    published = (folder / "val2014_fake_eval_res.txt").read_text().splitlines()
    start = published.index(f"type={kind}") + 3

    found, result, _ = score_files(
        folder / f"instances_val2014_fake{kind}100_results.json", folder / "instances_val2014_100.json"
    )

    assert found == kind
    assert official_lines(result) == published[start : start + 12]
