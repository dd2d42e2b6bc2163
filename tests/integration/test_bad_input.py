"""Annotations, lists, units and names that cannot be meant, in every reader of files: refused by name, or counted.

Together with `test_bad_pictures` this is a matrix of items and readers; the last test holds it against the list of
what must be answered, so that nothing is left out unseen.
"""

from pathlib import Path

import pytest
from bad_rows import Row, change, check, content, cut, make_folder, put, remove, rows, twice
from drawn_layouts import LAYOUTS
from test_bad_pictures import ROWS as PICTURES
from test_bad_pictures import drawn  # noqa: F401

FLAT = "coco folder nyuv2"  # boxes as COCO's instances format has them
BOXES = f"{FLAT} cityscapes"
TEXTS = [(BOXES, "boxes"), ("coco", "segments"), ("cityscapes", "camera"), ("nyuv2", "unit"), ("folder", "names")]


def of_texts(item, spoil, refused="", leave=()):
    return [row for of, key in TEXTS if key not in leave for row in rows(item, of, key, spoil, refused)]


def id_twice(inside) -> None:
    entries = inside["annotations"]
    entries = entries[1].get("segments_info", entries)
    entries[1]["id"] = entries[0]["id"]


def with_ids(inside, form) -> None:
    """Every id that is a number in another form."""
    segments = [segment for one in inside["annotations"] for segment in one.get("segments_info", [])]
    for entry in (*inside["images"], *inside["categories"], *inside["annotations"], *segments):
        for key in ("id", "image_id", "category_id"):
            if isinstance(entry.get(key), int) and not (key == "id" and "bbox" in entry):
                entry[key] = form(entry[key])


def names_exchanged(inside) -> None:
    one, other = inside["categories"][1:3]
    one["name"], other["name"] = other["name"], one["name"]


def in_bytes(encoding: str, mark: bytes = b""):
    return lambda file: file.write_bytes(mark + file.read_text().encode(encoding)) and None


def name_twice(inside) -> None:
    inside["categories"][1]["name"] = inside["categories"][0]["name"]


def no_images(inside) -> None:
    inside["images"], inside["annotations"] = [], []


NO_OBJECT = r"no list 'images'|extrinsic.baseline null|object \{|no list of class names"
NO_NUMBERS = r"\[0\] is .* four numbers"
TOO_LARGE = 10**400  # for a float

