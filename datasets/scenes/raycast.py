"""Ray casting against simple solids in a box room, as pure numpy functions.

World: x, y horizontal, z up, metres, floor at z = 0. Camera: x right, y down, z forward.
Vectors are planar, [3, ...]. A camera ray has a forward component of 1, so its parameter is the depth along the
optical axis. No BLAS call: results do not depend on the number of threads.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Vector = tuple[float, float, float]
Region = tuple[slice, slice]  # rows, columns of the picture

_NEVER_ZERO = np.float32(1e-12)  # added to denominators: a ray along a face would give 0 / 0
_FAR = np.float32(1e9)  # finite: infinities would make NaN in differences
_NEAR_M = 0.05  # what lies nearer, or behind the camera, has no usable projection


class Camera(NamedTuple):
    """A pinhole camera; its principal point is the middle of the picture."""

    position: Vector
    right: Vector
    down: Vector
    forward: Vector
    focal_px: float
    size: tuple[int, int]  # H, W


class Solid(NamedTuple):
    """A convex body; `half` are its half extents before it is turned by `yaw` (radians) about the vertical axis."""

    shape: Literal["box", "sphere", "cylinder"]
    centre: Vector
    half: Vector  # a sphere: r, r, r; an upright cylinder: r, r, height / 2
    yaw: float


class Panel(NamedTuple):
    """A rectangle on a face of the room: a door, a window, a rug."""

    face: int  # as numbered by room_hits
    low: tuple[float, float]  # metres along the face
    high: tuple[float, float]
    tile_m: tuple[float, float]  # size of one repetition of its pattern


class Layers(NamedTuple):
    """What each pixel shows."""

    depth_m: Floats  # [H, W]
    normals: Floats  # [3, H, W] camera axes
    part: NDArray[np.int64]  # [H, W]: 0 to 5 the faces of the room, then the panels, then the solids
    u: Floats  # [H, W] in tiles of the part's pattern
    v: Floats


def look(position: Vector, yaw: float, pitch: float, roll: float, focal_px: float, size: tuple[int, int]) -> Camera:
    """A camera at `position`. Yaw 0 looks along y, positive yaw turns right, positive pitch looks down (radians)."""
    forward = (math.sin(yaw) * math.cos(pitch), math.cos(yaw) * math.cos(pitch), -math.sin(pitch))
    level = (math.cos(yaw), -math.sin(yaw), 0.0)
    under = _cross(forward, level)
    c, s = math.cos(roll), math.sin(roll)
    right = tuple(c * a + s * b for a, b in zip(level, under, strict=True))
    down = tuple(c * b - s * a for a, b in zip(level, under, strict=True))
    return Camera(position, right, down, forward, focal_px, size)  # type: ignore[arg-type]


def _cross(a: Vector, b: Vector) -> Vector:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def camera_rays(camera: Camera) -> tuple[Floats, Floats]:
    """Camera x [W] and y [H] of the rays through the pixel centres, at depth 1."""
    h, w = camera.size
    x = (np.arange(w, dtype=np.float32) + np.float32(0.5 - w / 2)) / np.float32(camera.focal_px)
    y = (np.arange(h, dtype=np.float32) + np.float32(0.5 - h / 2)) / np.float32(camera.focal_px)
    return x, y


def world_rays(camera: Camera) -> Floats:
    """Directions [3, H, W] in the world of the rays through the pixel centres."""
    x, y = camera_rays(camera)
    right, down, forward = (np.array(axis, np.float32)[:, None] for axis in camera[1:4])
    return (right * x)[:, None, :] + (down * y + forward)[:, :, None]


def to_camera(camera: Camera, vectors: Floats) -> Floats:
    """World directions [3, ...] in camera axes."""
    return np.stack([a * vectors[0] + b * vectors[1] + c * vectors[2] for a, b, c in camera[1:4]])


def room_hits(extent: Vector, origin: Vector, rays: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Where rays from inside the room [0, extent] meet its shell.

    Returns the ray parameter, and the face: 0 and 1 are the walls at x = 0 and x = extent[0], 2 and 3 those in y,
    4 the floor, 5 the ceiling.
    """
    half = [e / 2 for e in extent]
    far = [_slab(o - a, a, ray)[1] for o, a, ray in zip(origin, half, rays, strict=True)]
    hit = np.minimum(np.minimum(far[0], far[1]), far[2])
    face = np.where(hit == far[0], rays[0] > 0, np.where(hit == far[1], 2 + (rays[1] > 0), 4 + (rays[2] > 0)))
    return hit, face


def _slab(origin: float, half: float, ray: Floats) -> tuple[Floats, Floats]:
    """Ray parameters at which |origin + t ray| <= half begins and ends."""
    inverse = np.float32(1) / (ray + _NEVER_ZERO)
    middle, reach = np.float32(-origin) * inverse, np.float32(half) * np.abs(inverse)
    return middle - reach, middle + reach


