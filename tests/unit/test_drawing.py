"""Claims about `visionmtl.visualization.draw`: what a picture shows, and that no label can break it."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from visionmtl.structures import IGNORE, Detections, LabelSpace
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.segmentation import Segmentation
from visionmtl.visualization import canvas, draw, palette, panels

SPACE = LabelSpace("three", ("red thing", "green thing", "blue thing"), ((230, 20, 20), (20, 230, 20), (20, 20, 230)))
GREY = np.full((320, 400, 3), 128, np.uint8)


def detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    table = np.asarray(rows, np.float64).reshape(-1, 6)
    return Detections(table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(np.int64))


def has(picture, colour) -> bool:
    return bool((picture == colour).all(axis=2).any())


def test_a_box_is_drawn_where_it_lies():
    picture = draw.draw_boxes(GREY, detections((100, 120, 200, 220, 0.9, 0)), SPACE, 0.5)

    assert picture.shape == GREY.shape
    assert (picture[150, 100] == SPACE.colours[0]).all() and (picture[150, 199] == SPACE.colours[0]).all()
    assert (picture[150, 103:197] == 128).all()  # the content stays free


def test_the_threshold_hides_boxes_but_never_truth():
    low = (100, 100, 200, 200, 0.2, 0)
    truth = (100, 100, 200, 200, np.nan, 1)

    picture = draw.draw_boxes(GREY, detections(low, truth), SPACE, 0.5)

    assert not has(picture, SPACE.colours[0]) and has(picture, SPACE.colours[1])


def test_the_image_is_not_drawn_on_and_no_box_is_said_in_its_corner():
    image = GREY.copy()

    draw.draw_boxes(image, detections((10, 10, 90, 90, 0.9, 0)), SPACE)
    empty, low = (draw.draw_boxes(image, of, SPACE, 0.5) for of in (detections(), detections((9, 9, 90, 90, 0.4, 0))))

    assert (image == GREY).all() and (empty[50:] == GREY[50:]).all() and (empty[:20] != GREY[:20]).any()
    assert (empty != low).any(), "nothing found at all, and nothing above the threshold, differ"


def test_the_best_box_below_the_threshold_never_reads_as_the_threshold(monkeypatch):
    texts = []
    monkeypatch.setattr(canvas, "note", lambda picture, text: texts.append(text))
    for score, limit in ((0.397, 0.4), (0.999, 1.0)):
        draw.draw_boxes(GREY, detections((10, 10, 90, 90, score, 0)), SPACE, limit)
    best = "or more; the best: red thing"
    assert texts == [f"no box of score 0.4 {best} 0.39", f"no box of score 1 {best} 0.99"]


@pytest.mark.parametrize("box", [(-50, -50, 900, 900), (390, 310, 400, 320), (0, 0, 1, 1), (50, 60, 50, 60)])
def test_boxes_at_and_beyond_the_border_can_be_drawn(box):
    picture = draw.draw_boxes(GREY, detections((*box, 0.9, 0)), SPACE)

    assert picture.shape == GREY.shape and has(picture, SPACE.colours[0])


def test_a_crowd_is_hatched():
    box = detections((100, 100, 300, 300, np.nan, 0))

    plain = draw.draw_boxes(GREY, box, SPACE)
    crowd = draw.draw_boxes(GREY, replace(box, crowd=np.asarray([True])), SPACE)

    assert (plain[150:250, 150:250] == 128).all() and not (crowd[150:250, 150:250] == 128).all()


def test_the_legend_holds_only_classes_that_are_present():
    classes = np.zeros((320, 400), np.uint8)
    classes[:, 200:] = 2

    picture = draw.draw_segmentation(GREY, classes, SPACE)
    legend = picture[320:]

    assert picture.shape[1] == 400 and (picture[10, 10] != picture[10, 390]).any()
    assert has(legend, SPACE.colours[0]) and has(legend, SPACE.colours[2]) and not has(legend, SPACE.colours[1])


def test_pixels_nobody_labelled_are_hatched_and_said_so():
    classes = np.zeros((320, 400), np.uint8)
    without = draw.draw_segmentation(GREY, classes, SPACE)
    classes[:100] = IGNORE

    picture = draw.draw_segmentation(GREY, classes, SPACE)

    assert picture[:95].max() < 128  # darkened
    assert has(picture[320:], canvas.MISSING) and not has(without[320:], canvas.MISSING)


def test_a_map_of_ignore_alone_can_be_drawn():
    assert draw.draw_segmentation(GREY, np.full((320, 400), IGNORE, np.uint8), SPACE).shape[0] > 320


def test_near_is_red_far_is_blue_and_unmeasured_is_grey():
    depth = np.full((320, 400), 2.0, np.float32)
    depth[:, 200:] = 8.0
    depth[:50] = 0

    picture = draw.draw_depth(GREY, depth, 1.0, 10.0)

    near, far = picture[200, 50].astype(int), picture[200, 350].astype(int)
    assert near[0] > near[2] and far[2] > far[0] and (picture[10, 10] == canvas.MISSING).all()


def test_one_range_gives_one_colour_to_one_distance():
    a, b = np.full((320, 400), 3.0, np.float32), np.full((320, 400), 3.0, np.float32)
    b[:100] = 9.0
    low, high = draw.depth_range(a, b)

    assert low <= 3.0 and high >= 9.0
    assert (draw.draw_depth(GREY, a, low, high)[300] == draw.draw_depth(GREY, b, low, high)[300]).all()


@pytest.mark.parametrize("depth_m", [0.0, 0.01, 2.0, 3000.0])
def test_depth_without_measurements_or_of_one_value_can_be_drawn(depth_m):
    picture = draw.draw_depth(GREY, np.full((320, 400), depth_m, np.float32))

    assert picture.dtype == np.uint8 and picture.shape[1] == 400


def test_normals_show_up_as_green_and_towards_the_camera_as_blue():
    normals = np.zeros((320, 400, 3), np.float32)
    normals[:100, :, 1] = -1  # y points down, so this faces up
    normals[100:200, :, 2] = -1

    picture = draw.draw_normals(GREY, normals)

    assert picture[50, 50].argmax() == 1 and picture[150, 50].argmax() == 2
    assert (picture[250, 50] == canvas.MISSING).all()


def test_values_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"class map is 10x10 px, the image 320x400 px; .*; resize"):
        draw.draw_segmentation(GREY, np.zeros((10, 10), np.uint8), SPACE)


def test_a_comparison_aligns_its_columns_and_leaves_gaps():
    wide, small = np.full((60, 120, 3), 10, np.uint8), np.full((30, 60, 3), 200, np.uint8)

    one = draw.compare([[("a", wide), ("b", small)]])
    two = draw.compare([[("a", wide), ("b", small)], [("c", wide), None]])

    assert one.shape[1] == two.shape[1] > 240 and two.shape[0] > one.shape[0] > 60


@pytest.fixture
def no_system_fonts(monkeypatch):
    """A machine whose only font is Pillow's, which has ASCII and little else."""
    monkeypatch.setattr(canvas, "_system_fonts", tuple)
    canvas._line.cache_clear()
    monkeypatch.setattr(canvas, "_told_scripts", set())
    yield
    canvas._line.cache_clear()


