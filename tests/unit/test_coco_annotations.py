"""Annotation files of COCO's formats: flat arrays, and every kind of bad entry answered."""

import json
import pickle

import numpy as np
import pytest
from pycocotools import mask as rle

from visionmtl.io import index
from visionmtl.io.coco.annotations import _covers, read_boxes
from visionmtl.io.coco.panoptic import read_segments

SIZE = 40, 60  # H, W
SQUARE = [[10, 10, 20, 10, 20, 20, 10, 20]]


def box(image: int, xywh: list[float], category: int = 3, **more) -> dict:
    return {"id": 1, "image_id": image, "category_id": category, "bbox": xywh, "area": 5.0, "iscrowd": 0, **more}


def content(*annotations: dict, **more) -> dict:
    images = [{"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]} for i in (70, 2, 9)]
    categories = [{"id": 7, "name": "sofa"}, {"id": 3, "name": "chair"}]
    numbered = [{**one, "id": i} if one.get("id") == 1 else one for i, one in enumerate(annotations, start=1)]
    return {"images": images, "categories": categories, "annotations": numbered, **more}


@pytest.fixture
def packed(tmp_path):
    def pack(what: dict, **options):
        (tmp_path / "a.json").write_text(json.dumps(what))
        return read_boxes(tmp_path / "a.json", **options)

    return pack


def test_boxes_reach_their_image_in_the_order_of_the_file(packed):
    found = packed(content(box(9, [9, 0, 1, 1]), box(70, [7, 0, 1, 2], 7), box(9, [8, 0, 1, 1], iscrowd=1)))
    assert [found.of(row).xyxy[:, 0].tolist() for row in range(3)] == [[7], [], [9, 8]]
    assert [found.name(row) for row in range(3)] == ["70.jpg", "2.jpg", "9.jpg"] and found.size(0) == SIZE
    assert found.of(0).xyxy.tolist() == [[7, 0, 8, 2]] and found.of(2).crowd.tolist() == [False, True]
    assert found.categories == ((3, "chair"), (7, "sofa")) and found.of(0).labels.tolist() == [1]
    assert found.of(1).xyxy.shape == (0, 4) and not found.report()


def test_what_is_handed_out_may_be_changed(packed):
    found = packed(content(box(9, [9, 0, 1, 1])))
    found.of(2).xyxy[:] = 0
    assert found.of(2).xyxy.tolist() == [[9, 0, 10, 1]]


@pytest.mark.parametrize(
    ("xywh", "why"),
    [
        ([float("nan"), 0, 1, 1], "NaN or infinite"),
        ([0, 0, float("inf"), 1], "NaN or infinite"),
        ([0, 0, 1e39, 1], "NaN or infinite"),  # in float32
        ([5, 5, 0, 3], "without width or height"),
        ([5, 5, 3, -2], "without width or height"),
        ([50, 5, 1e-7, 2], "without width or height"),  # in float32
        ([60, 5, 3, 3], "outside their image"),
        ([5, -4, 3, 4], "outside their image"),
    ],
)
def test_a_box_that_teaches_nothing_is_dropped_and_counted(packed, xywh, why):
    found = packed(content(box(2, xywh), box(2, [1, 1, 2, 2])))
    assert found.of(1).xyxy.tolist() == [[1, 1, 3, 3]]
    assert len(found.report()) == 1 and "dropped 1 of 2 boxes: 1 " in found.report()[0] and why in found.report()[0]


def test_boxes_of_images_that_are_not_listed_are_dropped_and_counted(packed):
    found = packed(content(box(2, [1, 1, 2, 2]), box(4, [1, 1, 2, 2])))
    assert "dropped 1 of 2 boxes: 1 of images the file does not list" in found.report()[0]


@pytest.mark.parametrize(
    ("annotations", "note"),
    [
        ([box(2, [50, 1, 20, 2])], "1 boxes reach more than 1 px beyond their image"),
        ([box(2, [50, 1, 2, 2], area=-3)], "1 areas are negative"),
        ([box(2, [5, 1, 2, 2], area=float("nan"))], "1 areas are negative or no number"),
        ([box(2, [5, 1, 2, 2], id=8), box(9, [5, 1, 2, 2], id=8)], "1 annotation ids repeat"),
        ([box(2, [5, 1, 2, 2], id=0)], "1 annotations have id 0"),
    ],
)
def test_what_is_odd_is_kept_and_counted(packed, annotations, note):
    found = packed(content(*annotations))
    assert len(found.report()) == 1 and note in found.report()[0]
    assert len(found.arrays["labels"]) == len(annotations) and (found.arrays["area"] > 0).all()


def test_an_absent_area_is_the_boxs_and_an_absent_crowd_flag_means_none(packed):
    bare = {"id": 1, "image_id": 2, "category_id": 7, "bbox": [1, 2, 3, 4.5]}
    found = packed(content(bare)).of(1)
    assert found.area.tolist() == [13.5] and found.crowd.tolist() == [False]


def test_a_null_area_or_crowd_flag_is_taken_for_an_absent_one_with_a_note(packed):
    found = packed(content(box(2, [1, 2, 3, 4.5], area=None, iscrowd=None)))
    assert found.of(1).area.tolist() == [13.5] and found.of(1).crowd.tolist() == [False]
    assert [line.partition(": ")[2] for line in found.report()] == [
        "1 annotations have null as area (the box's own is taken)",
        "1 annotations have null as iscrowd (taken as 0)",
    ]


def test_sizes_may_be_absent_and_limit_nothing_then(packed):
    found = packed(content(box(2, [900, 1, 20, 2]), images=[{"id": 2, "file_name": "a/b.jpg"}]))
    assert found.of(0).xyxy[0, 0] == 900 and found.size(0) == (0, 0)


def test_a_box_outside_an_image_whose_size_only_the_image_tells_is_refused(packed):
    found = packed(content(box(2, [1, 1, 2, 2]), box(2, [900, 1, 20, 2]), images=[{"id": 2, "file_name": "2.jpg"}]))
    assert len(found.of(0, (40, 901)).labels) == 2
    with pytest.raises(ValueError, match=r"a box of '2.jpg' is \[900.0, 1.0, 920.0, 3.0\] .*, the image \(40, 60\)"):
        found.of(0, SIZE)


def image(**more) -> list[dict]:
    return [{"id": 2, "file_name": "2.jpg", "height": 40, "width": 60}, {"id": 3, "file_name": "3.jpg", **more}]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (content(box(2, [0, 0, 1, 1], 5)), r"annotations\[0\] is .*; it needs a category_id that `categories` lists"),
        (content(box(2, [0, 0, 1])), r"annotations\[0\] .* four numbers x, y, width, height as bbox"),
        (content(box(2, [0, 0, 1, None])), "four numbers"),
        (content({"id": 1, "image_id": 2, "category_id": 3}), "four numbers"),
        (content(box([2], [0, 0, 1, 1])), "a whole number or a text as image_id"),
        (content(annotations=["text"]), r"annotations\[0\] is \"text\"; it needs an object"),
        (content(images=image(id=2)), r"images\[1\] .* needs its own id, which no other entry has"),
        (content(images=image(file_name="2.jpg")), "its own file_name"),
        (content(images=image(file_name="../3.jpg")), r"images\[1\] .* without '\.\.'"),
        (content(images=image(file_name="/3.jpg")), "a file_name relative to the folder"),
        (content(images=image(file_name="a\\..\\3.jpg")), "a file_name relative to the folder"),
        (content(images=image(file_name=None)), "a file_name relative to the folder"),
        (content(images=image(height=-4, width=3)), "height and width in whole pixels, or neither"),
        (content(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), r"categories\[1\] .* no other entry"),
        (content(categories=[{"id": 1}]), "a text as name"),
        ({"images": []}, "has no list 'annotations', 'categories'"),
        ([{"image_id": 3, "score": 1}], r"has no list 'images', .* \(results and image_info files are none\)"),
    ],
)
def test_what_cannot_be_meant_is_named_with_what_is_needed(packed, what, message):
    with pytest.raises(ValueError, match=message):
        packed(what)


