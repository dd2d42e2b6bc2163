"""Writes a small folder data set of drawn pictures, two splits of four images without faults; tests plant theirs."""

import json
from pathlib import Path

import cv2
import numpy as np

SIZE = (48, 64)


def photo(seed):
    """Coloured patches, BGR; every seed another picture."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(patches, SIZE[::-1], interpolation=cv2.INTER_CUBIC)


class FolderData:
    """Boxes (none in the first image), classes and depth in millimetres on every image of `train` and `val`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for split, first in (("train", 0), ("val", 10)):
            images = []
            for number in range(first, first + 4):
                rows, columns = np.indices(SIZE)
                self.write(f"images/{split}/{number}.png", photo(number))
                self.write(f"labels/{split}/{number}.png", (columns // 40).astype(np.uint8))
                self.write(f"depth/{split}/{number}.png", (1000 + 20 * rows).astype(np.uint16))
                images.append({"id": number + 1, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]})
            objects = [
                {"id": number + 1, "image_id": image["id"], "category_id": 7, "bbox": [4, 5, 20, 30], "iscrowd": 0}
                for number, image in enumerate(images[1:])
            ]
            self.annotate(split, {"images": images, "annotations": objects, "categories": [{"id": 7, "name": "cup"}]})

    def write(self, name, pixels) -> Path:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(file), pixels)
        return file

    def annotate(self, split, content) -> None:
        (self.root / f"{split}.json").write_text(json.dumps(content))

    def boxes(self, split, change) -> None:
        """Let `change` work on the list of annotations."""
        content = json.loads((self.root / f"{split}.json").read_text())
        change(content["annotations"])
        self.annotate(split, content)

    def settings(self, split):
        return {
            "type": "folder", "root": str(self.root), "split": split, "images": "images/{split}/*",
            "boxes": {"file": "{split}.json"},
            "segmentation": {"files": "labels/{split}/{stem}.png", "classes": ["floor", "wall"]},
            "depth": {"files": "depth/{split}/{stem}.png", "metres_per_unit": 0.001},
        }  # fmt: skip
