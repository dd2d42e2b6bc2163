"""Writes NYUv2 as its official .mat file and as the prepared folder, from drawn or real metas, for other tests."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import scipy.io

from visionmtl.datasets.nyuv2 import CLASSES
from visionmtl.datasets.nyuv2_mat import SEG40_TO_13

# a few labels instead of 894: every class under its own name, then two that only belong to a class
NAMES = (*sorted(CLASSES[40]), "baby chair", "bottle")
TO_40 = (*(CLASSES[40].index(name) + 1 for name in sorted(CLASSES[40])), 5, 40)


@dataclass(frozen=True)
class ImageMeta:
    """One image of the official file; its number is its position in the list + 1."""

    image: np.ndarray  # uint8 [H, W, 3] RGB
    labels: np.ndarray  # uint16 [H, W], 0 = unlabelled, else position in the names + 1
    instances: np.ndarray  # uint8 [H, W], counted for each label
    depth_m: np.ndarray  # float32 [H, W]
    raw_depth_m: np.ndarray  # float32 [H, W], 0 = hole


def drawn_frames(count: int, size: tuple[int, int] = (24, 32)) -> list[ImageMeta]:
    """Noise under ten random rectangles: some unlabelled, some parted by others, some of one label."""
    metas = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        height, width = size
        labels, instances = np.full(size, 1 + NAMES.index("wall"), np.uint16), np.ones(size, np.uint8)
        choice = [0, *rng.integers(1, len(NAMES) + 1, 6), *[1 + NAMES.index("chair")] * 3]
        for number, label in enumerate(choice, start=1):
            top, left = rng.integers(0, height - 2), rng.integers(0, width - 2)
            part = np.s_[top : top + rng.integers(1, height // 2), left : left + rng.integers(1, width // 2)]
            labels[part], instances[part] = label, number if label else 0
        depth_m = rng.uniform(0.7, 10, size).astype(np.float32)
        holes = rng.random(size) < 0.2
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        metas.append(ImageMeta(image, labels, instances, depth_m, np.where(holes, np.float32(0), depth_m)))
    return metas


def real_frames(nyuv2: Path, split: str, count: int) -> list[ImageMeta]:
    """The first images of the folder that the real data comes in; a label and depth as good as that tells.

    Label numbers are those of `official_mapping`; instances are connected regions.
    """
    names, to_40 = official_mapping(nyuv2)
    label_of = [0] + [
        names.index(name) + 1 if name in names else to_40.index(number) + 1
        for number, name in enumerate(CLASSES[40], start=1)
    ]
    metas = []
    for stem in (nyuv2 / f"{split}.txt").read_text().split()[:count]:
        seg40 = cv2.imread(str(nyuv2 / f"seg40/{split}/{stem}.png"), cv2.IMREAD_UNCHANGED)
        depth_m = cv2.imread(str(nyuv2 / f"depth/{split}/{stem}.png"), cv2.IMREAD_UNCHANGED).astype(np.float32) / 25.5
        instances = np.zeros(seg40.shape, np.uint8)
        for number in np.unique(seg40[seg40 > 0]):
            regions = cv2.connectedComponents((seg40 == number).astype(np.uint8))[1]
            instances += np.minimum(regions, 255).astype(np.uint8)
        image = cv2.imread(str(nyuv2 / f"image/{split}/{stem}.jpg"))[..., ::-1]
        raw_m = np.where(depth_m > 5, np.float32(0), depth_m)
        metas.append(ImageMeta(image, np.array(label_of, np.uint16)[seg40], instances, depth_m, raw_m))
    return metas


def official_mapping(nyuv2: Path) -> tuple[list[str], list[int]]:
    """The 894 names, and the class of the 40 that each belongs to, from the folder of the real data."""
    content = scipy.io.loadmat(nyuv2 / "meta" / "classMapping40.mat", simplify_cells=True)
    return list(content["allClassName"]), content["mapClass"].tolist()


def write_official(
    folder: Path,
    metas: list[ImageMeta],
    test: tuple[int, ...] = (),
    names: tuple[str, ...] | list[str] = NAMES,
    to_40: tuple[int, ...] | list[int] = TO_40,
) -> None:
    """The .mat files as MATLAB writes them: axes reversed, names as references. Images not in `test` are for training.

    test: image numbers, from 1
    """
    folder.mkdir(parents=True, exist_ok=True)
    stacks: dict[str, list[np.ndarray]] = {
        "images": [meta.image.transpose(2, 1, 0) for meta in metas],
        "labels": [meta.labels.T for meta in metas],
        "instances": [meta.instances.T for meta in metas],
        "depths": [meta.depth_m.T for meta in metas],
        "rawDepths": [meta.raw_depth_m.T for meta in metas],
    }
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:
        for name, stack in stacks.items():
            file.create_dataset(name, data=np.stack(stack), chunks=True, compression="gzip", compression_opts=1)
        texts = file.create_group("#refs#")
        references = file.create_dataset("names", (1, len(names)), h5py.ref_dtype)
        for position, name in enumerate(names):
            text = texts.create_dataset(f"n{position}", data=np.array([[ord(c)] for c in name], np.uint16))
            references[0, position] = text.ref

    train = [number for number in range(1, len(metas) + 1) if number not in test]
    column = {"trainNdxs": train, "testNdxs": list(test)}
    scipy.io.savemat(folder / "splits.mat", {key: np.array(value, np.uint16)[:, None] for key, value in column.items()})
    cells = {"className": np.array(CLASSES[40], object), "allClassName": np.array(names, object)}
    scipy.io.savemat(folder / "classMapping40.mat", {"mapClass": np.array(to_40, np.uint8)[None], **cells})
    coarse = {"labels13": SEG40_TO_13[None, 1:], "classNames": np.array(CLASSES[13], object)}
    scipy.io.savemat(folder / "class13Mapping.mat", {"classMapping13": coarse})


def write_prepared(root: Path, metas: list[ImageMeta], split: str = "train", numbers: list[int] | None = None) -> None:
    """One split of the prepared folder, written without the code it is a reference for: slow and plain."""
    chosen = list(range(1, len(metas) + 1)) if numbers is None else numbers
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number in chosen:
        meta = metas[number - 1]
        name = f"{split}/{number:04}.png"
        seg40 = np.array([0, *TO_40], np.uint8)[meta.labels]
        write_pixels(root / "image" / name, meta.image[..., ::-1])
        write_pixels(root / "seg40" / name, seg40)
        write_pixels(root / "seg13" / name, SEG40_TO_13[seg40])
        for folder, depth_m in (("depth", meta.depth_m), ("depth_raw", meta.raw_depth_m)):
            write_pixels(root / folder / name, np.round(depth_m.astype(np.float64) * 1000).astype(np.uint16))

        height, width = meta.labels.shape
        images.append({"id": number, "file_name": f"{number:04}.png", "width": width, "height": height})
        pairs = sorted(set(zip(meta.labels.ravel().tolist(), meta.instances.ravel().tolist(), strict=True)))
        for label, instance in pairs:
            if label == 0 or NAMES[label - 1] in ("wall", "floor", "ceiling"):
                continue
            rows, columns = np.nonzero((meta.labels == label) & (meta.instances == instance))
            left, top = int(columns.min()), int(rows.min())
            bbox = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
            objects.append({
                "id": len(objects) + 1, "image_id": number, "category_id": TO_40[label - 1], "bbox": bbox,
                "area": len(rows), "iscrowd": 0,
            })  # fmt: skip
    things = [number for number, name in enumerate(CLASSES[40], start=1) if name not in ("wall", "floor", "ceiling")]
    categories = [{"id": number, "name": CLASSES[40][number - 1]} for number in things]
    content = {"images": images, "annotations": objects, "categories": categories}
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"objects37_{split}.json").write_text(json.dumps(content))
    (root / f"{split}.txt").write_text("".join(f"{number:04}\n" for number in chosen))
    (root / "meta.json").write_text('{"depth_scale": 1000}')


def write_pixels(file: Path, pixels: np.ndarray) -> None:
    """An image file; colours as OpenCV orders them, BGR."""
    file.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(file), pixels)
