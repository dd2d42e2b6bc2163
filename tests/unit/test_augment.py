"""Augmentation keeps every label in step with the image, whatever is drawn."""

import numpy as np
import pytest

from visionmtl.data.transforms.augment import Augment, fit
from visionmtl.structures import Boxes, Sample

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


@pytest.mark.parametrize("seed", SEEDS)
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


@pytest.mark.parametrize("seed", SEEDS)
def test_image_and_maps_show_the_same_place(seed):
    zoom = 0.7 + 0.05 * seed
    view = Augment(zoom=(zoom, zoom), flip=0.5).apply(drawn(seed), (96, 128), np.random.default_rng(seed))

    np.testing.assert_allclose(view.depth_m, (view.segmentation + np.float32(1)) / zoom, rtol=1e-6)
    agree = (view.image[..., 0] == view.segmentation * 20).mean()
    assert agree > 0.85  # all but the mixed pixels along the edges
    assert view.depth_m.dtype == np.float32 and view.segmentation.dtype == np.uint8


@pytest.mark.parametrize("seed", SEEDS)
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