def named(*names):
    return LabelSpace("named", names, ((200, 60, 60),) * len(names))


@pytest.mark.parametrize("pair", ["椅木", "яж", "αβ", "한국", "のノ", "éè", "ÄA", "🐱🐶"])
def test_two_class_names_never_look_alike_whatever_the_script(no_system_fonts, pair):
    space, box = named(*pair), (40, 60, 200, 200, 0.9)
    classes = np.zeros((320, 400), np.uint8)

    boxes = [draw.draw_boxes(GREY, detections((*box, k)), space) for k in (0, 1)]
    maps = [draw.draw_segmentation(GREY, classes + np.uint8(k), space) for k in (0, 1)]

    assert (boxes[0] != boxes[1]).any() and (maps[0] != maps[1]).any()


def test_control_characters_break_no_line():
    assert canvas.text_width("two\nlines", 20) == canvas.text_width("two lines", 20)


# ---- colours, sizes, errors ----


def test_a_class_has_one_colour_in_all_spaces_and_background_is_grey():
    boxes, maps = named("person", "dog"), named("background", "wall", "person", "sky")

    both = palette.recolour({"a": boxes, "b": maps, "c": None})

    assert both["a"].colours[0] == both["b"].colours[2] != boxes.colours[0] and both["c"] is None
    assert both["b"].colours[0] == palette.BACKGROUND and palette.BACKGROUND not in both["b"].colours[1:]
    assert palette.colours_by_name(["wall", "lamp"])["wall"] == both["b"].colours[1]


