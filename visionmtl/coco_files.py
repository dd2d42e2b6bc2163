"""A COCO results file scored against a COCO annotation file, with neither images nor a network."""

import json
from pathlib import Path
from typing import Any

from visionmtl.ops.coco_ap import Backend, Kind, precision_and_recall, summary
from visionmtl.ops.coco_results import canonical, is_finite, read_rows

_CUTS = (1, 10, 100)


def score_results(results: Path, truth: Path, backend: Backend = "pycocotools") -> tuple[Kind, dict[str, Any]]:
    """("bbox" or "segm", as the results hold, and what `DetectionMeter.compute` gives, over all images of `truth`).

    Boxes go in as they are written, in float64. Results of categories that the annotations do not have count nowhere,
    as in COCO's own evaluation; `ignored` tells how many. Results that are not finite are `dropped`.
    """
    rows, content = read_rows(results), _read_truth(truth)
    kind: Kind = "segm" if rows and all("bbox" not in row for row in rows) else "bbox"
    if any(("bbox" if kind == "bbox" else "segmentation") not in row for row in rows):
        raise ValueError(
            f"{results} holds boxes in some entries and masks alone in others; one file is one of both; split it"
        )

    images = {canonical(image["id"]): image for image in content["images"]}
    strangers = sorted({str(row["image_id"]) for row in rows if canonical(row["image_id"]) not in images})
    if strangers:
        raise ValueError(
            f"{results} has results for {len(strangers)} image(s) that {truth} does not list, the first is "
            f"{strangers[0]}; both must be of one split; give the annotations of the split that was predicted"
        )
    names = {category["id"]: category["name"] for category in sorted(content["categories"], key=lambda c: c["id"])}
    known = [row for row in rows if row["category_id"] in names]
    finite = [row for row in known if is_finite(row)]
    found = [{**row, "image_id": images[canonical(row["image_id"])]["id"]} for row in finite]

    counts = dict.fromkeys(names, 0)
    for annotation in content["annotations"]:
        counts[annotation["category_id"]] += not annotation.get("iscrowd", 0)
    present = [category for category in names if counts[category]]
    precision, recall = precision_and_recall(
        content["annotations"], found, content["images"], present, _CUTS, kind, backend
    )
    result = summary(precision, recall, [names[category] for category in present], _CUTS)
    for category in present:
        result["per_class"][names[category]]["boxes"] = counts[category]
    return kind, {
        "images": len(images),
        **result,
        "absent": [name for category, name in names.items() if not counts[category]],
        "dropped": len(known) - len(finite),
        "ignored": len(rows) - len(known),
        "protocol": "coco",
    }


def _read_truth(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is no file; a COCO annotation file (instances_*.json) is needed; correct --truth")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}); a whole annotation file is needed; fetch it again") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in lists):
        raise ValueError(
            f"{file} lacks one of the lists {', '.join(lists)}; COCO annotations have all; correct --truth"
        )
    ids = {category["id"] for category in content["categories"]}
    for number, annotation in enumerate(content["annotations"]):
        missing = {"image_id", "category_id", "bbox", "area"} - annotation.keys()
        if missing or annotation["category_id"] not in ids:
            what = f"no {', '.join(sorted(missing))}" if missing else f"unknown category {annotation['category_id']}"
            raise ValueError(
                f"{file}: annotation {number} has {what}; each needs image_id, a listed category_id, bbox and area; "
                "correct it"
            )
        annotation.setdefault("iscrowd", 0)
    return content
