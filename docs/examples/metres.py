"""A picture with metres in the tags of its boxes: image, boxes, classes and depth side by side.

python docs/examples/metres.py RUN IMAGE OUT.png      RUN: with detection, segmentation and depth
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import visionmtl
from visionmtl.inference.predictor import MIN_SCORE, Result, save_picture
from visionmtl.structures import MAX_CLASSES, Detections, LabelSpace
from visionmtl.visualization.draw import compare, draw_boxes, draw_depth, draw_segmentation

MAX_DEPTH_M = 8.0


def picture(result: Result, cell_px: int = 480) -> Image.Image:
    """The four pictures in two rows. The classes are those that the first task with boxes, and with classes, learnt."""
    spaces = {task.result_field: result.spaces[name] for name, task in result.tasks.items()}
    boxes, classes = result.boxes, spaces["segmentation"]
    assert boxes is not None and boxes.distance_m is not None and classes is not None
    assert result.segmentation is not None and result.depth_m is not None and spaces["boxes"] is not None

    keep = np.flatnonzero(boxes.scores >= MIN_SCORE)[:MAX_CLASSES]
    # a label space with one class for each box: its name is the text of the tag
    texts = tuple(f"{boxes.names[i]} {boxes.distance_m[i]:.1f} m" for i in keep)
    colours = tuple(spaces["boxes"].colours[boxes.labels[i]] for i in keep)
    detections = Detections(boxes.xyxy[keep], np.full(len(keep), np.nan, np.float32), np.arange(len(keep)))
    with_metres = draw_boxes(result.image, detections, LabelSpace("tags", texts, colours)) if texts else result.image

    rows = [
        [("image", result.image), ("boxes", with_metres)],
        [
            ("classes", draw_segmentation(result.image, result.segmentation, classes)),
            ("depth", draw_depth(result.image, result.depth_m, max_m=MAX_DEPTH_M)),
        ],
    ]
    return Image.fromarray(compare(rows, cell_px))


if __name__ == "__main__":
    run, image, output = sys.argv[1:]
    save_picture(Path(output), picture(visionmtl.load(run)(image)))