def test_the_classes_of_the_quickstart_are_told_apart_at_a_glance():
    colours = np.array(
        list(palette.colours_by_name(["box", "sphere", "cylinder", "floor", "wall"]).values()), np.float32
    )
    lab = cv2.cvtColor(colours[None] / 255, cv2.COLOR_RGB2Lab)[0]
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert apart[~np.eye(5, dtype=bool)].min() > 50


@pytest.mark.parametrize("count", [1, 40, 64, 65, 255])
def test_all_classes_of_a_set_differ(count):
    colours = palette.colours_by_name(f"class {k}" for k in range(count))
    assert len(set(colours.values())) == count


def test_colours_differ_for_colour_blind_eyes():
    """Least CIELAB distance as seen with protanopia and deuteranopia (Machado et al. 2009); 2.3 is just noticeable."""
    encoded = np.asarray(palette._TABLE) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    protan = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    deutan = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    for seen in (linear, linear @ np.transpose(protan), linear @ np.transpose(deutan)):
        seen = np.clip(seen, 0, 1)
        rgb = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055).astype(np.float32)[None]
        lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[0]
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1e3 * np.eye(len(lab))
        assert apart[:7, :7].min() > 15 and apart[:32, :32].min() > 12 and apart.min() > 7


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (20, 30), (375, 1242), (2000, 3000)])
def test_text_is_legible_and_memory_small_whatever_the_size(size):
    image, classes = np.full((*size, 3), 90, np.uint8), np.zeros(size, np.uint8)
    tasks = {"segmentation": Segmentation(), "depth": Depth()}
    rows = {"prediction": {"segmentation": classes, "depth": np.ones(size, np.float32)}}

    picture = panels.draw_panels(tasks, {"segmentation": SPACE, "depth": None}, image, rows)

    assert picture.nbytes < 60e6 and canvas.text_px(panels.at_cell_size(image, 960).shape[:2]) >= 12
    assert picture.shape[1] <= 3400 and picture.shape[1] / canvas.text_px((960, 720)) < 130


def test_hits_false_positives_and_misses_have_their_colours():
    found = detections((10, 10, 100, 100, 0.9, 0), (200, 10, 300, 100, 0.8, 0), (10, 200, 60, 250, 0.7, 1))
    truth = detections((12, 10, 100, 100, 1.0, 0), (300, 200, 380, 300, 1.0, 2), (0, 190, 200, 310, 1.0, 1))
    truth = replace(truth, crowd=np.asarray([False, False, True]))

    picture = draw.draw_box_errors(GREY, found, truth, SPACE, 0.5)

    assert (picture[50, 10] == draw.RIGHT).all() and (picture[50, 200] == draw.WRONG).all()
    assert (picture[250, 300] == draw.MISSED).all()
    assert (picture[225, 10] == 128).all(), "a box on a crowd is neither right nor wrong"


