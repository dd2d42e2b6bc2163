"""Synthetic scenes: every label follows from the geometry, and (seed, index) says it all."""

import hashlib
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from visionmtl.datasets.scenes import (
    MIN_VISIBLE_PX,
    SCENES,
    SCENES_FLOORS,
    SCENES_OBJECTS,
    Scenes,
    compose,
    draw,
    raycast,
    shading,
    textures,
    visible_boxes,
)
from visionmtl.datasets.scenes.raycast import Solid

BALL = Solid("sphere", (0.0, 3.0, 1.0), (0.5, 0.5, 0.5), 0.0)
CUBE = Solid("box", (0.0, 3.0, 1.0), (0.5, 0.5, 0.5), 0.0)
CAN = Solid("cylinder", (0.0, 3.0, 1.0), (0.5, 0.5, 0.5), 0.0)
EYE = (0.0, 0.0, 1.0)


def ahead(*rays):
    return np.array(rays, np.float32).T


def fingerprint(sample):
    arrays = (sample.image, sample.segmentation, sample.depth_m, sample.normals, sample.boxes.xyxy, sample.boxes.area)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


@pytest.fixture(scope="module")
def scene_and_picture():
    rng = np.random.default_rng(3)
    scene = compose(rng, (128, 160))
    return scene, draw(scene, rng)


@pytest.mark.parametrize("solid", [BALL, CUBE, CAN], ids=lambda solid: solid.shape)
def test_a_ray_through_the_middle_enters_and_leaves_at_half_the_width(solid):
    enter, leave = raycast.interval(solid, EYE, ahead((0, 1, 0)))

    assert enter == pytest.approx([2.5]) and leave == pytest.approx([3.5])


@pytest.mark.parametrize("solid", [BALL, CUBE, CAN], ids=lambda solid: solid.shape)
def test_a_ray_past_the_solid_misses(solid):
    enter, leave = raycast.interval(solid, EYE, ahead((1, 1, 0), (0, 1, 1), (0, 0, 1)))

    assert (enter > leave).all()


def test_a_quarter_turned_cube_shows_its_edge_nearer():
    enter, _ = raycast.interval(CUBE._replace(yaw=math.pi / 4), EYE, ahead((0, 1, 0)))

    assert enter == pytest.approx([3 - math.sqrt(0.5)])


def test_surfaces_face_the_viewer():
    nearest = np.array([[0.0], [2.5], [1.0]], np.float32)
    for solid in (BALL, CUBE, CAN):
        normal, _, _ = raycast.surface(solid, nearest)
        np.testing.assert_allclose(normal, [[0], [-1], [0]], atol=1e-6)


def test_the_top_of_an_upright_solid_faces_up():
    for solid in (CUBE, CAN):
        normal, _, _ = raycast.surface(solid, np.array([[0.2], [2.9], [1.5]], np.float32))
        np.testing.assert_allclose(normal, [[0], [0], [1]], atol=1e-6)


def test_distance_is_zero_inside_and_metres_outside():
    points = np.array([[0, 0, 0], [3, 0, 3], [1, 1, 3.5]], np.float32)

    for solid in (BALL, CUBE, CAN):
        np.testing.assert_allclose(raycast.distance(solid, points), [0, 2.5, 2], atol=1e-6)


def test_a_flat_wall_has_one_depth_over_the_whole_picture():
    camera = raycast.look((2.0, 1.0, 1.2), yaw=0, pitch=0, roll=0, focal_px=1000.0, size=(32, 41))

    depth, face = raycast.room_hits((4.0, 6.0, 2.5), camera.position, raycast.world_rays(camera))

    np.testing.assert_allclose(depth, 5.0, rtol=1e-6)
    assert (face == 3).all()


def test_a_camera_that_looks_down_sees_the_floor_below_its_middle():
    camera = raycast.look((2.0, 3.0, 1.5), yaw=0.3, pitch=math.radians(30), roll=0, focal_px=50.0, size=(33, 33))

    depth, face = raycast.room_hits((9.0, 9.0, 2.5), camera.position, raycast.world_rays(camera))

    assert face[16, 16] == 4 and depth[16, 16] == pytest.approx(1.5 / math.sin(math.radians(30)), rel=1e-5)


def test_a_solid_shades_what_lies_behind_it_and_not_its_lit_side():
    lamp = (0.0, 0.0, 1.0)
    points = ahead((0, 2.5, 0), (0, 6, 0), (3, 3, 0), (0, 1, 0))  # lit side, behind, beside, in front

    shade = raycast.shadow(BALL, lamp, points, np.sqrt((points**2).sum(axis=0)))

    np.testing.assert_allclose(shade, [0, 1, 0, 0], atol=1e-4)