@pytest.mark.parametrize("text", ['{"images": [{"id": 1, "file', "", "\udc80"])
def test_a_file_cut_short_is_named(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"a.json is no complete JSON: .*; download or write it again"):
        read_boxes(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "<annotation><folder>VOC</folder>", "is XML, such as Pascal VOC's; JSON is needed; convert it"),
        ("a.xml", "<annotation>", "is XML"),
        ("a.csv", "image,x,y,w,h\n1.jpg,1,2,3,4", "is a .csv file that begins with 'image,x,y,w,h"),
        ("a.txt", "0 0.5 0.5 0.1 0.1", "is a .txt file that begins with '0 0.5"),
    ],
)
def test_a_file_of_another_format_is_called_what_it_is(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_boxes(tmp_path / name)


def test_a_folder_is_called_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"found no .*, but a folder of that name; one annotation file .*; check"):
        read_boxes(tmp_path)


ROBOFLOW = [{"id": 0, "name": "toys", "supercategory": "none"}, {"id": 3, "name": "ball", "supercategory": "toys"}]


def test_names_of_categories_are_one_class_in_either_unicode_form(packed):
    decomposed, composed = "cafe\u0301", "caf\u00e9"
    assert packed(content(categories=[{"id": 3, "name": decomposed}])).categories == ((3, composed),)
    with pytest.raises(ValueError, match="needs its own name, which no other entry has"):
        packed(content(categories=[{"id": 3, "name": decomposed}, {"id": 7, "name": composed}]))