ROWS = [
    # a file as a whole
    *of_texts("JSON cut in half", cut, "is not YAML|is no complete JSON"),
    *of_texts("empty file", content(""), "is no complete JSON|is no list of class names"),
    *of_texts("a list", content("[]"), NO_OBJECT),
    *of_texts("null", content("null"), NO_OBJECT),
    *of_texts("brackets in brackets", content("[" * 100_000), "is no complete JSON", leave=("names",)),
    *rows("brackets in brackets", "folder", "names", content("[" * 1000), "nested deeper than 64"),  # YAML is slow
    *of_texts("a number of 5000 digits", content(f'{{"a": {"9" * 5000}}}'), "5,000 characters|is no complete JSON"),
    *of_texts("byte order mark", in_bytes("utf-8", b"\xef\xbb\xbf")),
    *of_texts("UTF-16", in_bytes("utf-16"), leave=("names",)),
    *of_texts("a folder", make_folder, "is a folder|cannot be read|found no|declares no|found nothing"),
    *rows("missing file", "coco folder", "boxes", remove, "found no"),
    *rows("missing file", "coco", "segments", remove, "found no"),
    *rows("missing file", "nyuv2", "boxes", remove, "found nothing as annotations/"),
    *rows("missing file", "cityscapes", "boxes", remove, noted="boxes: 1 of 2 images not labelled"),
    *rows("missing file", "coco nyuv2", "photo", remove, "1 of 2 (listed )?files .*are missing"),
    *rows("missing file", "folder", "photo", remove, "'a', is none of the images"),
    *rows("missing file", "cityscapes", "photo", remove, noted=r"1 \*_gtFine_labelIds.png have no image and are not"),
    *rows("missing file", "cityscapes", "camera", remove, noted="depth_m: 1 of 2 images not labelled"),
    *rows("missing file", "nyuv2_mat", "everything", remove, "found no"),
    *rows("missing file", "nyuv2_mat", "names", remove, "found no"),
    # boxes
    *rows("NaN box", BOXES, "boxes", put("box/bbox", [float("nan"), 2, 3, 4]), noted="dropped 1 .* NaN or infinite"),
    *rows("infinite box", BOXES, "boxes", put("box/bbox", [1, 2, float("inf"), 4]), noted="dropped 1 .*infinite"),
    *rows("negative box", BOXES, "boxes", put("box/bbox", [1, 2, -3, 4]), noted="dropped 1 .*without width or height"),
    *rows("zero box", BOXES, "boxes", put("box/bbox", [1, 2, 0, 4]), noted="dropped 1 .*without width or height"),
    *rows("box outside", BOXES, "boxes", put("box/bbox", [100, 2, 3, 4]), noted="dropped 1 .*outside their image"),
    *rows("box beyond", BOXES, "boxes", put("box/bbox", [20, 2, 30, 4]), noted="1 boxes reach .*beyond their image"),
    *rows("three numbers", BOXES, "boxes", put("box/bbox", [1, 2, 3]), NO_NUMBERS),
    *rows("box of text", BOXES, "boxes", put("box/bbox", ["1", 2, 3, 4]), NO_NUMBERS),
    *rows("box of truths", BOXES, "boxes", put("box/bbox", [True, 2, 3, 4]), NO_NUMBERS),
    *rows("box too large for a float", BOXES, "boxes", put("box/bbox", [1, 2, TOO_LARGE, 4]), NO_NUMBERS),
    *rows("area of text", BOXES, "boxes", put("box/area", "9"), noted="1 areas are negative or no number"),
    *rows("area too large for a float", BOXES, "boxes", put("box/area", TOO_LARGE), noted="1 areas are"),
    *rows("iscrowd 2", BOXES, "boxes", put("box/iscrowd", 2), r"\[0\] is .* 0 or 1 as iscrowd"),
    *rows("iscrowd of text", BOXES, "boxes", put("box/iscrowd", "0"), r"\[0\] is .* 0 or 1 as iscrowd"),
    *rows("sizes exchanged", "nyuv2 folder", "boxes", put("images/0/height", 32), "24, 32|24x32"),
    *rows("sizes exchanged", "coco", "boxes", put("images/1/height", 32), r"\(24, 32\)"),
    *rows("sizes exchanged", "cityscapes", "boxes", put("images/0/height", 32), r"\(24, 32\)"),
    # categories
    *rows("unknown category", BOXES, "boxes", put("box/category_id", 9999), r"\[0\] is .* `categories` lists"),
    *rows("unknown category", "coco", "segments", put("box/category_id", 9999), r"\[0\] is .* `categories` lists"),
    *rows("category of text", BOXES, "boxes", put("box/category_id", "chair"), "a category_id that `categories` lists"),
    *rows("category of truth", BOXES, "boxes", put("box/category_id", True), "a category_id that `categories` lists"),
    *rows("no categories", BOXES, "boxes", put("categories", []), "categories has 0 entries; allowed are 1 to 255"),
    *rows("wrong class mapping", "coco cityscapes", "boxes", change(names_exchanged), "official"),
    *rows("wrong class mapping", "coco", "segments", change(names_exchanged), "official"),
    *rows("wrong class mapping", "nyuv2", "unit", put("seg13", ["void", "books", "bed"]), "lists seg13 as"),
    *rows("wrong class mapping", "folder", "names", content("{0: floor, 1: shelf, 1: cup}"), "'1' stands twice"),
    *rows("wrong class mapping", "folder", "names", content("{0: floor, ²: shelf}"), "is no list of class names"),
    *rows("wrong class mapping", "folder", "names", content("{0: floor, 300: shelf}"), "is no list of class names"),
    *rows("wrong class mapping", "folder", "names", content("2001-99-99"), "is no list of class names"),
    # ids
    *rows("duplicate ids", BOXES, "boxes", twice("images"), r"images\[\d\] is .* needs its own id"),
    *rows("duplicate ids", BOXES, "boxes", twice("categories"), r"categories\[\d+\] is .* needs its own id"),
    *rows("duplicate ids", FLAT, "boxes", change(id_twice), noted="1 annotation ids repeat"),
    *rows("duplicate ids", "coco", "segments", change(id_twice), "its own id, which no other segment of its image"),
    *rows("duplicate ids", "coco", "segments", twice("annotations"), "an image_id that `images` lists, once"),
    *rows("duplicate ids", "cityscapes", "boxes", twice("annotations"), "its own image_id, which no other entry has"),
    *rows("duplicate ids", "folder nyuv2", "list", content("a\na\n0001\n0001\n"), "stands for two|none of the images"),
    *rows("duplicate names", BOXES, "boxes", change(name_twice), "its own name"),
    *rows("id 0", FLAT, "boxes", put("box/id", 0), noted="1 annotations have id 0"),
    *rows("id 0", "coco", "segments", put("box/id", 0), "an id of 1 to 16777215; 0 is void"),
    *rows("huge id", "coco", "segments", put("box/id", 2**24), "an id of 1 to 16777215"),
    *rows("ids of text", BOXES, "boxes", change(lambda inside: with_ids(inside, str))),  # pycocotools takes these
    *rows("ids of text with zeros", BOXES, "boxes", change(lambda inside: with_ids(inside, "{:>012}".format))),
    *rows("ids of floats", BOXES, "boxes", change(lambda inside: with_ids(inside, float))),
    *rows("id of truth", FLAT, "boxes", put("images/0/id", True), "a whole number or a text as id"),
    *rows("id of a fraction", FLAT, "boxes", put("images/0/id", 1.5), "a whole number or a text as id"),
    *rows("id of a list", BOXES, "boxes", put("annotations/0/image_id", [1]), "as image_id"),
    *rows("unknown image", FLAT, "boxes", put("box/image_id", 4242), noted="1 of images the file does not list"),
    *rows("unknown image", "coco", "segments", put("annotations/0/image_id", 4242), "an image_id that `images` lists"),
    *rows("unknown image", "cityscapes", "boxes", put("annotations/0/image_id", "x"), noted="1 of 2 images not"),
    *rows("entry is null", BOXES, "boxes", put("annotations/0", None), r"annotations\[0\] is null; it needs an object"),
    # splits
    *rows("empty split", "coco nyuv2", "boxes", change(no_images), "lists no"),
    *rows("empty split", "folder nyuv2", "list", content("\n"), "is empty; it"),
    *rows("empty split", "folder nyuv2 coco", "boxes", put("annotations", []), noted="lists no box at all; all 2"),
    *rows("UTF-16", "folder nyuv2", "list", in_bytes("utf-16"), "is not in UTF-8: byte 0 is 0xff"),
    *rows("byte order mark", "folder nyuv2", "list", in_bytes("utf-8", b"\xef\xbb\xbf")),
    # names
    *rows("`..` in a file name", FLAT, "boxes", put("images/0/file_name", "../a.jpg"), r"without '\.\.'"),
    *rows("`..` in a file name", "coco", "segments", put("annotations/0/file_name", "../a.png"), r"without '\.\.'"),
    *rows("`..` in a name", "folder nyuv2", "list", content("../a.jpg\n../0001"), r"none of|txt names .*leads out"),
    *rows("absolute file name", FLAT, "boxes", put("images/0/file_name", "/etc/a.jpg"), "relative to the folder"),
    *rows("half a character", FLAT, "boxes", put("images/0/file_name", "\ud800.jpg"), "a file_name relative"),
    *rows("half a character", BOXES, "boxes", put("categories/0/name", "\ud800"), "a text as name"),
    *rows("name of 5000 letters", "coco", "boxes", put("images/0/file_name", f"{'a' * 5000}/a.jpg"), "are missing"),
    # units
    *rows("camera", "cityscapes", "camera", put("extrinsic", None), "extrinsic.baseline null"),
    *rows("camera", "cityscapes", "camera", put("extrinsic/baseline", 0), "both must be numbers above 0"),
    *rows("camera", "cityscapes", "camera", put("extrinsic/baseline", -0.2), "both must be numbers above 0"),
    *rows("camera", "cityscapes", "camera", put("extrinsic/baseline", True), "both must be numbers above 0"),
    *rows("camera", "cityscapes", "camera", put("intrinsic/fx", float("nan")), "both must be numbers above 0"),
    *rows("camera", "cityscapes", "camera", put("intrinsic/fx", "2262"), "both must be numbers above 0"),
    *rows("camera", "cityscapes", "camera", put("intrinsic/fx", TOO_LARGE), "both must be numbers above 0"),
    *rows("unit", "nyuv2", "unit", put("depth_scale", 0), "declares no depth scale"),
    *rows("unit", "nyuv2", "unit", put("depth_scale", float("nan")), "declares no depth scale"),
    *rows("unit", "nyuv2", "unit", put("depth_scale", True), "declares no depth scale"),
    *rows("unit", "nyuv2", "unit", put("depth_scale", "png / 1.2.3"), "declares no depth scale"),
    *rows("millimetres as metres", "cityscapes", "camera", put("extrinsic/baseline", 209.3), r"in metres \(below 10\)"),
    *rows("millimetres as metres", "nyuv2", "unit", put("depth_scale", 1), "is uint16, but meta.json declares 1 "),
    *rows(
        "millimetres as metres", "folder", "depth", lambda file: None,
        noted=r"beyond .* m with metres_per_unit 1 .*\n +1000 to 10000 m \|####",
        depth={"files": "depth/{stem}.png", "metres_per_unit": 1},
    ),
]  # fmt: skip