def test_screen_regions_cover_every_pixel_of_their_solid(scene_and_picture):
    scene, picture = scene_and_picture
    for number, solid in enumerate(scene.solids):
        outside = picture.instances == number
        outside[raycast.screen_region(scene.camera, raycast.corners(solid))] = False
        assert not outside.any()


def test_regions_with_a_point_behind_the_camera_are_the_whole_picture():
    camera = raycast.look(EYE, yaw=0, pitch=0, roll=0, focal_px=50.0, size=(32, 48))

    assert raycast.screen_region(camera, np.array([[0.0], [-1.0], [1.0]])) == (slice(0, 32), slice(0, 48))


def test_a_lamp_straight_above_gives_lambert_over_falloff():
    x, y = np.zeros(1, np.float32), np.zeros(1, np.float32)
    facing = np.array([0, 0, -1], np.float32).reshape(3, 1, 1)

    diffuse, _ = shading.lamp_light(np.full((1, 1), 3, np.float32), facing, x, y, np.array([0, 0, 1], np.float32))

    assert diffuse[0, 0] == pytest.approx(1 / (0.55 + 0.09 * 2**2))


def test_patterns_seen_from_afar_become_their_mean():
    paint = textures.Material(0, "checker", 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    u, v = np.random.default_rng(0).random((2, 1, 500), dtype=np.float32)
    near, far = (np.full((1, 500), size, np.float32) for size in (1e-3, 10.0))

    close, distant = (textures.albedo([paint], np.zeros((1, 500), np.int64), u, v, size) for size in (near, far))

    assert close.std() > 0.3
    np.testing.assert_allclose(distant, close.mean(), atol=0.05)  # one mean of 16 fields, met by 500 random points


def test_boxes_are_tight_round_the_visible_pixels_and_area_counts_them():
    instances = np.full((20, 30), -1)
    instances[2:7, 10:14] = 0  # 20 px
    instances[15:17, 3:8] = 1  # 10 px: too few
    instances[2:4, 10:14] = 2  # hides a part of the first: 8 px, too few

    boxes = visible_boxes(instances, [CAN, BALL, CUBE])

    assert MIN_VISIBLE_PX == 12
    np.testing.assert_array_equal(boxes.xyxy, [[10, 4, 14, 7]])
    assert boxes.area.tolist() == [12] and boxes.labels.tolist() == [SCENES_OBJECTS.classes.index("cylinder")]


def test_boxes_and_classes_of_a_drawn_scene_agree_with_its_instances(scene_and_picture):
    scene, picture = scene_and_picture
    boxes = visible_boxes(picture.instances, scene.solids)

    assert len(boxes.labels) >= 2
    for (x1, y1, x2, y2), label, area in zip(boxes.xyxy.astype(int), boxes.labels, boxes.area, strict=True):
        name = SCENES_OBJECTS.classes[label]
        masks = [picture.instances == number for number in range(len(scene.solids))]
        mask = next(mask for mask in masks if mask[y1:y2, x1:x2].sum() == mask.sum() == area)
        assert mask[y1, x1:x2].any() and mask[y2 - 1, x1:x2].any()
        assert mask[y1:y2, x1].any() and mask[y1:y2, x2 - 1].any()
        assert (picture.segmentation[mask] == SCENES.classes.index(name)).all()


def test_depth_is_positive_and_stays_in_the_room(scene_and_picture):
    scene, picture = scene_and_picture

    assert picture.depth_m.dtype == np.float32
    assert picture.depth_m.min() > 0 and picture.depth_m.max() < math.hypot(*scene.extent)


def test_normals_are_unit_vectors_towards_the_camera(scene_and_picture):
    scene, picture = scene_and_picture
    x, y = raycast.camera_rays(scene.camera)
    towards = -(picture.normals[..., 0] * x + picture.normals[..., 1] * y[:, None] + picture.normals[..., 2])

    np.testing.assert_allclose(np.linalg.norm(picture.normals, axis=-1), 1, atol=1e-5)
    assert towards.min() > -1e-3


def test_normals_agree_with_the_slope_of_the_depth(scene_and_picture):
    scene, picture = scene_and_picture
    x, y = raycast.camera_rays(scene.camera)
    points = np.stack([picture.depth_m * x, picture.depth_m * y[:, None], picture.depth_m], axis=-1)
    across, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
    slope = np.cross(down, across)
    slope /= np.linalg.norm(slope, axis=-1, keepdims=True)

    cosine = (slope * picture.normals[1:-1, 1:-1]).sum(axis=-1)

    # exact on planes; outlines mix two surfaces, and round sides curve between neighbours
    assert np.degrees(np.arccos(np.clip(np.median(cosine), -1, 1))) < 1
    assert (cosine > math.cos(math.radians(10))).mean() > 0.85


def test_the_floor_seen_through_the_camera_is_a_plane_with_its_normal():
    sample = Scenes(num_images=1).build().read(0)
    fx, fy, cx, cy = sample.intrinsics
    rows, columns = np.nonzero(sample.segmentation == SCENES.classes.index("floor"))
    z = sample.depth_m[rows, columns].astype(np.float64)
    points = np.stack([(columns + 0.5 - cx) / fx * z, (rows + 0.5 - cy) / fy * z, z], axis=1)
    across = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)[2][2]
    assert len(points) > 100 and abs(across @ sample.normals[rows[0], columns[0]]) == pytest.approx(1, abs=1e-5)


