"""Virtual normals: planes through three far-apart points, predicted and true (Yin et al. 2019, arXiv:1907.12209).

Deviations from the paper: the points are the same quasi-random ones in every image and step, so that the loader can
count the groups that the loss will be a mean over; and the easiest quarter of the groups is not left out.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_GROUPS = 4096
MIN_EDGE_M = 0.6  # sec. 3.2 of the paper: theta, and the angles beta and alpha
MAX_COS, MIN_COS = 0.8660254037844387, -0.5  # of 30 and 120 degrees
_SPREAD = 1.1127756842787055  # the root of x^7 = x + 1: its powers spread points evenly over six dimensions
_STEPS = [int(2**32 * _SPREAD ** -(axis + 1)) for axis in range(6)]


def point_indices(height: int, width: int, device: torch.device | str) -> Tensor:
    """int64 [3, NUM_GROUPS]: indices into height * width pixels, of the three points of each group.

    Whole-number arithmetic, so that loader and device agree to the pixel.
    """
    numbers = torch.arange(1, NUM_GROUPS + 1, device=device)
    rows, columns = (
        torch.stack([(numbers * step % 2**32) * size >> 32 for step in _STEPS[half : half + 3]])
        for half, size in ((0, height), (3, width))
    )
    return rows * width + columns


def group_points(depth_m: Tensor, camera: Tensor) -> Tensor:
    """float32 [B, 3, NUM_GROUPS, 3]: the groups' points in metres, x right, y down, z forward.

    depth_m: [B, H, W]; camera: float32 [B, 4], fx, fy, cx, cy in pixels, the first of which has its centre at 0.5
    """
    height, width = depth_m.shape[1:]
    indices = point_indices(height, width, depth_m.device)
    z = depth_m.flatten(1).index_select(1, indices.flatten()).unflatten(1, (3, -1))
    fx, fy, cx, cy = (value[:, None, None] for value in camera.unbind(1))
    x = (indices % width + 0.5 - cx) / fx * z
    y = (indices // width + 0.5 - cy) / fy * z
    return torch.stack([x, y, z], dim=3)


def valid_groups(depth_m: Tensor, valid: Tensor, camera: Tensor) -> Tensor:
    """bool [B, NUM_GROUPS]: all three points measured, MIN_EDGE_M apart, and no line: angles of 30 to 120 degrees.

    depth_m: true metres [B, H, W], anything where not `valid`, bool [B, H, W]
    """
    indices = point_indices(depth_m.shape[1], depth_m.shape[2], depth_m.device)
    measured = valid.flatten(1).index_select(1, indices.flatten()).unflatten(1, (3, -1)).all(dim=1)
    a, b, c = group_points(torch.where(valid, depth_m, 1.0), camera).unbind(1)
    edges = [b - a, c - a, c - b]
    apart = torch.stack([edge.norm(dim=-1) for edge in edges]).amin(dim=0) > MIN_EDGE_M
    at_a, at_b = (F.cosine_similarity(*pair, dim=-1) for pair in ((b - a, c - a), (a - b, c - b)))
    bent = [(cos <= MAX_COS) & (cos >= MIN_COS) for cos in (at_a, at_b)]
    return measured & apart & bent[0] & bent[1]


def virtual_normal_loss(pred_m: Tensor, true_m: Tensor, valid: Tensor, camera: Tensor, total: Tensor) -> Tensor:
    """Mean over groups of the L1 distance of predicted and true unit normals (eq. 4); 0 without groups.

    pred_m, true_m: float32 [B, H, W] metres, the truth anything where not `valid`; total: groups in the step
    """
    true_m = torch.where(valid, true_m, 1.0)
    groups = valid_groups(true_m, valid, camera)
    normals = []
    for depth_m in (pred_m, true_m):
        a, b, c = group_points(depth_m, camera).unbind(1)
        normals.append(F.normalize(torch.linalg.cross(b - a, c - a), dim=-1, eps=1e-6))
    distance = (normals[0] - normals[1]).abs().sum(dim=-1)
    return torch.where(groups, distance, 0.0).sum() / total
