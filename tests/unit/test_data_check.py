"""Checks of single samples: one claim a rule, and what is counted and remembered of an image."""

import io
import warnings
from collections import Counter

import cv2
import numpy as np
import pytest
from rich.console import Console

from visionmtl.data.check.fingerprint import fingerprint, near_images, same_images
from visionmtl.data.check.rules import RULES
from visionmtl.data.check.sample import find_problems
from visionmtl.data.check.sheet import draw_sheet
from visionmtl.data.check.survey import Checked, plan, read_all
from visionmtl.data.check.tally import Tally, most_frequent
from visionmtl.data.check.terminal import progress
from visionmtl.data.check.verdict import all_findings
from visionmtl.datasets import NamedDataset
from visionmtl.structures import IGNORE, Boxes, LabelSpace, Sample
from visionmtl.visualization.palette import colours_by_name

SPACE = LabelSpace("toy", ("cup", "floor"), ((255, 0, 0), (0, 255, 0)))
PROVIDES = {"boxes": SPACE, "segmentation": SPACE, "depth_m": None, "normals": None}
SIZE = (48, 64)


def photo(seed=0, size=SIZE):
    """Coloured patches without noise."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(patches, size[::-1], interpolation=cv2.INTER_CUBIC)


def boxes(*xyxy, labels=None, area=None):
    count = len(xyxy)
    return Boxes(
        np.array(xyxy, np.float32).reshape(-1, 4),
        np.zeros(count, np.int64) if labels is None else np.array(labels, np.int64),
        np.zeros(count, bool),
        np.full(count, 9, np.float32) if area is None else np.array(area, np.float32),
    )


def depth(value=2.0, **pixels):
    """Metres, rising slowly from `value`; pixels: values of the first pixels."""
    metres = np.linspace(value, value * 1.5, SIZE[0] * SIZE[1], dtype=np.float32).reshape(SIZE)
    metres[0, : len(pixels)] = list(pixels.values())
    return metres


def normals(length=1.0):
    return np.full((*SIZE, 3), (0, 0, -length), np.float32)


def classes(value=1, first=None):
    found = np.full(SIZE, value, np.uint8)
    found[0, 0] = value if first is None else first
    return found


def rules(image=None, provides=PROVIDES, **fields):
    sample = Sample(image=photo() if image is None else image, image_id="a", **fields)
    return [(one.rule, one.field) for one in find_problems(sample, provides)]


def test_a_sound_sample_has_no_problem():
    everything = {"boxes": boxes((1, 2, 30, 40)), "segmentation": classes(), "depth_m": depth(), "normals": normals()}
    assert rules(**everything) == []
    assert rules(boxes=boxes()) == [], "an image without objects is labelled"
    assert rules(boxes=boxes((-1, 0, 65, 48))) == [], "annotation tools round outwards"
    assert rules(segmentation=classes(first=IGNORE), depth_m=depth(a=0)) == [], "some pixels may be unlabelled"


@pytest.mark.parametrize(
    ("rule", "image"),
    [
        ("image_form", photo().astype(np.float32)),
        ("image_form", photo()[..., 0]),
        ("image_small", photo(size=(31, 64))),
        ("image_constant", np.full((*SIZE, 3), 7, np.uint8)),
        ("image_cut", np.concatenate([photo(), np.full((*SIZE, 3), 128, np.uint8)])),
    ],
)
def test_an_odd_image_is_told(rule, image):
    assert rules(image) == [(rule, "image")]


def test_a_black_bar_below_a_film_is_no_cut_file():
    assert rules(np.concatenate([photo(), np.zeros((*SIZE, 3), np.uint8)])) == []


@pytest.mark.parametrize(
    ("rule", "labels"),
    [
        ("box_not_finite", boxes((0, 0, np.nan, 5))),
        ("box_not_finite", boxes((0, 0, np.inf, 5))),
        ("box_empty", boxes((3, 3, 3, 9))),
        ("box_empty", boxes((9, 3, 3, 9))),
        ("box_outside", boxes((64, 3, 70, 9))),
        ("box_outside", boxes((-9, -9, 0, 0))),
        ("box_beyond", boxes((50, 3, 66, 9))),
        ("box_beyond", boxes((3, -2, 6, 9))),
        ("box_class", boxes((3, 3, 6, 9), labels=[2])),
        ("box_class", boxes((3, 3, 6, 9), labels=[-1])),
        ("box_area", boxes((3, 3, 6, 9), area=[-1])),
        ("box_area", boxes((3, 3, 6, 9), area=[np.nan])),
        ("box_repeated", boxes((3, 3, 6, 9), (3, 3, 6, 9))),
        ("form", Boxes(np.zeros((2, 4), np.float32), np.zeros(1, np.int64), np.zeros(1, bool), np.ones(1, np.float32))),
    ],
)
def test_a_box_that_cannot_be_meant_is_told(rule, labels):
    assert rules(boxes=labels) == [(rule, "boxes")]


def test_objects_of_two_classes_may_share_a_box():
    assert rules(boxes=boxes((3, 3, 6, 9), (3, 3, 6, 9), labels=[0, 1])) == []


def test_a_text_counts_the_boxes_and_shows_the_first():
    sample = Sample(image=photo(), image_id="a", boxes=boxes((0, 0, 5, 5), (70, 0, 80, 5), (80.5, 0, 90, 5)))
    (problem,) = find_problems(sample, PROVIDES)
    assert problem.text == "2 of 3 boxes; the first, number 1, outside its 48x64 px is [70, 0, 80, 5]"


@pytest.mark.parametrize(
    ("rule", "field", "label"),
    [
        ("size_differs", "segmentation", classes().T),
        ("size_differs", "depth_m", depth()[:-1]),
        ("form", "segmentation", classes().astype(np.int64)),
        ("form", "depth_m", depth().astype(np.float64)),
        ("form", "normals", normals()[..., :2]),
        ("class_outside", "segmentation", classes(first=2)),
        ("nothing_labelled", "segmentation", classes(IGNORE)),
        ("depth_not_finite", "depth_m", depth(a=np.nan)),
        ("depth_not_finite", "depth_m", depth(a=np.inf)),
        ("depth_negative", "depth_m", depth(a=-0.5)),
        ("nothing_labelled", "depth_m", np.zeros(SIZE, np.float32)),
        ("depth_implausible", "depth_m", depth(2000)),  # millimetres taken for metres
        ("depth_implausible", "depth_m", depth(0.002)),
        ("depth_constant", "depth_m", np.full(SIZE, 3, np.float32)),
        ("normals_not_finite", "normals", np.full((*SIZE, 3), np.nan, np.float32)),
        ("normals_length", "normals", normals(0.9)),
        ("nothing_labelled", "normals", normals(0)),
    ],
)
def test_a_map_that_cannot_be_meant_is_told(rule, field, label):
    assert (rule, field) in rules(**{field: label})


def test_a_label_that_the_data_set_does_not_announce_is_told():
    assert rules(provides={"boxes": SPACE}, depth_m=depth()) == [("field_unexpected", "depth_m")]


def test_every_rule_says_what_is_allowed_and_what_to_do_or_neither():
    assert all(bool(rule.allowed) == bool(rule.advice) for rule in RULES.values())


def saved_anew(image, quality):
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def test_the_same_pixels_are_found_and_other_sizes_are_not_the_same():
    images = [photo(0), photo(1), photo(0), photo(0).reshape(SIZE[1], SIZE[0], 3)]
    assert same_images([fingerprint(image).digest for image in images]) == [[0, 2]]


@pytest.mark.parametrize(
    "changed",
    [
        lambda image: saved_anew(image, 40),
        lambda image: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
        lambda image: np.clip(image.astype(np.int16) + 8, 0, 255).astype(np.uint8),
    ],
    ids=["compressed", "halved", "brighter"],
)
def test_a_picture_saved_anew_is_nearly_the_same_and_others_are_not(changed):
    originals = [photo(seed, (240, 320)) for seed in range(20)]
    found = list(near_images([fingerprint(image) for image in [*originals, changed(originals[7])]]))
    assert [pair[:2] for pair in found] == [(7, 20)]


def test_equal_images_are_not_nearly_the_same_and_flat_ones_like_nothing():
    flat = [np.full((*SIZE, 3), level, np.uint8) for level in (100, 101)]
    assert not list(near_images([fingerprint(image) for image in [photo(), photo(), *flat]]))


def test_frames_of_a_resting_camera_are_each_compared_with_the_first():
    rng, scene = np.random.default_rng(0), photo(0, (120, 160)).astype(np.int16)
    frames = [np.clip(scene + rng.integers(-3, 4, scene.shape), 0, 255).astype(np.uint8) for _ in range(5)]
    assert [pair[:2] for pair in near_images([fingerprint(one) for one in frames])] == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_counts_are_those_made_by_hand_and_add_up():
    crowd = Boxes(np.ones((1, 4), np.float32), np.array([1]), np.ones(1, bool), np.array([5000], np.float32))
    samples = [
        Sample(image=photo(), image_id="a", boxes=boxes(*[(0, 0, 9, 9)] * 3, area=[1023, 1024, 9216])),
        Sample(image=photo(), image_id="b", boxes=boxes(), segmentation=classes(0, first=IGNORE)),
        Sample(image=photo(size=(50, 70)), image_id="c", boxes=crowd),
        Sample(image=photo(), image_id="d"),
    ]
    whole, halves = Tally(), [Tally(), Tally()]
    for number, sample in enumerate(samples):
        whole.add(sample)
        halves[number % 2].add(sample)
    halves[0].merge(halves[1])
    for tally in (whole, halves[0]):
        assert (tally.images, tally.unlabelled, tally.crowds) == (4, 1, 1)
        assert tally.sizes == {SIZE: 3, (50, 70): 1}
        assert tally.labelled == Counter(boxes=3, segmentation=1)
        assert tally.boxes_an_image == {3: 1, 0: 1, 1: 1}
        numbers = tally.numbers(PROVIDES)
        assert [numbers["boxes"][size] for size in ("small", "medium", "large")] == [1, 1, 1]
        assert [(one["boxes"], one["images"]) for one in numbers["boxes"]["classes"]] == [(3, 1), (1, 1)]
        assert numbers["segmentation"]["classes"][0]["pixels"] == SIZE[0] * SIZE[1] - 1
        assert numbers["segmentation"]["labelled_share"] == pytest.approx(1 - 1 / (SIZE[0] * SIZE[1]))


def test_the_median_of_an_even_count_is_the_mean_of_the_middle_two():
    tally, two = Tally(), np.repeat(np.array([1.0, 4.0], np.float32), 50).reshape(10, 10)
    for count in (1, 2, 5, 9):
        tally.add(Sample(image=photo(), image_id="a", boxes=boxes(*[(0, 0, 9, 9)] * count), depth_m=two))
    numbers = tally.numbers(PROVIDES)
    assert numbers["boxes"]["an_image"] == {"mean": 4.25, "median": 3.5, "max": 9}
    assert numbers["depth_m"]["median_m"] == pytest.approx(2.5, rel=0.011)
    tally.add(Sample(image=photo(), image_id="b", boxes=boxes()))
    assert tally.numbers(PROVIDES)["boxes"]["an_image"]["median"] == 2


def test_the_rarest_classes_become_one_line():
    classes = [{"name": f"c{k}", "boxes": k, "images": 1, "share": k / 10} for k in range(5)]
    lines = most_frequent(classes, "boxes", 3)
    assert [(one["name"], one["boxes"], one["id"]) for one in lines] == [
        ("c4", 4, 4),
        ("c3", 3, 3),
        ("2 others", 3, None),
    ]


def test_quantiles_of_depth_are_right_to_one_percent_and_ends_exact():
    tally, metres = Tally(), np.random.default_rng(0).lognormal(1, 1, SIZE).astype(np.float32)
    metres[0] = 0
    tally.add(Sample(image=photo(), image_id="a", depth_m=metres))
    measured = metres[metres > 0]
    assert tally.depth_range_m == (measured.min(), measured.max())
    assert (tally.depth.sum(), tally.depth_pixels) == (measured.size, metres.size)
    for share in (0.01, 0.5, 0.99):
        assert tally.depth_quantile_m(share) == pytest.approx(np.quantile(measured, share), rel=0.011)


class Toy:
    """Samples from memory; reading them warns."""

    def __init__(self, samples, complaint):
        self.samples, self.complaint, self.provides = samples, complaint, PROVIDES

    def __len__(self):
        return len(self.samples)

    def read(self, index):
        if self.complaint:
            warnings.warn(self.complaint, stacklevel=1)
        return self.samples[index]


def read(*samples, complaint=""):
    one = Checked("train", "toy", "toy", NamedDataset("toy", Toy(samples, complaint)))
    assert plan([one], None) == len(samples)
    read_all([one], 0, lambda images: None)
    return one


def test_what_a_decoder_complains_of_is_told_with_its_place():
    (finding,) = read(Sample(image=photo(), image_id="a"), complaint="corrupt EXIF data").findings
    assert finding.text.startswith("train toy, image a: file: corrupt EXIF data; files are read without complaints;")


def test_an_image_id_given_twice_is_an_error():
    one = read(Sample(image=photo(0), image_id="a"), Sample(image=photo(1), image_id="a"))
    (finding,) = [finding for finding in all_findings([one]) if finding.problem.field == "image_id"]
    assert (finding.severity, finding.problem.rule) == ("error", "image_id_repeated")


def test_labels_that_cannot_be_drawn_do_not_break_the_sheet():
    wrong = boxes((0, 0, 9, 9), (0, 0, np.nan, 9), (9, 9, 3, 3), labels=[7, 0, 0])
    maps = {"segmentation": classes(9), "depth_m": depth(a=np.nan, b=-1, c=np.inf), "normals": normals(np.nan)}
    one = read(Sample(image=photo(), image_id="a", boxes=wrong, **maps), Sample(image=photo(1), image_id="b"))
    sheet = draw_sheet([one], one.findings)
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
    small = read(Sample(image=photo(), image_id="a", segmentation=classes().T))
    draw_sheet([small], small.findings)


def test_the_sheet_shows_the_photographs_the_labels_and_the_charts():
    sample = Sample(image=photo(), image_id="a", boxes=boxes((8, 8, 40, 40)), segmentation=classes(0, first=IGNORE))
    one = read(sample, Sample(image=photo(1), image_id="b", depth_m=depth()))
    sheet = draw_sheet([one], [])
    assert sheet.shape[1] == 4 * (640 + 20) + 20, "the photograph and three maps"
    expected = cv2.resize(photo(), (640, 480), interpolation=cv2.INTER_CUBIC)[300:380, 450:600]  # beside the box
    match = cv2.matchTemplate(sheet, expected, cv2.TM_SQDIFF_NORMED)
    assert match.min() < 1e-3, "the photograph is there"
    colours = colours_by_name(SPACE.classes)
    red = (sheet == colours[SPACE.classes[0]]).all(axis=2)
    assert red[: sheet.shape[0] // 3].sum() > 1000, "a bar of the class in its colour"
    assert red[sheet.shape[0] // 3 :].sum() > 1000, "the outline of its box"
    assert not (sheet == colours[SPACE.classes[1]]).all(axis=2).any(), "nothing of the class that is absent"


def test_the_right_end_of_a_wide_image_is_on_the_sheet():
    wide = np.full((30, 120, 3), 90, np.uint8)
    wide[:, 110:] = (250, 0, 0)
    one = read(Sample(image=wide, image_id="a", segmentation=np.zeros((30, 120), np.uint8)))

    sheet = draw_sheet([one], [])

    assert ((sheet[..., 0] > 240) & (sheet[..., 1:] < 10).all(axis=2)).sum() > 0.07 * 640 * 160


def test_progress_is_a_bar_on_a_terminal_and_a_line_elsewhere():
    for terminal in (True, False):
        text = io.StringIO()
        with progress(Console(file=text, force_terminal=terminal, width=100), 4) as count:
            count(3)
        assert ("0/4" in text.getvalue()) == terminal
        assert "read 3 images in" in text.getvalue()