def test_a_category_0_that_only_names_the_supercategory_is_left_out_with_a_note(packed):
    found = packed(content(box(2, [1, 1, 2, 2]), categories=ROBOFLOW))
    assert found.categories == ((3, "ball"),) and found.of(1).labels.tolist() == [0]
    assert found.report()[0].endswith("category with id 0 only names the supercategory of all others and has no "
                                      "annotation (left out)")  # fmt: skip
    same_name = [{**ROBOFLOW[0], "name": "ball"}, {**ROBOFLOW[1], "supercategory": "ball"}]
    assert packed(content(categories=same_name)).categories == ((3, "ball"),)


@pytest.mark.parametrize("category", [0, "0", 0.0])
def test_a_category_0_that_is_annotated_is_a_class(packed, category):
    found = packed(content(box(2, [1, 1, 2, 2], category), categories=ROBOFLOW))
    assert found.categories == ((0, "toys"), (3, "ball")) and not found.report()


def test_categories_to_learn_have_numbers(packed):
    found = packed(content(categories=[{"id": "cat", "name": "cat"}, {"id": "2", "name": "dog"}]))
    with pytest.raises(ValueError, match=r"categories has id 'cat'; whole numbers .*; number the categories"):
        _ = found.categories


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"found no .*a.json; .* check the path"):
        read_boxes(tmp_path / "a.json")