def _turn(yaw: float, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    c, s = np.float32(math.cos(yaw)), np.float32(math.sin(yaw))
    return c * x - s * y, s * x + c * y


def _local(solid: Solid, vectors: Floats) -> tuple[Floats, Floats, Floats]:
    return (*_turn(-solid.yaw, vectors[0], vectors[1]), vectors[2])


def interval(solid: Solid, origin: Vector, rays: Floats) -> tuple[Floats, Floats]:
    """Ray parameters at which rays [3, ...] enter and leave the solid; enter > leave where they miss."""
    x, y, z = _local(solid, rays)
    start = np.array([o - c for o, c in zip(origin, solid.centre, strict=True)])
    ox, oy, oz = (float(value) for value in (*_turn(-solid.yaw, start[0], start[1]), start[2]))
    hx, hy, hz = solid.half

    if solid.shape == "sphere":
        along = np.float32(ox) * x + np.float32(oy) * y + np.float32(oz) * z
        return _round(x * x + y * y + z * z, along, ox * ox + oy * oy + oz * oz - hx * hx)
    enter, leave = _slab(oz, hz, z)
    if solid.shape == "cylinder":
        sides = [_round(x * x + y * y, np.float32(ox) * x + np.float32(oy) * y, ox * ox + oy * oy - hx * hx)]
    else:
        sides = [_slab(ox, hx, x), _slab(oy, hy, y)]
    for begin, end in sides:
        enter, leave = np.maximum(enter, begin), np.minimum(leave, end)
    return enter, leave


def _round(a: Floats, b: Floats, c: float) -> tuple[Floats, Floats]:
    """Both roots of a t^2 + 2 b t + c; (far ahead, far behind) where there is none."""
    a = a + _NEVER_ZERO
    inside = b * b - a * np.float32(c)
    hit, root = inside > 0, np.sqrt(np.maximum(inside, 0))
    return np.where(hit, (-b - root) / a, _FAR), np.where(hit, (root - b) / a, -_FAR)


def surface(solid: Solid, points: Floats) -> tuple[Floats, Floats, Floats]:
    """World normals [3, N] and texture coordinates u, v [N] (metres along the surface) of points [3, N] on a solid.

    Round sides run once around in u = 0..2 pi r.
    """
    offset = points - np.array(solid.centre, np.float32)[:, None]
    x, y, z = _local(solid, offset)
    hx, hy, hz = solid.half

    if solid.shape == "box":
        edge = np.stack([np.abs(x) / hx, np.abs(y) / hy, np.abs(z) / hz])
        axis = edge.argmax(axis=0)
        nx, ny, nz = (np.sign(value) * (axis == i) for i, value in enumerate((x, y, z)))
        u, v = np.where(axis == 0, y, x), np.where(axis == 2, y, z)
    elif solid.shape == "sphere":
        length = np.sqrt(x * x + y * y + z * z)
        nx, ny, nz = x / length, y / length, z / length
        u, v = np.arctan2(y, x) * hx, np.arcsin(np.clip(nz, -1, 1)) * hx
    else:
        radius = np.sqrt(x * x + y * y) + _NEVER_ZERO
        cap = np.abs(z) * hx > radius * hz
        nx, ny, nz = np.where(cap, 0, x / radius), np.where(cap, 0, y / radius), np.where(cap, np.sign(z), 0)
        u, v = np.where(cap, x, np.arctan2(y, x) * hx), np.where(cap, y, z)

    nx, ny = _turn(solid.yaw, nx, ny)
    return np.stack([nx, ny, nz]).astype(np.float32, copy=False), u, v


def distance(solid: Solid, points: Floats) -> Floats:
    """Metres from points [3, ...] to the solid, 0 inside."""
    offset = points - np.array(solid.centre, np.float32).reshape(3, *[1] * (points.ndim - 1))
    x, y, z = _local(solid, offset)
    hx, hy, hz = (np.float32(value) for value in solid.half)
    if solid.shape == "sphere":
        return np.maximum(np.sqrt(x * x + y * y + z * z) - hx, 0)
    dz = np.maximum(np.abs(z) - hz, 0)
    if solid.shape == "cylinder":
        dx = np.maximum(np.sqrt(x * x + y * y) - hx, 0)
        return np.sqrt(dx * dx + dz * dz)
    dx, dy = np.maximum(np.abs(x) - hx, 0), np.maximum(np.abs(y) - hy, 0)
    return np.sqrt(dx * dx + dy * dy + dz * dz)


def shadow(solid: Solid, light: Vector, from_light: Floats, metres: Floats) -> Floats:
    """How much of the light the solid takes away, 0..1, from points at light + from_light [3, ...].

    metres: length of from_light. The shadow is full where the ray runs far enough through the solid; how far grows
    with the distance behind it, which gives a penumbra that is sharp at the contact and soft far away.
    A solid does not shade its own lit side: there the ray ends where it enters.
    """
    enter, leave = interval(solid, light, from_light)
    through = (np.minimum(leave, 1) - enter) * metres
    behind = np.maximum(1 - leave, 0) * metres
    opacity: Floats = np.clip(through / (np.float32(0.02) + np.float32(0.16) * behind), 0, 1)
    return opacity


def corners(solid: Solid, margin_m: float = 0.0) -> NDArray[np.float64]:
    """The 8 corners [3, 8] of the turned bounding box, moved outwards by a margin."""
    signs = np.array([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)]).T * 2.0 - 1.0
    x, y, z = signs * (np.array(solid.half)[:, None] + margin_m)
    c, s = math.cos(solid.yaw), math.sin(solid.yaw)
    return np.stack([c * x - s * y, s * x + c * y, z]) + np.array(solid.centre)[:, None]


