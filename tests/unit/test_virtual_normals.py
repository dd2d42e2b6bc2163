"""Virtual normals: the loss of a turned plane by hand, groups to compare, the camera of augmented views."""

import math

import numpy as np
import pytest
import torch

from visionmtl.data.transforms.augment import Augment
from visionmtl.ops.virtual_normals import (
    MIN_EDGE_M,
    NUM_GROUPS,
    group_points,
    point_indices,
    valid_groups,
    virtual_normal_loss,
)
from visionmtl.structures import Sample
from visionmtl.tasks.depth import Depth

SIZE = (48, 64)
CAMERA = torch.tensor([[60.0, 60.0, 32.0, 24.0]])


def plane(slope: float, camera: torch.Tensor = CAMERA, size: tuple[int, int] = SIZE) -> torch.Tensor:
    """Depth [1, H, W] of the plane z = 3 + slope * x; x = (column - cx) / fx * z."""
    fx, _, cx, _ = camera[0]
    across = (torch.arange(size[1]) + 0.5 - cx) / fx
    return (3 / (1 - slope * across)).expand(1, *size).clone()


def everywhere(depth_m: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(depth_m, dtype=torch.bool)


def test_points_are_spread_over_the_image_and_differ_within_a_group():
    indices = point_indices(*SIZE, "cpu")
    assert indices.shape == (3, NUM_GROUPS) and indices.min() >= 0 and indices.max() < SIZE[0] * SIZE[1]
    rows, columns = indices // SIZE[1], indices % SIZE[1]
    for values, size in ((rows, SIZE[0]), (columns, SIZE[1])):
        quarters = torch.bincount(values.flatten() * 4 // size, minlength=4) / values.numel()
        torch.testing.assert_close(quarters, torch.full((4,), 0.25), atol=0.01, rtol=0)


def test_a_wall_that_is_turned_costs_the_l1_distance_of_the_normals():
    """z = 3 has the normal (0, 0, 1), z = 3 + x has (-1, 0, 1) / sqrt 2: |dx| + |dz| = 1 / sqrt 2 + 1 - 1 / sqrt 2."""
    flat, turned = plane(0.0), plane(1.0)
    groups = valid_groups(flat, everywhere(flat), CAMERA).sum().float()

    loss = virtual_normal_loss(turned, flat, everywhere(flat), CAMERA, groups)

    assert groups > 500
    torch.testing.assert_close(loss, torch.tensor(1.0))
    assert virtual_normal_loss(2 * flat, flat, everywhere(flat), CAMERA, groups) < 1e-4  # farther, but as flat


def test_groups_are_measured_wide_and_bent():
    depth, valid = plane(0.2), everywhere(plane(0.2))
    valid[:, :, :32] = False
    groups = valid_groups(depth, valid, CAMERA)[0]
    a, b, c = group_points(depth, CAMERA)[0][:, groups]

    for one, other in ((a, b), (a, c), (b, c)):
        assert ((one - other).norm(dim=1) > MIN_EDGE_M).all()
    assert (point_indices(*SIZE, "cpu")[:, groups] % SIZE[1] >= 32).all() and groups.any()
    angle = torch.rad2deg(torch.acos(torch.nn.functional.cosine_similarity(b - a, c - a, dim=1)))
    assert angle.min() >= 29.99 and angle.max() <= 120.01
    near = torch.full((1, *SIZE), 0.1)  # all within centimetres
    assert not valid_groups(near, everywhere(near), CAMERA).any()


def test_the_task_learns_them_from_labels_alone():
    task, sample = Depth(virtual_normal_weight=0.5, gradient_weight=0), None
    sample = Sample(image=np.zeros((48, 64, 3), np.uint8), image_id="", depth_m=plane(0.0)[0].numpy(),
                    intrinsics=(60.0, 60.0, 32.0, 24.0))  # fmt: skip
    targets = task.collate([sample, None], SIZE)
    assert targets["camera"][0].tolist() == [60, 60, 32, 24]
    assert targets["camera"][1].tolist() == pytest.approx([32 / math.tan(math.pi / 6)] * 2 + [32, 24])
    counts = task.count(targets, SIZE)
    raw = plane(1.0).log()[:, None].repeat(2, 1, 1, 1).requires_grad_()

    parts = task.loss(raw, targets, torch.tensor([True, False]), counts)
    parts["virtual_normals"].backward()

    assert parts["virtual_normals"].item() == pytest.approx(0.5, rel=1e-4)
    assert raw.grad[0].abs().sum() > 0 and (raw.grad[1] == 0).all()
    assert list(Depth().collate([sample], SIZE)) == ["depth_m"]


@pytest.mark.parametrize("seed", range(6))
def test_a_view_has_the_camera_that_keeps_widths(seed: int):
    """Whatever is zoomed, cut, mirrored and placed: points keep their distance across, and z is divided by the zoom."""
    camera = torch.tensor([[120.0, 110.0, 66.0, 47.0]])
    depth = plane(0.3, camera, (96, 128))[0].numpy()
    codes = np.arange(96 * 128, dtype=np.float32).reshape(96, 128)  # where each pixel of the view comes from
    sample = Sample(image=np.zeros((96, 128, 3), np.uint8), image_id="", depth_m=depth,
                    normals=np.stack([codes] * 3, 2), intrinsics=tuple(camera[0].tolist()))  # fmt: skip
    augment = Augment(zoom=(0.5, 2.0), place="random")
    rng = np.random.default_rng(seed)
    zoom = augment.draw(np.random.default_rng(seed)).zoom
    view = augment.apply(sample, (48, 64), rng)
    fx, _, cx, _ = view.intrinsics

    rows, columns = np.nonzero(view.depth_m)
    code = view.normals[rows, columns, 0].astype(int)
    before = (code % 128 + 0.5 - 66) / 120 * depth.ravel()[code]
    after = (columns + 0.5 - cx) / fx * view.depth_m[rows, columns]
    # a nearest pixel is off by half a source pixel, 0.5 / 120 * z, and rounding of sizes by another
    np.testing.assert_allclose(after, before, atol=1.5 / 120 * depth.max())
    np.testing.assert_allclose(view.depth_m[rows, columns] * zoom, depth.ravel()[code], rtol=1e-5)


def test_a_mirrored_camera_looks_the_other_way():
    sample = Sample(image=np.zeros((10, 20, 3), np.uint8), image_id="", intrinsics=(9.0, 9.0, 4.0, 5.0))
    view = Augment(flip=1.0).apply(sample, (10, 20), np.random.default_rng(0))
    assert view.intrinsics == (9, 9, 16, 5)
