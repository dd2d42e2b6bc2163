"""Augmentation keeps every label in step with the image, whatever is drawn."""

import numpy as np
import pytest
import scene_run
import torch

from visionmtl.data.transforms.augment import Augment, Blur, fit
from visionmtl.ops.color import apply_matrices
from visionmtl.structures import IGNORE, Boxes, Sample

SEEDS = range(30)
SIZE = (96, 128)  # more than half of any drawn sample: a view at half or less lies on a grid, see test_reduced
WILD = Augment(zoom=(0.6, 2.5), flip=0.5, min_visible=0.0, min_box_px=0.0)


def boxes_of(*xyxy: list[float], crowd: bool = False, area: float | None = None) -> Boxes:
    array = np.array(xyxy, np.float32).reshape(-1, 4)
    sizes = (array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1])
    areas = sizes if area is None else np.full(len(array), area, np.float32)
    return Boxes(array, np.arange(len(array)), np.full(len(array), crowd), areas)


def drawn(seed: int) -> Sample:
    """Four rectangles, each with its own class, colour and depth, one in each quarter of the image."""
    rng = np.random.default_rng(seed)
    h, w = (int(side) for side in rng.integers(90, 200, 2))
    segmentation = np.full((h, w), 9, np.uint8)
    corners = []
    for k in range(4):
        top, left = h // 2 * (k // 2), w // 2 * (k % 2)
        y, x = top + int(rng.integers(0, 10)), left + int(rng.integers(0, 10))
        y2, x2 = top + int(rng.integers(25, h // 2 + 1)), left + int(rng.integers(25, w // 2 + 1))
        segmentation[y:y2, x:x2] = k
        corners.append([x, y, x2, y2])
    normals = np.zeros((h, w, 3), np.float32)
    normals[..., 0], normals[..., 2] = 0.6, -0.8
    return Sample(
        image=np.repeat(segmentation[..., None] * 20, 3, axis=2),
        image_id=str(seed),
        boxes=boxes_of(*corners),
        segmentation=segmentation,
        depth_m=segmentation + np.float32(1),
        normals=normals,
    )


@pytest.mark.parametrize("seed", range(8))
def test_boxes_follow_the_pixels_they_were_drawn_around(seed):
    view = WILD.apply(drawn(seed), (96, 128), np.random.default_rng(seed))

    present = [k for k in range(4) if (view.segmentation == k).any()]
    assert set(present) <= set(view.boxes.labels.tolist())
    for k, (x, y, x2, y2) in zip(view.boxes.labels, view.boxes.xyxy, strict=True):
        rows, columns = np.nonzero(view.segmentation == k)
        if len(rows):  # a sliver thinner than a pixel may fall between the sampled centres
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            # nearest sampling moves an edge by at most half a pixel of the coarser of the two grids
            np.testing.assert_allclose([x, y, x2, y2], extent, atol=1.5)
    assert (view.boxes.xyxy >= 0).all() and (view.boxes.xyxy <= [128, 96, 128, 96]).all()


@pytest.mark.parametrize("seed", range(8))
def test_image_and_maps_show_the_same_place(seed):
    zoom = 0.7 + 0.05 * seed
    view = Augment(zoom=(zoom, zoom), flip=0.5).apply(drawn(seed), (96, 128), np.random.default_rng(seed))

    np.testing.assert_allclose(view.depth_m, (view.segmentation + np.float32(1)) / zoom, rtol=1e-6)
    agree = (view.image[..., 0] == view.segmentation * 20).mean()
    assert agree > 0.85  # all but the mixed pixels along the edges
    assert view.depth_m.dtype == np.float32 and view.segmentation.dtype == np.uint8


@pytest.mark.parametrize("seed", range(8))
def test_view_fits_the_size_without_distortion(seed):
    rng = np.random.default_rng(seed)
    size = tuple(int(side) for side in rng.integers(40, 300, 2))
    sample = drawn(seed)
    view = WILD.apply(sample, size, rng)
    resized, meta = fit(sample.image, size)

    assert all(np.asarray(view.image.shape[:2]) <= size)
    assert meta.content_size == resized.shape[:2] and meta.size == sample.image.shape[:2]
    assert 0 in np.subtract(size, resized.shape[:2])  # touches one side
    h, w = meta.size
    scale = min(size[0] / h, size[1] / w)
    np.testing.assert_allclose(meta.content_size, [h * scale, w * scale], atol=0.5 + 1e-9)


def test_labels_are_sampled_at_pixel_centres():
    columns = np.tile(np.arange(30, dtype=np.uint8), (30, 1))
    sample = Sample(image=np.zeros((30, 30, 3), np.uint8), image_id="", segmentation=columns)
    view = Augment().apply(sample, (10, 10), np.random.default_rng(0))
    assert view.segmentation[0].tolist() == list(range(1, 30, 3))  # plain INTER_NEAREST gives 0, 3, 6, ...


def test_disabled_augmentation_is_only_the_fit():
    sample = drawn(3)
    view = Augment().apply(sample, SIZE, np.random.default_rng(0))

    np.testing.assert_array_equal(view.image, fit(sample.image, SIZE)[0])
    assert len(view.boxes.labels) == 4
    assert view.depth_m.max() == sample.depth_m.max()


def test_flipping_twice_gives_the_sample_back():
    sample, flip = drawn(5), Augment(flip=1.0)
    size = sample.image.shape[:2]
    once = flip.apply(sample, size, np.random.default_rng(0))
    twice = flip.apply(once, size, np.random.default_rng(0))

    assert not np.array_equal(once.segmentation, sample.segmentation)
    np.testing.assert_allclose(once.normals[0, 0], [-0.6, 0, -0.8], rtol=1e-6)
    for field in ("image", "segmentation", "depth_m", "normals"):
        np.testing.assert_array_equal(getattr(twice, field), getattr(sample, field))
    np.testing.assert_array_equal(twice.boxes.xyxy, sample.boxes.xyxy)


def test_area_scales_with_zoom_and_visible_share():
    image = np.zeros((100, 100, 3), np.uint8)
    sample = Sample(image=image, image_id="", boxes=boxes_of([0, 0, 100, 100], area=5000))
    halved = Augment().apply(sample, (50, 50), np.random.default_rng(0))
    cropped = Augment(zoom=(2, 2)).apply(sample, (100, 100), np.random.default_rng(0))

    assert halved.boxes.area == pytest.approx([5000 / 4])
    assert cropped.boxes.area == pytest.approx([5000 * 4 / 4])  # twice the scale, a quarter visible


def test_remnants_are_dropped_but_crowd_regions_stay():
    image = np.zeros((100, 100, 3), np.uint8)
    strip = [[0.0, 0, 100, 100]]
    zoom = Augment(zoom=(3, 3), min_visible=0.5)  # keeps a ninth
    object_ = zoom.apply(Sample(image=image, image_id="", boxes=boxes_of(*strip)), (99, 99), np.random.default_rng(0))
    crowd = zoom.apply(
        Sample(image=image, image_id="", boxes=boxes_of(*strip, crowd=True)), (99, 99), np.random.default_rng(0)
    )

    assert object_.boxes is not None and len(object_.boxes.labels) == 0
    assert crowd.boxes.crowd.tolist() == [True]


@pytest.mark.filterwarnings("error")
def test_degenerate_boxes_disappear_without_a_crash():
    nan, inf = float("nan"), float("inf")
    bad = boxes_of(
        [5, 5, 5, 9], [9, 9, 5, 5], [-9, -9, -1, -1], [200, 0, 300, 50], [nan, 0, 9, 9], [0, 0, inf, nan], area=1.0
    )
    for crowd in (False, True):
        boxes = Boxes(bad.xyxy, bad.labels, np.full(6, crowd), bad.area)
        sample = Sample(image=np.zeros((60, 80, 3), np.uint8), image_id="", boxes=boxes)
        for seed in SEEDS:
            assert len(WILD.apply(sample, (32, 32), np.random.default_rng(seed)).boxes.labels) == 0


def test_unlabelled_stays_unlabelled_and_empty_stays_empty():
    sample = Sample(image=np.zeros((60, 80, 3), np.uint8), image_id="a", boxes=boxes_of())
    view = WILD.apply(sample, (32, 32), np.random.default_rng(0))

    assert view.boxes.xyxy.shape == (0, 4)
    assert view.segmentation is None and view.depth_m is None and view.normals is None


def test_zoom_that_is_no_range_is_refused():
    with pytest.raises(ValueError, match=r"0 < low <= high; write e.g. zoom"):
        Augment(zoom=(1.5, 1.0))


def test_a_larger_input_than_in_training_is_a_zoom_that_the_frame_tells():
    image = np.zeros((100, 200, 3), np.uint8)
    assert fit(image, (50, 100))[1].zoom == 1
    assert fit(image, (100, 200), train_size=(50, 100))[1].zoom == 2
    assert fit(image, (60, 60), train_size=(50, 100))[1].zoom == pytest.approx(0.3 / 0.5)


def test_a_view_placed_at_random_moves_all_labels_and_pads_with_nothing():
    sample = drawn(2)
    settings = {"zoom": (0.5, 0.5), "min_visible": 0.0}
    corner = Augment(**settings).apply(sample, SIZE, np.random.default_rng(0))
    h, w = corner.image.shape[:2]
    tops, lefts = set(), set()
    for seed in SEEDS:
        view = Augment(**settings, place="random").apply(sample, SIZE, np.random.default_rng(seed))
        top, left = view.image.shape[0] - h, view.image.shape[1] - w
        tops.add(top)
        lefts.add(left)
        assert top + h <= SIZE[0] and left + w <= SIZE[1]
        for field, padding in {"image": 0, "segmentation": IGNORE, "depth_m": 0, "normals": 0}.items():
            moved = getattr(view, field)
            np.testing.assert_array_equal(moved[top:, left:], getattr(corner, field))
            assert (moved[:top] == padding).all() and (moved[:, :left] == padding).all()
        np.testing.assert_array_equal(view.boxes.xyxy, corner.boxes.xyxy + np.float32([left, top, left, top]))
    assert len(tops) > 10 and len(lefts) > 10 and min(tops) < 5 and max(tops) > SIZE[0] - h - 5


def test_zooming_out_makes_things_farther():
    sample = drawn(1)
    view = Augment(zoom=(0.5, 0.5)).apply(sample, SIZE, np.random.default_rng(0))
    assert view.depth_m.max() == 2 * sample.depth_m.max()


def test_rotation_turns_all_labels_together():
    """A rectangle turned by a quarter of 90 degrees: pixels, depth, normals and box stay with each other."""
    for seed in range(6):
        sample = drawn(seed)
        size = sample.image.shape[:2]
        view = Augment(rotate_deg=20, min_visible=0.0).apply(sample, size, np.random.default_rng(seed))

        known = view.segmentation != IGNORE
        agree = (view.image[..., 0] == view.segmentation * 20)[known].mean()
        assert agree > 0.8  # all but the mixed pixels along the edges
        np.testing.assert_array_equal(view.depth_m[known], view.segmentation[known] + np.float32(1))
        assert (view.depth_m[~known] == 0).all() and (view.normals[~known] == 0).all() and 0 < (~known).mean() < 0.3
        np.testing.assert_allclose(np.linalg.norm(view.normals[known], axis=1), 1, rtol=1e-5)
        for k, box in zip(view.boxes.labels, view.boxes.xyxy, strict=True):
            rows, columns = np.nonzero(view.segmentation == k)
            if len(rows):
                # the box around the ellipse lies inside that around the corners, and around the same middle
                middle = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
                np.testing.assert_allclose(middle, [columns.mean(), rows.mean()], atol=6)
                assert box[0] >= columns.min() - 1 and box[2] <= columns.max() + 2


def test_rotation_by_hand():
    """Clockwise about the middle: what lies to the right of it moves down, and a vector to the right turns down."""
    normals = np.zeros((101, 101, 3), np.float32)
    normals[..., 0] = 1
    depth = np.ones((101, 101), np.float32)
    depth[48:53, 78:83] = 5  # 30 px right of the middle
    sample = Sample(image=np.zeros((101, 101, 3), np.uint8), image_id="", depth_m=depth, normals=normals,
                    boxes=boxes_of([78, 48, 83, 53], [40.5, 30.5, 60.5, 70.5]))  # fmt: skip

    view = Augment(rotate_deg=45)._rotated(sample, 30.0)

    rows, columns = np.nonzero(view.depth_m == 5)
    middle = 50 + 30 * np.array([np.sin(np.pi / 6), np.cos(np.pi / 6)])
    np.testing.assert_allclose([rows.mean(), columns.mean()], middle, atol=0.3)
    np.testing.assert_allclose(view.normals[50, 50], [np.cos(np.pi / 6), 0.5, 0], rtol=1e-6)
    # a square's ellipse is a circle: its box only moves; one of 20 x 40 has sqrt(10^2 * 3/4 + 20^2 * 1/4) as half width
    np.testing.assert_allclose(view.boxes.xyxy[0, 2:] - view.boxes.xyxy[0, :2], [5, 5], rtol=1e-5)
    np.testing.assert_allclose((view.boxes.xyxy[0, :2] + 2.5)[::-1], middle + 0.5, rtol=1e-5)
    wide = (view.boxes.xyxy[1, 2:] - view.boxes.xyxy[1, :2]) / 2
    np.testing.assert_allclose(wide, [np.sqrt(175), np.sqrt(325)], rtol=1e-5)
    assert view.boxes.area.tolist() == [25, 800]


def test_rotation_takes_images_of_many_channels():
    image = np.random.default_rng(0).integers(1, 256, (40, 60, 6), np.uint8)
    view = Augment(rotate_deg=10)._rotated(Sample(image=image, image_id=""), 10.0)
    alone = Augment(rotate_deg=10)._rotated(Sample(image=np.ascontiguousarray(image[..., 5:]), image_id=""), 10.0)
    difference = np.abs(view.image[..., 5:].astype(int) - alone.image)
    assert difference.max() <= 8 and difference.mean() < 1.5  # OpenCV rounds differently for other numbers of channels


def test_crops_of_one_class_are_cut_elsewhere():
    segmentation = np.full((100, 200), 3, np.uint8)
    segmentation[:, 150:] = 7
    sample = Sample(image=np.zeros((100, 200, 3), np.uint8), image_id="", segmentation=segmentation)
    plain, choosy = Augment(zoom=(2, 2)), Augment(zoom=(2, 2), max_class_share=0.75)

    def share(augment: Augment, seed: int) -> float:
        view = augment.apply(sample, (96, 192), np.random.default_rng(seed))
        return max((view.segmentation == k).mean() for k in (3, 7))

    shares = {augment: [share(augment, seed) for seed in range(60)] for augment in (plain, choosy)}
    # about one crop in ten lies half on each side, so ten tries find one in two of three cases
    assert np.mean(np.array(shares[choosy]) < 0.78) > 3 * np.mean(np.array(shares[plain]) < 0.78) > 0
    assert shares[choosy] == [share(choosy, seed) for seed in range(60)]
    first = [augment.apply(sample, (96, 192), np.random.default_rng(1)).image.shape for augment in (plain, choosy)]
    assert first[0] == first[1]


def test_some_views_stay_whole():
    sample, augment = drawn(0), Augment(zoom=(2, 2), whole=0.5)
    zooms = [augment.draw(np.random.default_rng(seed)).zoom for seed in range(400)]
    assert set(zooms) == {1.0, 2.0} and 0.4 < np.mean(np.array(zooms) == 1) < 0.6
    assert (
        augment.apply(sample, SIZE, np.random.default_rng(0)).depth_m.shape
        == (augment.apply(sample, SIZE, np.random.default_rng(0)).image.shape[:2])
    )


def test_blur_and_grey_come_as_often_as_they_are_asked_for():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    sample = Sample(image=image, image_id="")
    blurred = [
        not np.array_equal(
            Augment(blur=Blur(probability=0.3, sigma_px=(1, 1)))
            .apply(sample, (64, 64), np.random.default_rng(s))
            .image,
            image,
        )
        for s in range(200)
    ]
    assert 0.2 < np.mean(blurred) < 0.4
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    grey = Augment(grey=1.0)
    matrix = torch.from_numpy(grey.color(image, np.random.default_rng(0)))[None]
    colors = apply_matrices(pixels, matrix)[0]
    torch.testing.assert_close(colors[0], colors[1])
    luma = torch.tensor([0.299, 0.587, 0.114]) @ pixels[0].float().flatten(1)
    torch.testing.assert_close(colors[0].flatten(), luma)
    assert grey.colors


def test_what_is_off_draws_no_number():
    """Runs of before see the same views: four numbers a view and four a colour, as ever."""
    sample, augment = drawn(0), Augment(zoom=(0.75, 1.33), flip=0.5, brightness=0.1)
    rng, plain = np.random.default_rng(0), np.random.default_rng(0)
    augment.color(augment.apply(sample, SIZE, rng).image, rng)
    plain.random(4)
    plain.uniform(-1, 1, 4)
    assert rng.random() == plain.random()


def test_settings_without_effect_are_refused():
    with pytest.raises(ValueError, match=r"whole is 0\.5, but zoom is"):
        Augment(whole=0.5)
    with pytest.raises(ValueError, match="no view is a crop"):
        Augment(zoom=(0.5, 1), max_class_share=0.75)
    with pytest.raises(ValueError, match=r"0 < low <= high; write e\.g\. sigma_px"):
        Blur(probability=0.5, sigma_px=(2, 1))


@pytest.mark.parametrize("settings", [{"min_box_px": 4.0}, {"min_visible": 0.5}])
def test_settings_about_boxes_need_a_task_that_learns_boxes(settings: dict):
    scene_run.run(names=("detection",), data={"augment": settings})
    with pytest.raises(ValueError, match="is set, but no task learns boxes, so it would have no effect; remove it"):
        scene_run.run(names=("depth",), data={"augment": settings})


def test_a_bound_on_the_share_of_classes_needs_a_task_that_learns_classes():
    augment = {"max_class_share": 0.75, "zoom": (1, 2)}
    scene_run.run(names=("segmentation",), data={"augment": augment})
    with pytest.raises(ValueError, match="no task learns segmentation"):
        scene_run.run(names=("detection",), data={"augment": augment})