def cast_to_floor(light: Vector, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the shadows of points [3, N] below the light fall on the floor plane.

    With the points themselves they span everything in the room that the points' hull can shade.
    """
    lamp = np.array(light)[:, None]
    return lamp + (points - lamp) * (lamp[2] / (lamp[2] - points[2]))


def screen_region(camera: Camera, points: NDArray[np.float64]) -> Region:
    """Rows and columns that cover the hull of points [3, N]: everything if one of them is beside or behind the lens."""
    h, w = camera.size
    offset = points - np.array(camera.position)[:, None]
    right, down, depth = (a * offset[0] + b * offset[1] + c * offset[2] for a, b, c in camera[1:4])
    if depth.min() < _NEAR_M:
        return slice(0, h), slice(0, w)
    x, y = camera.focal_px * right / depth + w / 2, camera.focal_px * down / depth + h / 2
    return slice(*_span(y, h)), slice(*_span(x, w))


def _span(values: NDArray[np.float64], size: int) -> tuple[int, int]:
    low, high = float(values.min()), float(values.max())
    return max(0, math.floor(min(low, size))), max(0, min(size, math.ceil(high)))


def cast(camera: Camera, rays: Floats, extent: Vector, tiles_m: list[float], panels: list[Panel]) -> Layers:
    """The empty room [0, extent], seen from inside; where panels overlap the last one wins.

    tiles_m: for each of the 6 faces, the side of one repetition of its pattern
    """
    depth, face = room_hits(extent, camera.position, rays)
    points = [np.float32(o) + depth * ray for o, ray in zip(camera.position, rays, strict=True)]
    along, across = np.where(face < 2, points[1], points[0]), np.where(face < 4, points[2], points[1])
    inwards = np.array([[1, -1, 0, 0, 0, 0], [0, 0, 1, -1, 0, 0], [0, 0, 0, 0, 1, -1]], np.float32)
    tile_m = np.array(tiles_m, np.float32)[face]
    u, v, part = along / tile_m, across / tile_m, face.copy()

    seen = np.bincount(face.ravel(), minlength=6)
    for number, panel in enumerate(panels, start=6):
        if not seen[panel.face]:
            continue
        inside = (face == panel.face) & (along >= panel.low[0]) & (along < panel.high[0])
        inside &= (across >= panel.low[1]) & (across < panel.high[1])
        part[inside] = number
        u[inside] = (along[inside] - np.float32(panel.low[0])) / np.float32(panel.tile_m[0])
        v[inside] = (across[inside] - np.float32(panel.low[1])) / np.float32(panel.tile_m[1])
    return Layers(depth, to_camera(camera, inwards)[:, face], part, u, v)


def put(camera: Camera, rays: Floats, layers: Layers, solid: Solid, number: int, tile_m: float) -> None:
    """Write a solid, as part `number`, over what lies behind it."""
    rows, columns = screen_region(camera, corners(solid))
    near = rays[:, rows, columns]
    enter, leave = interval(solid, camera.position, near)
    hit = (enter < leave) & (enter > 0) & (enter < layers.depth_m[rows, columns])
    row, column = hit.nonzero()
    row, column = row + rows.start, column + columns.start
    depth = enter[hit]
    normals, u, v = surface(solid, np.array(camera.position, np.float32)[:, None] + near[:, hit] * depth)
    if solid.shape != "box":  # a whole number of tiles goes round, or the ends would not meet
        girth = 2 * math.pi * solid.half[0]
        tile_m = girth / max(1, round(girth / tile_m))

    layers.depth_m[row, column] = depth
    layers.normals[:, row, column] = to_camera(camera, normals)
    layers.part[row, column] = number
    layers.u[row, column], layers.v[row, column] = u / np.float32(tile_m), v / np.float32(tile_m)
