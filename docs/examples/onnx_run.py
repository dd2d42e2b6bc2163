"""An exported network without visionmtl or torch: python onnx_run.py NETWORK.onnx PHOTO OUT.png"""

import json
import sys

import cv2
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = json.loads(session.get_modelmeta().custom_metadata_map["visionmtl"])
height, width = about["inputs"]["image"]["size"]
photo = cv2.imread(sys.argv[2])
scale = min(height / photo.shape[0], width / photo.shape[1])
h, w = (max(1, round(side * scale)) for side in photo.shape[:2])
image = np.zeros((1, height, width, 3), np.uint8)  # the photo at the top left, black behind it
image[0, :h, :w] = cv2.resize(photo, (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)[..., ::-1]
values = session.run(None, {"image": image, "content_size": np.array([[h, w]], np.int64)})
out = {output.name: value[0] for output, value in zip(session.get_outputs(), values, strict=True)}

names = about["tasks"]["detection"]["space"]["classes"]
colours = np.array(about["tasks"]["segmentation"]["space"]["colours"], np.uint8)
picture = cv2.addWeighted(image[0, :h, :w], 0.6, colours[out["segmentation_classes"][:h, :w]], 0.4, 0)[..., ::-1].copy()
for box, score, label in zip(out["detection_boxes"], out["detection_scores"], out["detection_labels"], strict=True):
    if score > 0.4:
        x1, y1, x2, y2 = box.round().astype(int).tolist()
        inner = np.s_[(3 * y1 + y2) // 4 : (y1 + 3 * y2) // 4 + 1, (3 * x1 + x2) // 4 : (x1 + 3 * x2) // 4 + 1]
        print(f"{names[label]} {score:.2f}  {np.median(out['depth_m'][inner]):.1f} m at {(box / scale).round()}")
        cv2.rectangle(picture, (x1, y1), (x2, y2), (255, 255, 255), 2)
cv2.imwrite(sys.argv[3], picture)
