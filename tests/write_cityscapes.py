"""Writes drawn scenes as an official Cityscapes tree, ids, cameras and traps included."""

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from visionmtl.datasets import scenes

PARTS = ("labelIds", "instanceIds", "disparity", "camera")
METRES = 4.0  # a drawn room four times as large is a yard, whose disparities fit into 16 bits at any image size

# by class of scenes.SCENES: wall, floor, ceiling, door, window, then what has instances: box, sphere, cylinder
_ID_OF = np.array([11, 7, 23, 13, 20, 26, 24, 33])
_CITIES = {"train": ("aachen", "bochum"), "val": ("frankfurt",), "test": ("berlin",)}


def write_cityscapes(
    root: Path,
    num_train: int,
    num_val: int,
    size: tuple[int, int] = (128, 256),
    seed: int = 0,
    num_test: int = 0,
    parts: Sequence[str] = PARTS,
) -> None:
    """`leftImg8bit`, and those of PARTS that are named, for the first images of every split.

    Each meta has its own camera; a strip of ego vehicle at the bottom, where disparity lies; a border of rectification
    and one out of the region of interest; disparities 0 and 1. Every second meta turns an object into a group of its
    class (a crowd), every third another one into a caravan.
    """
    for split, count in (("train", num_train), ("val", num_val), ("test", num_test)):
        for number in range(count):
            city = _CITIES[split][number % len(_CITIES[split])]
            rng = np.random.default_rng((seed, len(split), number))
            content = _draw(rng, size, group=number % 2 == 1, caravan=number % 3 == 2)
            for part in ("image", *parts):
                _write(root, split, city, number, part, content[part])


def _draw(rng: np.random.Generator, size: tuple[int, int], group: bool, caravan: bool) -> dict:
    scene = scenes.compose(rng, size)
    picture = scenes.draw(scene, rng)
    height, width = size
    edge, car = max(1, height // 100), max(2, height // 10)

    label_ids = _ID_OF[picture.segmentation]
    instance_ids = label_ids.copy()
    names = [scenes.SCENES.classes.index(solid.shape) for solid in scene.solids]
    for number, name in enumerate(names):
        official = _ID_OF[name]
        code = official if group and number == 0 else official * 1000 + number
        if caravan and number == 1:
            official, code = 29, 29000
        label_ids[picture.instances == number] = official
        instance_ids[picture.instances == number] = code
    for ids in (label_ids, instance_ids):
        ids[:, :edge] = 3
        ids[:edge] = 2
        ids[-car:, width // 8 :] = 1

    baseline_m, focal_px = rng.choice([0.209313, 0.222126]), scene.camera.focal_px
    disparity_px = baseline_m * focal_px / (METRES * picture.depth_m.astype(np.float64))
    disparity = np.rint(disparity_px * 256 + 1).astype(np.uint16)
    disparity[rng.random(size) < 0.1] = 0
    disparity[picture.segmentation == 2] = 1  # the ceiling stands for the sky
    camera = {
        "extrinsic": {"baseline": baseline_m, "pitch": 0.038, "roll": 0.0, "x": 1.7, "y": 0.1, "yaw": 0.0, "z": 1.22},
        "intrinsic": {"fx": focal_px, "fy": focal_px, "u0": width / 2, "v0": height / 2},
    }
    return {
        "image": picture.image,
        "labelIds": label_ids.astype(np.uint8),
        "instanceIds": instance_ids.astype(np.uint16),
        "disparity": disparity,
        "camera": camera,
    }


def part_file(root: Path, split: str, city: str, number: int, part: str) -> Path:
    """Where the official tree has it."""
    kind = {"image": "leftImg8bit", "labelIds": "gtFine", "instanceIds": "gtFine"}.get(part, part)
    ending = {"labelIds": "gtFine_labelIds.png", "instanceIds": "gtFine_instanceIds.png", "camera": "camera.json"}
    name = f"{city}_{number:06}_000019_{ending.get(part, kind + '.png')}"
    return root / kind / split / city / name


def _write(root: Path, split: str, city: str, number: int, part: str, content) -> None:
    file = part_file(root, split, city, number, part)
    file.parent.mkdir(parents=True, exist_ok=True)
    if part == "camera":
        file.write_text(json.dumps(content))
        return
    pixels = content[..., ::-1] if part == "image" else content  # OpenCV writes BGR
    assert cv2.imwrite(str(file), pixels)