MUST = (
    "truncated JPEG", "16-bit PNG", "palette PNG", "grayscale", "RGBA", "EXIF-rotated", "CMYK JPEG", "NaN box",
    "negative box", "zero box", "box outside", "unknown category", "duplicate ids", "id 0", "missing file",
    "JSON cut in half", "wrong class mapping", "millimetres as metres", "empty split", "`..` in a file name",
)  # fmt: skip
ELSEWHERE = {  # (item, reader): the test of that reader that proves it
    ("empty split", "cityscapes"): "test_cityscapes.py::test_a_root_without_images_says_where_they_should_lie",
    ("empty split", "nyuv2_mat"): "test_nyuv2_mat.py::test_splits_that_leak_or_leave_the_file_are_refused",
    ("duplicate ids", "nyuv2_mat"): "test_nyuv2_mat.py::test_splits_that_leak_or_leave_the_file_are_refused",
    ("id 0", "nyuv2_mat"): "test_nyuv2_mat.py::test_splits_that_leak_or_leave_the_file_are_refused",
    ("unknown category", "nyuv2_mat"): "test_nyuv2_mat.py::test_a_label_without_a_name_is_refused",
    ("wrong class mapping", "nyuv2_mat"): "test_nyuv2_mat.py::test_a_wrong_class_mapping_is_refused",
    ("millimetres as metres", "nyuv2_mat"): "test_nyuv2_mat.py::test_depth_in_millimetres_is_refused",
    ("JSON cut in half", "nyuv2_mat"): "test_nyuv2_mat.py::test_a_missing_or_cut_file_is_named",
}
CANNOT = {  # (item, reader): why it cannot occur
    **{(item, "nyuv2_mat"): "pixels are arrays in one HDF5 file" for item in MUST[:7]},
    **{(item, "nyuv2_mat"): "boxes are made of pixels" for item in MUST[7:11]},
    ("`..` in a file name", "nyuv2_mat"): "images have numbers",
    ("`..` in a file name", "cityscapes"): "names come from listing the folders",
    ("id 0", "cityscapes"): "the ids of segments are not looked at",
    ("millimetres as metres", "coco"): "no depth",
}


@pytest.mark.parametrize("row", ROWS)
def test_input_that_cannot_be_meant_is_refused_by_name_or_counted(row: Row, drawn: Path, tmp_path: Path):  # noqa: F811
    check(row, drawn, tmp_path / "root")


def test_every_item_is_answered_by_every_reader_in_which_it_can_occur():
    rows_ = [param.values[0] for param in (*ROWS, *PICTURES)]
    answered = {(row.item, row.reader) for row in rows_}
    for item in MUST:
        for reader in LAYOUTS:
            homes = [(item, reader) in one for one in (answered, ELSEWHERE, CANNOT)]
            assert sum(homes) == 1, f"{item}, {reader}: one of a row, a test elsewhere, a reason why not; found {homes}"
    for test in ELSEWHERE.values():
        file, _, name = test.partition("::")
        (text,) = [found.read_text(encoding="utf-8") for found in Path(__file__).parents[1].rglob(file)]
        assert f"def {name}(" in text, test
