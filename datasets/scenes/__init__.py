"""Synthetic rooms with textured boxes, spheres and cylinders: exact labels for every task, no download, any size.

Licence: the pictures are made by this file, so they share the licence of the project.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from visionmtl.datasets import Dataset
from visionmtl.datasets.scenes import raycast, shading, textures
from visionmtl.datasets.scenes.raycast import Camera, Floats, Layers, Panel, Solid, Vector
from visionmtl.datasets.scenes.textures import Material, linear_rgb
from visionmtl.io.label_maps import outlines
from visionmtl.structures import Boxes, LabelSpace, Sample

SCENES = LabelSpace(
    "scenes",
    ("wall", "floor", "ceiling", "door", "window", "box", "sphere", "cylinder"),
    ((152, 160, 190), (140, 100, 70), (225, 225, 215), (170, 60, 160), (90, 200, 250), (230, 60, 50), (250, 200, 40),
     (50, 170, 80)),
)  # fmt: skip
SCENES_OBJECTS = LabelSpace("scenes_objects", SCENES.classes[5:], SCENES.colours[5:])
SCENES_FLOORS = LabelSpace(
    "scenes_floors",
    ("planks", "tiles", "checker", "marble", "weave"),
    ((170, 120, 70), (120, 150, 170), (60, 60, 70), (220, 215, 200), (110, 150, 90)),
)
"""What the floor is made of: the label of the image as a whole."""
MIN_VISIBLE_PX = 12  # an object that shows fewer pixels gets no box; its pixels keep their class

_WALL, _FLOOR, _CEILING, _DOOR, _WINDOW = range(5)
_FLOOR_FACE = 4  # of the faces of the room, after the walls
_TYPICAL_HUE = {5: 0.02, 6: 0.28, 7: 0.62}  # by class id: reddish boxes, greenish spheres, bluish cylinders
_SPLITS = {"train": 0, "val": 1, "test": 2}
LabelField = Literal["boxes", "segmentation", "depth_m", "normals", "image_labels"]


@dataclass(frozen=True)
class Scene:
    camera: Camera
    extent: Vector  # metres in x, y, z
    panels: list[Panel]
    solids: list[Solid]
    materials: list[Material]  # of the 6 faces of the room, then of the panels, then of the solids
    lamp: Vector
    lamp_rgb: Vector
    ambient_rgb: Vector


@dataclass(frozen=True)
class Picture:
    """A drawn scene: the image and all that is known about it."""

    image: NDArray[np.uint8]  # [H, W, 3] RGB
    segmentation: NDArray[np.uint8]  # [H, W] class ids of SCENES
    instances: NDArray[np.int64]  # [H, W] position in Scene.solids, negative elsewhere
    depth_m: Floats  # [H, W]
    normals: Floats  # [H, W, 3] camera axes


class Scenes(Dataset):
    """Rooms of 4 to 7.5 m, seen from 1.0 to 1.8 m height with one field of view.

    A scene depends on (seed, split, index) and size only; no split repeats another's scenes. `labels` can leave fields
    out, to try what partly labelled data sets do. An object that shows fewer than MIN_VISIBLE_PX pixels gets no box.
    """

    type: Literal["scenes"] = "scenes"
    split: Literal["train", "val", "test"] = "train"
    num_images: Annotated[int, Field(gt=0)] = 400
    size: tuple[Annotated[int, Field(ge=32)], Annotated[int, Field(ge=32)]] = (128, 160)  # H, W
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    labels: Annotated[tuple[LabelField, ...], Field(min_length=1)] = (
        "boxes", "segmentation", "depth_m", "normals", "image_labels",
    )  # fmt: skip

    def build(self) -> "SceneReader":
        return SceneReader(self)


class SceneReader:
    """Draws scenes when they are read; nothing is kept."""

    most_boxes = 8  # 2 to 6 solids, some with a small one on top

    def __init__(self, spec: Scenes) -> None:
        self.spec = spec
        spaces = {"boxes": SCENES_OBJECTS, "segmentation": SCENES, "image_labels": SCENES_FLOORS}
        self.provides: dict[str, LabelSpace | None] = {name: spaces.get(name) for name in spec.labels}

    def __len__(self) -> int:
        return self.spec.num_images

    def read(self, index: int) -> Sample:
        """Scene `index`, 0 <= index < len(self)."""
        spec = self.spec
        if not 0 <= index < spec.num_images:
            raise IndexError(f"no scene {index}; allowed are 0 to {spec.num_images - 1}; raise num_images for more")
        rng = np.random.default_rng((spec.seed, _SPLITS[spec.split], index))
        scene = compose(rng, spec.size)
        picture = draw(scene, rng)
        floor = SCENES_FLOORS.classes.index(scene.materials[_FLOOR_FACE].pattern)
        known: dict[str, Any] = vars(picture) | {
            "boxes": visible_boxes(picture.instances, scene.solids),
            "image_labels": np.array([floor], np.int64),
        }
        (height, width), focal_px = scene.camera.size, scene.camera.focal_px
        return Sample(
            image=picture.image,
            intrinsics=(focal_px, focal_px, width / 2, height / 2),
            image_id=f"scenes_{spec.split}_{spec.seed}_{index:06d}",
            **{name: known[name] for name in spec.labels},
        )


def visible_boxes(instances: NDArray[np.int64], solids: list[Solid]) -> Boxes:
    """The tight box round the visible pixels of each solid, and their number as area.

    instances: [H, W], solids[i] shows where the value is i
    """
    ids, xyxy, area = outlines(instances)
    visible = (ids >= 0) & (area >= MIN_VISIBLE_PX)
    labels = [SCENES_OBJECTS.classes.index(solids[number].shape) for number in ids[visible]]
    return Boxes(xyxy[visible], np.array(labels, np.int64), np.zeros(len(labels), np.bool_), area[visible])


def compose(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """A random room with 2 to 6 objects in front of the camera (fewer where they find no place)."""
    extent = (rng.uniform(4, 7.5), rng.uniform(4, 7.5), rng.uniform(2.4, 2.9))
    around = rng.uniform(0, 2 * math.pi)
    away = rng.uniform(0.55, 0.85)
    position = (
        extent[0] / 2 * (1 + away * math.cos(around)),
        extent[1] / 2 * (1 + away * math.sin(around)),
        rng.triangular(1.0, 1.4, 1.8),
    )
    yaw = math.atan2(extent[0] / 2 - position[0], extent[1] / 2 - position[1]) + rng.normal(0, 0.25)
    # 0.6 of the diagonal: 66 degrees across at 4:5; constant, or metric depth could not be learnt from one picture
    focal_px = 0.6 * math.hypot(*size) * rng.uniform(0.98, 1.02)
    camera = raycast.look(position, yaw, rng.uniform(0, 0.24), rng.normal(0, 0.015), focal_px, size)

    wall, floor = textures.wall_paint(rng, _WALL), textures.floor_paint(rng, _FLOOR)
    faces = [wall, wall, wall, wall, floor, textures.ceiling_paint(rng, _CEILING)]
    panels = [*_skirting(rng, extent), *_openings(rng, extent), *_rug(rng, extent)]
    solids = _place(rng, camera, yaw, extent)
    labels = [SCENES.classes.index(solid.shape) for solid in solids]
    coats = [textures.object_paint(rng, label, _TYPICAL_HUE[label]) for label in labels]
    warm = rng.uniform(-0.12, 0.15)
    power, ambient = rng.uniform(0.85, 1.3), rng.uniform(0.32, 0.55)
    return Scene(
        camera=camera,
        extent=extent,
        panels=[panel for panel, _ in panels],
        solids=solids,
        materials=[*faces, *(material for _, material in panels), *coats],
        lamp=(extent[0] * rng.uniform(0.25, 0.75), extent[1] * rng.uniform(0.25, 0.75), extent[2] - 0.35),
        lamp_rgb=(power * (1 + warm), power, power * (1 - warm)),
        ambient_rgb=(ambient * 0.95, ambient, ambient * 1.06),
    )


def _skirting(rng: np.random.Generator, extent: Vector) -> Iterator[tuple[Panel, Material]]:
    """A narrow board at the foot of every wall."""
    paint = linear_rgb(0.1, 0.05, rng.uniform(0.45, 0.9))
    for face in range(4):
        length = extent[1 if face < 2 else 0]
        yield Panel(face, (0, 0), (length, 0.1), (1, 1)), Material(_WALL, "plaster", 1, paint, paint)


def _openings(rng: np.random.Generator, extent: Vector) -> Iterator[tuple[Panel, Material]]:
    """Doors of one size (a cue for metric depth) and windows of many; a wall of 5 m or more has room for two."""
    hue = rng.random() if rng.random() < 0.3 else rng.uniform(0.04, 0.1)
    wood, value, day = rng.uniform(0.3, 0.7), rng.uniform(0.5, 0.9), rng.uniform(0.75, 1)
    dark, light = linear_rgb(hue, wood, value * 0.35), linear_rgb(hue, wood * 0.6, value)
    door = Material(_DOOR, "door", 1, dark, light, gloss=0.1)
    frame, sky = linear_rgb(0.1, 0.05, 0.85), linear_rgb(0.57, rng.uniform(0.1, 0.4), day)
    window = Material(_WINDOW, "window", 1, frame, sky, glow=1)
    for face in range(4):
        length = extent[1 if face < 2 else 0]
        ends = [length] if length < 5 else [length / 2, length]
        for start, end in zip([0, *ends], ends, strict=False):
            kind = rng.random()
            if kind < 0.35:
                low = rng.uniform(start + 0.2, end - 1.2)
                yield Panel(face, (low, 0), (low + 1, 2.1), (1, 2.1)), door
            elif kind < 0.8:
                size = rng.uniform(1.2, min(2, end - start - 0.3)), rng.uniform(1.1, 1.3)
                low, sill = rng.uniform(start + 0.1, end - size[0] - 0.1), rng.uniform(0.8, 0.95)
                yield Panel(face, (low, sill), (low + size[0], sill + size[1]), size), window


def _rug(rng: np.random.Generator, extent: Vector) -> Iterator[tuple[Panel, Material]]:
    """A carpet in every third room, near its middle."""
    if rng.random() < 0.35:
        hue, saturation = rng.random(), rng.uniform(0.3, 0.7)
        dark, light = linear_rgb(hue, saturation, 0.35), linear_rgb(hue + 0.1, saturation * 0.6, 0.75)
        a, b = rng.uniform(0.8, 1.3), rng.uniform(0.6, 1.2)
        x, y = extent[0] * rng.uniform(0.35, 0.65), extent[1] * rng.uniform(0.35, 0.65)
        pattern = str(rng.choice(("weave", "stripes", "dots", "rings")))
        yield Panel(4, (x - a, y - b), (x + a, y + b), (0.8, 0.8)), Material(_FLOOR, pattern, 0.8, dark, light)


def _solid(rng: np.random.Generator, x: float, y: float, base: float, scale: float = 1.0) -> Solid:
    shape = ("box", "sphere", "cylinder")[int(rng.integers(3))]
    yaw = rng.uniform(0, 2 * math.pi)
    if shape == "sphere":
        half = (scale * rng.uniform(0.24, 0.45),) * 3
    elif shape == "cylinder":
        half = (scale * rng.uniform(0.16, 0.32),) * 2 + (scale * rng.uniform(0.25, 0.6),)
    else:
        half = (scale * rng.uniform(0.2, 0.42), scale * rng.uniform(0.2, 0.42), scale * rng.uniform(0.18, 0.5))
    return Solid(shape, (x, y, base + half[2]), half, yaw)


def _place(rng: np.random.Generator, camera: Camera, yaw: float, extent: Vector) -> list[Solid]:
    """Objects on the floor in front of the camera, clear of walls and each other; sometimes a small one on a box."""
    num_solids = int(rng.integers(2, 7))
    half_width = camera.size[1] / 2 / camera.focal_px * 0.9
    solids: list[Solid] = []
    taken: list[tuple[float, float, float]] = []
    for _ in range(30):
        if len(solids) >= num_solids:
            break
        ahead = rng.uniform(1.7, 5)
        aside = ahead * half_width * rng.uniform(-1, 1)
        x = camera.position[0] + math.sin(yaw) * ahead + math.cos(yaw) * aside
        y = camera.position[1] + math.cos(yaw) * ahead - math.sin(yaw) * aside
        solid = _solid(rng, x, y, 0)
        reach = math.hypot(*solid.half[:2]) if solid.shape == "box" else solid.half[0]
        inside = all(reach + 0.03 < p < e - reach - 0.03 for p, e in zip((x, y), extent, strict=False))
        if not inside or any(math.hypot(x - a, y - b) < reach + r + 0.04 for a, b, r in taken):
            continue
        solids.append(solid)
        taken.append((x, y, reach))
        if solid.shape == "box" and solid.half[2] < 0.35 and min(solid.half[:2]) > 0.25 and len(solids) < num_solids:
            solids.append(_solid(rng, x, y, 2 * solid.half[2], scale=0.7))
    return solids


# ---- how it looks ----


def draw(scene: Scene, rng: np.random.Generator) -> Picture:
    """Cast, shade, and add the sensor's noise."""
    camera, rays = scene.camera, raycast.world_rays(scene.camera)
    tiles_m = [material.tile_m for material in scene.materials]
    layers = raycast.cast(camera, rays, scene.extent, tiles_m[:6], scene.panels)
    first = len(scene.materials) - len(scene.solids)
    for number, solid in enumerate(scene.solids, start=first):
        raycast.put(camera, rays, layers, solid, number, tiles_m[number])
    linear = _shade(scene, rays, layers)
    noise = rng.standard_normal((*camera.size, 3), np.float32) * np.float32(rng.uniform(1, 4))
    return Picture(
        image=shading.develop(linear, layers.part, noise),
        segmentation=np.array([material.label for material in scene.materials], np.uint8)[layers.part],
        instances=layers.part - first,
        depth_m=layers.depth_m,
        normals=cv2.merge(list(layers.normals)),
    )