def test_errors_of_maps_are_where_they_are():
    classes, truth = np.zeros((320, 400), np.uint8), np.zeros((320, 400), np.uint8)
    classes[:, 200:], truth[:100] = 1, IGNORE

    picture = draw.draw_segmentation_errors(GREY, classes, truth).astype(int)
    depth = draw.draw_depth_errors(GREY, np.where(truth == 0, 1.0, 2.0).astype(np.float32), np.ones((320, 400)))

    assert picture[200, 300, 0] > picture[200, 300, 2] and picture[200, 100, 2] > picture[200, 100, 0]
    assert picture[50].max() < 128 and (depth[200, 200] == 247).all() and depth[90, 390, 0] > 150 > depth[90, 390, 1]


def test_a_tag_tells_class_score_and_metres(monkeypatch):
    texts = []
    monkeypatch.setattr(canvas, "write", lambda draw, at, text, *rest, **more: texts.append(text))
    boxes = detections((10, 10, 100, 100, 0.834, 0), (10, 200, 90, 300, 0.5, 1))

    draw.draw_boxes(GREY, boxes, SPACE, 0.4, np.asarray([2.4444, np.nan], np.float32))

    assert texts == ["red thing 0.83  2.4 m", "green thing 0.50"]

    texts.clear()
    long = replace(SPACE, classes=("a name " * 50, *SPACE.classes[1:]))
    draw.draw_boxes(GREY, boxes, long, 0.4, np.asarray([2.4444, np.nan], np.float32))
    assert texts[0].startswith("a name a name") and texts[0].endswith("... 0.83  2.4 m")
    assert [draw.metres(value) for value in (0.854, 2.44, 31.4)] == ["0.85 m", "2.4 m", "31 m"]


def test_texts_of_narrow_and_of_flat_pictures_are_whole(monkeypatch):
    written: list[str] = []
    write = canvas.write
    monkeypatch.setattr(
        canvas,
        "write",
        lambda sheet, at, text, *rest, **more: (written.append(text), write(sheet, at, text, *rest, **more)),
    )
    tall, flat = np.full((1000, 20, 3), 128, np.uint8), np.full((20, 1000, 3), 128, np.uint8)
    picture = draw.draw_boxes(tall, detections((2, 100, 18, 300, 0.9, 0)), SPACE, 0.5)
    assert written == ["red thing 0.90"] and picture.shape[1] >= canvas.MIN_STRIP_PX
    for image in (tall, flat):
        written.clear()
        noted = canvas.note(image, "mean 23.1%")
        assert written == ["mean 23.1%"]
    assert noted.shape[0] > 20 and (noted[:20] == 128).all(), "what is flat has its note below"


def test_the_range_of_a_video_follows_without_flicker():
    steady, near, far = panels.SteadyRange(25), np.full((9, 9), 2, np.float32), np.full((9, 9), 8, np.float32)
    first = steady.update(near)

    ends = [steady.update(far if number % 2 else near)[1] for number in range(50)]

    assert first[0] < 2 < first[1] and max(np.abs(np.diff(np.log(ends)))) < 0.04
    for _ in range(200):
        last = steady.update(far)
    assert last[0] == pytest.approx(8 / 1.1, rel=0.05)


def test_the_characters_that_no_font_has_are_named(no_system_fonts, caplog):
    canvas.text_width("椅木", 20)
    assert "椅" in caplog.text and "'椅木'" in caplog.text and "fonts-noto-cjk" in caplog.text


def test_lone_marks_count_as_missing(no_system_fonts):
    assert canvas._line("कुर्सी").text.isascii()


def test_a_mark_counts_as_missing_in_a_font_that_shapes_text():
    if not (font := next((file for file in canvas._system_fonts() if "DejaVuSans.ttf" in file), None)):
        pytest.skip("DejaVu is not installed")
    assert canvas._has_glyph(font, "a") and not canvas._has_glyph(font, "\u0941")


def test_a_score_of_1_is_a_prediction(monkeypatch):
    texts = []
    monkeypatch.setattr(canvas, "write", lambda draw, at, text, *rest, **more: texts.append(text))
    draw.draw_boxes(GREY, detections((10, 10, 100, 100, 1.0, 0)), SPACE, 0.5)
    assert texts == ["red thing 1.00"]