def test_polygons_and_run_lengths_of_both_kinds_give_the_same_mask(packed):
    code = rle.frPyObjects(SQUARE, *SIZE)[0]
    pixels = rle.decode(code).astype(bool)
    runs = np.diff(np.flatnonzero(np.diff(pixels.T.ravel(), prepend=False, append=False)), prepend=0)
    counts = [*runs.tolist(), SIZE[0] * SIZE[1] - int(runs.sum())]
    kinds = [SQUARE, {"size": [*SIZE], "counts": code["counts"].decode()}, {"size": [*SIZE], "counts": counts}]
    found = packed(content(*(box(2, [10, 10, 10, 10], segmentation=kind) for kind in kinds)), masks=True)
    for mask in found.masks(1):
        assert mask.dtype == bool and (mask == pixels).all() and mask[10:20, 10:20].all() and mask.sum() == 100


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (40, 60), (300, 500)])
def test_compressed_run_lengths_are_sound_whole_and_not_when_cut(shape):
    rng = np.random.default_rng(0)
    for share in (0, 0.02, 0.5, 1):
        code = rle.encode(np.asfortranarray(rng.random(shape) < share).astype(np.uint8))["counts"]
        pixels = shape[0] * shape[1]
        assert _covers(code, pixels) and not _covers(code, pixels + 1)
        assert not any(_covers(code[:length], pixels) for length in range(0, len(code), max(1, len(code) // 50)))


def test_masks_keep_to_their_boxes_when_some_are_dropped(packed):
    dropped = box(2, [0, 0, 0, 0], segmentation=[[0, 0, 60, 0, 60, 40]])
    found = packed(content(dropped, box(2, [10, 10, 10, 10], segmentation=SQUARE)), masks=True)
    assert [mask.sum() for mask in found.masks(1)] == [100]


def test_a_polygon_of_two_points_covers_nothing(packed):
    found = packed(content(box(2, [10, 10, 10, 10], segmentation=[[1, 2, 30, 30]])), masks=True)
    assert not found.masks(1)[0].any()


@pytest.mark.parametrize(
    "segmentation",
    [None, "text", [[1, 2, float("nan"), 4, 5, 6]], [[1e9, 2, 3, 4, 5, 6]], {"size": [1, 2], "counts": [2]},
     {"size": [*SIZE], "counts": [7]}, [1, 2, 3, 4, 5, 6], {"size": [*SIZE], "counts": [True, 2399]},
     {"size": [*SIZE], "counts": ""}, {"size": [*SIZE], "counts": "0000"}, {"size": [*SIZE], "counts": "é"},
     {"size": [*SIZE], "counts": "o" * 99}, {"size": [*SIZE], "counts": "\x01\x02"}],
)  # fmt: skip
def test_a_mask_that_cannot_be_meant_is_named_when_masks_are_wanted(packed, segmentation):
    what = content(box(2, [10, 10, 10, 10], segmentation=segmentation))
    assert len(packed(what).of(1).labels) == 1
    with pytest.raises(ValueError, match=r"annotations\[0\] is .* it needs a segmentation"):
        packed(what, masks=True)


def test_a_second_start_reads_the_index_and_reports_the_same(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MIN_BYTES", 0)
    monkeypatch.setenv("VISIONMTL_CACHE", str(tmp_path / "cache"))
    what = content(box(9, [9, 0, 1, 1]), box(2, [9, 0, 0, 1]))
    first = packed(what)
    monkeypatch.setattr("visionmtl.io.coco.annotations.read_lists", None)
    second = pickle.loads(pickle.dumps(packed(what)))
    assert second.of(2).xyxy.tolist() == first.of(2).xyxy.tolist() == [[9, 0, 10, 1]]
    assert second.report() == first.report() != [] and second.categories == first.categories


def test_panoptic_annotations_are_once_an_image_and_of_listed_classes(tmp_path):
    def read(*annotations):
        (tmp_path / "p.json").write_text(json.dumps(content(*annotations)))
        return read_segments(tmp_path / "p.json")

    good = {"image_id": 2, "file_name": "2.png", "segments_info": [{"id": 300, "category_id": 7}]}
    assert [read(good).png(row) for row in range(3)] == [None, "2.png", None]
    for wrong, message in [
        ({"image_id": 5}, "an image_id that `images` lists, once"),
        ({"file_name": "../2.png"}, "a file_name relative"),
        ({"segments_info": None}, "a list of objects"),
        ({"segments_info": [{"id": 300, "category_id": 9}]}, r"segments_info\[0\] .* a category_id that `categories`"),
        ({"segments_info": [{"id": "x", "category_id": 7}]}, "an id of 1 to 16777215"),
    ]:
        with pytest.raises(ValueError, match=message):
            read({**good, **wrong})
    with pytest.raises(ValueError, match=r"annotations\[1\] .* once"):
        read(good, good)