def test_every_class_and_shape_turns_up():
    reader = Scenes(num_images=12, size=(48, 60)).build()
    samples = [reader.read(index) for index in range(len(reader))]

    assert set(np.concatenate([np.unique(s.segmentation) for s in samples])) == set(range(len(SCENES.classes)))
    assert set(np.concatenate([s.boxes.labels for s in samples])) == set(range(len(SCENES_OBJECTS.classes)))


def test_pictures_are_not_flat():
    sample = Scenes(num_images=1).build().read(0)
    for name in ("wall", "floor"):
        pixels = sample.image[sample.segmentation == SCENES.classes.index(name)]
        assert pixels.std(axis=0).mean() > 5


@pytest.mark.slow
def test_another_process_draws_the_same_bytes():
    code = (
        "from test_scenes import Scenes, fingerprint\n"
        "reader = Scenes(num_images=9, size=(50, 70), seed=4).build()\n"
        "print(fingerprint(reader.read(8)), fingerprint(reader.read(3)))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    reader = pickle.loads(pickle.dumps(Scenes(num_images=9, size=(50, 70), seed=4).build()))

    assert not run.returncode, run.stderr
    assert run.stdout.split() == [fingerprint(reader.read(8)), fingerprint(reader.read(3))]


def test_splits_seeds_and_indices_give_different_scenes():
    specs = [Scenes(split=split, seed=seed, size=(32, 32)) for split in ("train", "val", "test") for seed in (0, 1)]
    samples = [spec.build().read(index) for spec in specs for index in range(3)]

    assert len({fingerprint(sample) for sample in samples}) == len(samples)
    assert len({sample.image_id for sample in samples}) == len(samples)


@pytest.mark.parametrize("size", [(32, 32), (33, 75), (96, 64), (32, 400)])
def test_any_size_from_32_px_works(size):
    sample = Scenes(num_images=1, size=size).build().read(0)

    assert sample.image.shape == (*size, 3) and sample.image.dtype == np.uint8
    assert sample.segmentation.shape == sample.depth_m.shape == size and sample.normals.shape == (*size, 3)
    assert sample.segmentation.dtype == np.uint8 and sample.depth_m.dtype == sample.normals.dtype == np.float32
    assert sample.boxes.xyxy.dtype == sample.boxes.area.dtype == np.float32 and sample.boxes.labels.dtype == np.int64


def test_unlabelled_fields_are_absent_and_the_picture_is_the_same():
    full, part = Scenes(size=(32, 48)).build(), Scenes(size=(32, 48), labels=("boxes", "depth_m")).build()
    sample = part.read(5)

    assert part.provides == {"boxes": SCENES_OBJECTS, "depth_m": None}
    assert full.provides == {
        "boxes": SCENES_OBJECTS, "segmentation": SCENES, "depth_m": None, "normals": None,
        "image_labels": SCENES_FLOORS,
    }  # fmt: skip
    assert sample.segmentation is None and sample.normals is None
    assert sample.boxes is not None and sample.depth_m is not None
    np.testing.assert_array_equal(sample.image, full.read(5).image)


def test_an_index_outside_names_the_way_out():
    with pytest.raises(IndexError, match="allowed are 0 to 4; raise num_images"):
        Scenes(num_images=5).build().read(5)
