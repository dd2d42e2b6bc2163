"""People's own albumentations pipelines: read from a file as plain data, held to transforms that move no pixel."""

import functools
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visionmtl.config.registry import did_you_mean
from visionmtl.config.text_files import MAX_YAML_BYTES, read_object, read_text, read_yaml, shown

_PROBE_PX = 64


def repaint(image: NDArray[np.uint8], file: Path, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The image [H, W, 3] after the pipeline saved in `file`, of the same size. Draws one number."""
    pipeline = open_pipeline(file)
    seed = int(rng.integers(2**63))
    # not `set_random_seed`: it starts every transform on the same numbers, so that all are skipped or none
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return np.ascontiguousarray(pipeline(image=image)["image"])


@functools.cache  # one a process: the loader's workers each read the file once
def open_pipeline(file: Path) -> Any:
    """The pipeline that `A.save` wrote as JSON or YAML. Raises ValueError for one that is not of this kind.

    The names are checked before anything is built, so a file cannot call what is not a transform of the image alone.
    """
    library = _albumentations()
    plain = _read(file)
    for name in _names(plain, file):
        _check_name(name, file)
    # image-only transforms leave boxes and keypoints alone, and none are given
    plain |= {key: None for key in ("bbox_params", "keypoint_params", "additional_targets") if key in plain}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # how it says that it ignores an argument
            built = library.from_dict({"transform": plain})
    except (TypeError, ValueError, UserWarning) as error:
        raise ValueError(
            f"augment.pipeline {file} cannot be built: {error}; allowed is what albumentations "
            f"{library.__version__} knows; save the pipeline again with that version"
        ) from error
    pipeline = built if isinstance(built, library.BaseCompose) else library.Compose([built])
    for transform in _transforms(pipeline):
        _try(transform, file)
    return pipeline


def _albumentations() -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else importing it asks PyPI for its newest version
    import albumentations  # here, because it takes a second that most runs do not need

    return albumentations


def _read(file: Path) -> dict[str, Any]:
    how = "allowed is a file that albumentations' A.save(pipeline, file, data_format='yaml') wrote"
    if not file.is_file():
        raise ValueError(f"augment.pipeline {file} does not exist; {how}; correct the path")
    try:
        is_json = read_text(file, max_bytes=MAX_YAML_BYTES).lstrip().startswith("{")
        content = read_object(file) if is_json else read_yaml(file)[0]
    except ValueError as error:
        raise ValueError(f"augment.pipeline {file} is neither JSON nor YAML ({error}); {how}; save it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("transform"), dict):
        raise ValueError(f"augment.pipeline {file} holds no `transform`; {how}; save it again")
    return dict(content["transform"])


def _names(node: Any, file: Path) -> Iterator[str]:
    """The class names of a saved transform and of those inside it."""
    if not isinstance(node, dict) or not isinstance(node.get("__class_fullname__"), str):
        raise ValueError(
            f"augment.pipeline {file} has an entry without a transform's name: {shown(node, 80)}; each needs "
            "`__class_fullname__`; save the pipeline again"
        )
    yield node["__class_fullname__"]
    inside = node.get("transforms", [])
    if not isinstance(inside, list):
        raise ValueError(
            f"augment.pipeline {file} has `transforms` {shown(inside, 80)}; a list of transforms is needed; save the "
            "pipeline again"
        )
    for inner in inside:
        yield from _names(inner, file)


def _check_name(full: str, file: Path) -> None:
    from albumentations.core.serialization import SERIALIZABLE_REGISTRY as KNOWN

    library = _albumentations()
    name = full.rpartition(".")[2] if full.startswith("albumentations.") else full
    if name not in KNOWN:
        raise ValueError(
            f"augment.pipeline {file} names {name!r}{did_you_mean(name, KNOWN)}; allowed are the serialisable "
            f"transforms of albumentations {library.__version__}; take it out"
        )
    if not issubclass(KNOWN[name], library.ImageOnlyTransform | library.BaseCompose):
        raise ValueError(
            f"augment.pipeline {file} uses {name}, which may move or erase what labels describe; allowed are "
            "image-only transforms (blur, noise, weather, compression); take it out, and use augment.zoom and "
            "augment.flip, which move the labels too"
        )


def _transforms(pipeline: Any) -> Iterator[Any]:
    for transform in pipeline.transforms:
        if hasattr(transform, "transforms"):
            yield from _transforms(transform)
        else:
            yield transform


def _try(transform: Any, file: Path) -> None:
    """Once on noise, so that what needs more than an image, or returns something else, fails before the training."""
    noise = np.random.default_rng(0).integers(0, 256, (_PROBE_PX, _PROBE_PX, 3), np.uint8)
    problem = ""
    try:
        out = transform(image=noise, force_apply=True)["image"]
        if (out.dtype, out.shape) != (noise.dtype, noise.shape):
            problem = f"returns {out.dtype} {list(out.shape)}"
    except (KeyError, TypeError, ValueError, RuntimeError, cv2.error) as error:
        problem = f"fails: {error}"
    if problem:
        raise ValueError(
            f"augment.pipeline {file}: {type(transform).__name__}, given a uint8 image {list(noise.shape)} alone, "
            f"{problem}; allowed is what returns an image of that type and size; take it out"
        )
