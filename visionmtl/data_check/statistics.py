"""The counts of one data set as plain data: what JSON files and tables show."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionmtl.data_check.survey import Checked
from visionmtl.data_check.tally import BINS_PER_OCTAVE, DEPTH_EDGES_M, Tally
from visionmtl.structures import IGNORE, LabelSpace

_MAX_BARS = 16
_MAX_SIZES = 5


def statistics(checked: Checked) -> dict[str, Any]:
    """Numbers by name; of label fields only those that some image carries."""
    one, tally = checked.data_set, checked.tally
    known: dict[str, Any] = {
        "role": one.role,
        "name": one.name,
        "type": one.type,
        "images": len(one.source) if one.source else None,
        "asked": checked.asked,
        "read": tally.images,
        "without_any_label": tally.unlabelled,
        "labelled": {name: tally.labelled[name] for name in one.provides},
        "sizes": _sizes(tally.sizes),
    }
    fields = {"boxes": _boxes, "segmentation": _segmentation, "depth_m": _depth}
    for name, space in one.provides.items():
        if tally.labelled[name] and name in fields:
            known[name] = fields[name](tally, space)
    return known


def _sizes(sizes: Counter[tuple[int, int]]) -> dict[str, Any]:
    """Heights and widths, px."""
    if not sizes:
        return {"different": 0}
    heights, widths = zip(*sizes, strict=True)
    return {
        "different": len(sizes),
        "height": [min(heights), max(heights)],
        "width": [min(widths), max(widths)],
        "most": [{"height": h, "width": w, "images": count} for (h, w), count in sizes.most_common(_MAX_SIZES)],
    }


def _boxes(tally: Tally, space: LabelSpace | None) -> dict[str, Any]:
    counts = sorted(tally.boxes_an_image.elements())
    total = sum(counts)
    return {
        "space": space.name if space else None,
        "total": total,
        "crowds": tally.crowds,
        "images_without": tally.boxes_an_image[0],
        "an_image": {"mean": total / len(counts), "median": counts[len(counts) // 2], "max": counts[-1]},
        **dict(zip(("small", "medium", "large"), tally.by_size.tolist(), strict=True)),
        "classes": _classes("boxes", tally.boxes, tally.boxes_images, space),
    }


def _segmentation(tally: Tally, space: LabelSpace | None) -> dict[str, Any]:
    return {
        "space": space.name if space else None,
        "labelled_share": 1 - float(tally.pixels[IGNORE] / tally.pixels.sum()),
        "classes": _classes("pixels", tally.pixels[:IGNORE], tally.pixels_images, space),
    }


def _classes(
    what: str, counts: NDArray[np.int64], images: NDArray[np.int64], space: LabelSpace | None
) -> list[dict[str, Any]]:
    """By class id; shares are of all that is labelled."""
    total = max(1, int(counts.sum()))
    return [
        {"name": name, what: int(counts[k]), "images": int(images[k]), "share": int(counts[k]) / total}
        for k, name in enumerate(space.classes if space else ())
    ]


def _depth(tally: Tally, space: LabelSpace | None) -> dict[str, Any]:
    measured = int(tally.depth.sum())
    known: dict[str, Any] = {"measured_share": measured / max(1, tally.depth_pixels)}
    if measured:
        low, high = tally.depth_range_m
        known |= {
            "min_m": low,
            "p01_m": tally.depth_quantile_m(0.01),
            "median_m": tally.depth_quantile_m(0.5),
            "p99_m": tally.depth_quantile_m(0.99),
            "max_m": high,
            "histogram": _histogram(tally.depth),
        }
    return known


def _histogram(counts: NDArray[np.int64]) -> list[dict[str, float | None]]:
    """Half octaves, or wider where those would be too many; what is rare at the ends is one open bar (None) each."""
    total = counts.sum()
    cumulated = np.cumsum(counts) / total
    first, last = (int(np.searchsorted(cumulated, share)) for share in (0.001, 0.999))
    width = BINS_PER_OCTAVE // 2
    while last // width - first // width + 1 > _MAX_BARS:
        width *= 2
    edges = [edge * width for edge in range(first // width, last // width + 2)]
    metres = [float(DEPTH_EDGES_M[edge]) for edge in edges]
    shares = [float(counts[a:b].sum() / total) for a, b in pairwise([0, *edges, len(counts)])]
    bars = zip([None, *metres], [*metres, None], shares, strict=True)
    return [
        {"from_m": low, "to_m": high, "share": share} for low, high, share in bars if share or None not in (low, high)
    ]