def _shade(scene: Scene, rays: Floats, layers: Layers) -> Floats:
    """Linear RGB [3, H, W]: albedo x (ambient x openness + lamp x (1 - shadow) + glow) + highlights."""
    camera, depth, normals, part, materials = scene.camera, layers.depth_m, layers.normals, layers.part, scene.materials
    x, y = raycast.camera_rays(camera)
    offset = np.array(scene.lamp, np.float32) - np.array(camera.position, np.float32)
    lamp, shine = shading.lamp_light(depth, normals, x, y, raycast.to_camera(camera, offset))
    shine *= np.array([material.gloss for material in materials], np.float32)[part]

    points = np.array(camera.position, np.float32)[:, None, None] + depth * rays
    from_lamp = points - np.array(scene.lamp, np.float32)[:, None, None]
    metres = np.sqrt(from_lamp[0] ** 2 + from_lamp[1] ** 2 + from_lamp[2] ** 2)
    free = shading.openness(points, scene.extent)
    for number, solid in enumerate(scene.solids, start=len(materials) - len(scene.solids)):
        shaded = raycast.cast_to_floor(scene.lamp, raycast.corners(solid))
        touched = raycast.corners(solid, margin_m=0.25)
        region = raycast.screen_region(camera, np.concatenate([shaded, touched], axis=1))
        planar = (slice(None), *region)
        lit = 1 - raycast.shadow(solid, scene.lamp, from_lamp[planar], metres[region])
        lamp[region] *= lit
        shine[region] *= lit
        dimmed = shading.contact(raycast.distance(solid, points[planar]))
        free[region] *= np.where(part[region] == number, 1, dimmed)

    glow = np.array([material.glow for material in materials], np.float32)[part]
    lamp *= 1 - glow
    free *= 1 - glow
    metres_per_px = shading.footprint(depth, normals, x, y, camera.focal_px)
    linear = textures.albedo(materials, part, layers.u, layers.v, metres_per_px)
    for plane, from_lamp_rgb, ambient in zip(linear, scene.lamp_rgb, scene.ambient_rgb, strict=True):
        plane *= np.float32(ambient) * free + np.float32(from_lamp_rgb) * lamp + glow
        plane += np.float32(from_lamp_rgb) * shine
    return linear
