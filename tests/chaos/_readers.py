"""Every reader of files: how a small sound file is made, how it is read, and what must hold of what is read."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))  # where pytest does not put it
import write_layouts
from drawn_layouts import LAYOUTS
from PIL import Image
from toy_run import small_run, small_state, small_tasks

from visionmtl import run as config
from visionmtl.data.cache import packed
from visionmtl.data.folder_layout import understand
from visionmtl.data.shard_writer import write_shards
from visionmtl.data.transforms import photometric
from visionmtl.datasets import NamedDataset
from visionmtl.datasets.scenes import Scenes
from visionmtl.datasets.shards import Shards
from visionmtl.engine import checkpoint, logging
from visionmtl.engine.evaluator import choose_json, read_results, save_json
from visionmtl.engine.loggers import _run_id
from visionmtl.export.base import parse_description
from visionmtl.export.hub import from_pretrained, save_pretrained
from visionmtl.inference.results_io import open_predictions
from visionmtl.io import channels, depth_maps, images, index, label_maps, labelme, paths, video, voc, yolo
from visionmtl.io.coco.annotations import read_boxes, read_truth
from visionmtl.io.coco.panoptic import read_segments
from visionmtl.metrics.coco_ap import score_files
from visionmtl.report.report import write_report
from visionmtl.run import dump, restore
from visionmtl.structures import LabelSpace, Sample
from visionmtl.study import affinity, comparison, costs, worker
from visionmtl.tasks.classification import Classification
from visionmtl.tasks.depth import Depth

H, W = 24, 32
CLASSES = ("floor", "shelf", "person")
SPACE = LabelSpace("three", CLASSES, ((0, 0, 0), (1, 1, 1), (2, 2, 2)))


@dataclass(frozen=True)
class Reader:
    """One reader. `read` raises what the reader raises, and AssertionError where what it gives cannot be right."""

    name: str
    files: Sequence[str]
    """Those of the folder that are damaged, one at a time."""
    write: Callable[[Path], object]
    """Fills a folder."""
    read: Callable[[Path], object]
    modules: Sequence[str] = ()
    """Modules of the package whose reading it is."""
    named: Sequence[str] = ()
    """What an error may name instead of the file."""
    parts: int = 3
    """Of its errors; those of single settings say what is wrong and what to do, and where the setting is."""
    share: float = 1.0
    """Of inputs, compared with others; less for those that are slow."""


def check_sample(sample: Sample) -> None:
    """What every sample of a data set keeps to."""
    image = sample.image
    assert image.dtype == np.uint8 and image.ndim == 3 and image.size, (image.dtype, image.shape)
    if sample.segmentation is not None:
        assert sample.segmentation.shape == image.shape[:2] and sample.segmentation.dtype == np.uint8
    if sample.depth_m is not None:
        depth = sample.depth_m
        assert depth.shape == image.shape[:2] and depth.dtype == np.float32 and np.isfinite(depth).all()
        assert (depth >= 0).all()
    if sample.boxes is not None:
        xyxy = sample.boxes.xyxy
        assert np.isfinite(xyxy).all() and (xyxy[:, 2:] > xyxy[:, :2]).all() and np.isfinite(sample.boxes.area).all()


def check_samples(samples: Sequence[Sample]) -> None:
    for sample in samples:
        check_sample(sample)


# ---- data sets and their annotation files ----


def _layout_readers() -> list[Reader]:
    """Every file of every layout of `drawn_layouts`, read as its data set."""
    modules = {
        "coco": ["io.coco.annotations", "io.coco.panoptic", "io.images"], "cityscapes": ["io.cityscapes"],
        "folder": ["io.label_maps", "io.paths"], "nyuv2": ["io.depth_maps"], "nyuv2_mat": ["io.mat_files"],
    }  # fmt: skip

    def read(name: str, root: Path) -> None:
        check_samples(LAYOUTS[name].read(root))

    return [
        Reader(
            f"{name}: {kind}", [file], LAYOUTS[name].write, partial(read, name), modules[name],
            named=["labels/a.png"] if kind == "names" else [], share=0.25 if name == "nyuv2_mat" else 0.7,
        )
        for name, layout in LAYOUTS.items()
        for kind, file in layout.files.items()
    ]  # fmt: skip


def _instances() -> dict[str, Any]:
    box = {"id": 1, "image_id": 1, "category_id": 5, "bbox": [1, 2, 10, 12], "area": 80, "iscrowd": 0}
    polygon = [[1, 2, 11, 2, 11, 14]]
    runs = {"size": [H, W], "counts": [40, 10, H * W - 50]}
    return {
        "images": [{"id": k, "file_name": f"{k}.jpg", "height": H, "width": W} for k in (1, 2)],
        "annotations": [
            {**box, "segmentation": polygon}, {**box, "id": 2, "image_id": 2, "iscrowd": 1, "segmentation": runs},
        ],
        "categories": [{"id": 5, "name": "person"}, {"id": 2, "name": "box"}],
    }  # fmt: skip


def _results() -> list[dict[str, Any]]:
    packed_runs = {"size": [H, W], "counts": "X1:n4"}
    row = {"image_id": 1, "category_id": 5, "score": 0.5, "bbox": [1.0, 2.0, 10.0, 12.0]}
    runs = {"size": [H, W], "counts": [40, 10, H * W - 50]}
    return [{**row, "segmentation": packed_runs}, {**row, "image_id": 2, "segmentation": runs}]


def _write_scored(root: Path) -> None:
    from pycocotools import mask as rle

    rows = _results()
    code = rle.frPyObjects(rows[1]["segmentation"], H, W)
    rows[0]["segmentation"]["counts"] = code["counts"].decode()
    (root / "results.json").write_text(json.dumps(rows))
    (root / "truth.json").write_text(json.dumps(_instances()))


def _score(kind: Any, root: Path) -> None:
    _, result, _ = score_files(root / "results.json", root / "truth.json", kind=kind)
    assert result["ap"] is None or 0 <= result["ap"] <= 1


def _read_instances(root: Path) -> None:
    boxes = read_boxes(root / "truth.json", masks=True)
    for row in range(len(boxes)):
        of_image = boxes.of(row)
        assert np.isfinite(of_image.xyxy).all()
        assert all(mask.shape == boxes.size(row) for mask in boxes.masks(row))
    read_truth(root / "truth.json", masks=True)


def _write_panoptic(root: Path) -> None:
    LAYOUTS["coco"].write(root)


def _read_panoptic(root: Path) -> None:
    segments = read_segments(root / "annotations/panoptic_train2017.json")
    for row in range(len(segments)):
        if (name := segments.png(row)) is not None:
            segments.read(root / "annotations/panoptic_train2017" / name, row, segments.size(row))


def _write_objects(root: Path) -> None:
    (root / "a.txt").write_text("0 0.25 0.5 0.25 0.5\n1 0.1 0.1 0.5 0.1 0.5 0.5\n")
    (root / "data.yaml").write_text("train: ../train\nnc: 3\nnames: [floor, shelf, person]\n")
    (root / "classes.txt").write_text("floor\nshelf\nperson\n")
    (root / "classes.yaml").write_text("7: floor\n8: shelf\n9-12: person\n")
    (root / "colors.txt").write_text("128 128 128 Sky\n64 0 128 Car\n# end\n")
    (root / "colors.csv").write_text("name,r,g,b\nSky,128,128,128\nCar,64,0,128\n")
    (root / "colors.yaml").write_text("Sky: [128, 128, 128]\nCar: [[64, 0, 128], [1, 2, 3]]\n")
    (root / "list.txt").write_text("a\nimages/b\nc.jpg\n")
    write_layouts.voc(root / "voc")
    write_layouts.labelme(root / "labelme")


def _yolo(root: Path) -> None:
    for one in yolo.read_objects(root / "a.txt", (H, W), CLASSES).objects:
        assert np.isfinite(one.xyxy).all()


def _labelme(root: Path) -> None:
    file = root / "labelme/IMG_0.json"
    found = labelme.read_objects(file)
    assert all(np.isfinite(one.xyxy).all() for one in found.objects)
    label_maps_of = {one.name for one in found.objects}
    from visionmtl.io.objects import to_class_map, to_coco

    if label_maps_of:
        to_coco(["a"], [found], None, str(file))
    if found.size[0] * found.size[1] < 10**6 and len(label_maps_of) < 255:
        to_class_map(found, found.size, sorted(label_maps_of), 255, file)


def _voc(root: Path) -> None:
    file = root / "voc/Annotations/2007_000000.xml"
    voc.counts_from([file])
    for one in voc.read_objects(file, 1).objects:
        assert np.isfinite(one.xyxy).all()


def _understand(root: Path) -> None:
    understand(root)


def _text_readers() -> list[Reader]:
    def objects(name: str, file: str, read: Callable[[Path], object], *modules: str, share: float = 1.0) -> Reader:
        return Reader(name, [file], _write_objects, read, modules, share=share)

    readers = [
        Reader("COCO instances", ["truth.json"], _write_scored, _read_instances, ["io.coco.annotations"], share=2),
        Reader("COCO truth, boxes", ["truth.json"], _write_scored, partial(_score, "bbox"), share=1.5),
        Reader("COCO truth, masks", ["truth.json"], _write_scored, partial(_score, "segm"), share=1.5),
        Reader("COCO results, boxes", ["results.json"], _write_scored, partial(_score, "bbox"), ["io.coco.results"]),
        Reader("COCO results, RLE", ["results.json"], _write_scored, partial(_score, "segm"), share=2),
        Reader("COCO panoptic", ["annotations/panoptic_train2017.json"], _write_panoptic, _read_panoptic,
               ["io.coco.panoptic"]),
        objects("YOLO labels", "a.txt", _yolo, "io.yolo"),
        objects("YOLO data.yaml", "data.yaml", lambda root: yolo.read_classes(root / "data.yaml")),
        objects("YOLO classes.txt", "classes.txt", lambda root: yolo.read_classes(root / "classes.txt")),
        objects("VOC", "voc/Annotations/2007_000000.xml", _voc, "io.voc"),
        objects("LabelMe", "labelme/IMG_0.json", _labelme, "io.labelme"),
        objects("class list", "classes.yaml", lambda root: label_maps.class_file(root / "classes.yaml"),
                "io.label_maps"),
        objects("palette, text", "colors.txt", lambda root: label_maps.color_file(root / "colors.txt")),
        objects("palette, CSV", "colors.csv", lambda root: label_maps.color_file(root / "colors.csv")),
        objects("palette, YAML", "colors.yaml", lambda root: label_maps.color_file(root / "colors.yaml")),
        objects("list of images", "list.txt",
                lambda root: paths.read_list(root / "list.txt", ["images/a.jpg", "images/b.jpg", "images/c.jpg"], ""),
                "io.paths"),
    ]  # fmt: skip
    unknown = {
        "penn_fudan": "PedMasks/FudanPed00001_mask.png", "camvid": "class_dict.csv", "roboflow_yolo": "data.yaml",
        "voc": "Annotations/2007_000000.xml", "labelme": "IMG_0.json", "coco": "annotations/instances_train2017.json",
    }  # fmt: skip
    return readers + [
        Reader(
            f"unknown folder: {name}",
            [file],
            getattr(write_layouts, name),
            _understand,
            named=["work holds"],
            parts=2,
            share=0.1,
        )
        for name, file in unknown.items()
    ]


# ---- images and arrays ----


def _picture() -> np.ndarray:
    y, x = np.indices((H, W))
    return np.stack([60 + 4 * y, 40 + 3 * x, np.full((H, W), 90)], axis=2).astype(np.uint8)


_SAVED = {
    "jpg": {"quality": 90}, "png": {}, "webp": {"lossless": True}, "tif": {"compression": "tiff_deflate"}, "bmp": {},
    "gif": {},
}  # fmt: skip


def _write_photos(root: Path) -> None:
    for ending, options in _SAVED.items():
        Image.fromarray(_picture()).save(root / f"photo.{ending}", **options)  # type: ignore[arg-type]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(_picture()).save(root / "turned.jpg", exif=exif)
    Image.fromarray(_picture()).convert("P").save(root / "palette.png")
    cv2.imwrite(str(root / "deep.png"), np.arange(H * W, dtype=np.uint16).reshape(H, W))


def _read_photo(name: str, root: Path) -> None:
    file = root / name
    for upright in (False, True):
        pixels, size, divisor = images.read_photo(file, upright=upright)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and divisor == 1
        assert pixels.shape[:2] == tuple(size)
    if name.endswith((".png", ".tif")):
        stored = images.read_stored(file)
        assert stored.ndim in (2, 3)
    images.image_size(file, upright=True)


def _read_png(name: str, root: Path) -> None:
    values = images.read_png(root / name, palette_indices=name == "palette.png")
    assert values.ndim in (2, 3) and values.dtype in (np.uint8, np.uint16)


def _write_depth(root: Path) -> None:
    depth = np.linspace(0, 5, H * W, dtype=np.float32).reshape(H, W)
    np.save(root / "depth.npy", depth)
    cv2.imwrite(str(root / "depth.png"), (depth * 1000).astype(np.uint16))
    cv2.imwrite(str(root / "depth.tif"), depth)
    np.save(root / "bands.npy", np.random.default_rng(0).integers(0, 9000, (H, W, 5)).astype(np.uint16))
    try:
        import OpenEXR

        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        with OpenEXR.File(header, {"Z": depth}) as file:
            file.write(str(root / "depth.exr"))
    except ImportError:
        pass
    try:
        import tifffile

        tifffile.imwrite(root / "bands.tif", np.zeros((H, W, 5), np.uint16), compression="zlib", planarconfig="contig")
    except ImportError:
        pass


def _read_depth(name: str, root: Path) -> None:
    file = root / name
    metres = depth_maps.to_metres(depth_maps.read_depth(file), 0.001, file)
    assert metres.dtype == np.float32 and np.isfinite(metres).all() and (metres >= 0).all()


def _read_bands(name: str, root: Path) -> None:
    file = root / name
    values = channels.read_channels(file)
    assert channels.to_bytes(values, (0, 9000), file, "value_range").shape == values.shape


def _write_video(root: Path) -> None:
    video.write_video(root / "clip.mp4", [_picture()] * 3, 25.0)


def _read_video(root: Path) -> None:
    _, frames = video.read_frames(str(root / "clip.mp4"))
    for number, frame in enumerate(frames):
        assert frame.dtype == np.uint8
        if number > 50:
            break


_ARRAYS = {"start": np.arange(3), "xyxy": np.linspace(0, 9, 8, dtype=np.float32).reshape(2, 4)}


def _write_index(root: Path) -> None:
    index.save_arrays(root / "index", _ARRAYS)


def _read_index(root: Path) -> None:
    arrays = index.open_arrays(root / "index")
    assert set(arrays) == set(_ARRAYS), "other arrays"
    for name, array in _ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg="other values, silently")


def _packed_samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(
            image=rng.integers(0, 256, (H, W, 3), dtype=np.uint8), image_id=str(k),
            segmentation=rng.integers(0, 3, (H, W)).astype(np.uint8),
        )
        for k in range(3)
    ]  # fmt: skip


def _write_packed(root: Path) -> None:
    (root / "cache").mkdir()
    packed.pack(root / "cache", ((packed.to_parts(one), (H, W), 1) for one in _packed_samples()), {})


def _read_packed(root: Path) -> None:
    store = packed.SampleStore(root / "cache")
    assert len(store) == 3, "other samples, silently"
    for at, sound in enumerate(_packed_samples()):
        sample = store.read(at, frozenset({"segmentation"}))
        np.testing.assert_array_equal(sample.image, sound.image, err_msg="another image, silently")
        np.testing.assert_array_equal(sample.segmentation, sound.segmentation, err_msg="other labels, silently")


def _image_readers() -> list[Reader]:
    def of(name: str, file: str, write: Any, read: Any, *modules: str, share: float = 1.0) -> Reader:
        return Reader(name, [file], write, read, modules, share=share)

    readers = [of(f"photo {name}", name, _write_photos, partial(_read_photo, name), "io.images", "io.image_headers")
               for name in (*(f"photo.{ending}" for ending in _SAVED), "turned.jpg")]  # fmt: skip
    readers += [
        of(f"labels {name}", name, _write_photos, partial(_read_png, name)) for name in ("palette.png", "deep.png")
    ]
    names = ["depth.npy", "depth.png", "depth.tif"] + ["depth.exr"] * _has("OpenEXR")
    readers += [of(name, name, _write_depth, partial(_read_depth, name), "io.depth_maps") for name in names]
    bands = ["bands.npy"] + ["bands.tif"] * _has("tifffile")
    readers += [of(name, name, _write_depth, partial(_read_bands, name), "io.channels") for name in bands]
    index_files = [f"index/{name}.npy" for name in _ARRAYS] + ["index/arrays.json"]
    return [
        *readers,
        of("video", "clip.mp4", _write_video, _read_video, "io.video", share=0.3),
        Reader("index of annotations", index_files, _write_index, _read_index, ["io.index"], named=["index"]),
        Reader("cache, index", ["cache/index/ends.npy", "cache/index/sizes.npy", "cache/index/checksums.npy"],
               _write_packed, _read_packed, ["data.cache.packed"], named=["cache"]),
        Reader("cache, samples", ["cache/samples.bin"], _write_packed, _read_packed, named=["cache"]),
        Reader("shards", ["shards/index.json", "shards/000000.json", "shards/000000.tar"], _write_shards, _read_shards,
               ["io.shards"], named=["shards"], share=0.5),
    ]  # fmt: skip


def _write_shards(root: Path) -> None:
    spec = Scenes(num_images=2, size=(32, 48))
    write_shards(NamedDataset("scenes", spec.build()), spec, root / "shards", 100_000, workers=0)


def _read_shards(root: Path) -> None:
    reader = Shards(root=str(root / "shards")).build()
    check_samples([reader.read(index) for index in range(len(reader))])


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


# ---- configs, checkpoints, and what runs write ----

_CONFIG = """\
base: below.yaml
remove: [train.keep]
seed: 3
data:
  root: /data
  train: [&one {type: scenes, num_images: 6, seed: 3}]
  val: [{<<: *one, seed: 4}]
tasks:
  depth_again: ${tasks.depth}
optim: {lr: 1e-3, name: adamw}
output: "${data.root}/run"
"""


@cache
def _run() -> config.Run:
    return small_run(small_tasks())


def _write_config(root: Path) -> None:
    (root / "below.yaml").write_text(dump(_run()))
    (root / "fuzz.yaml").write_text(_CONFIG)


def _write_comparison(root: Path) -> None:
    _write_config(root)
    text = "config: below.yaml\nseeds: [0, 1]\nruns:\n  all: {}\n  wide: {overrides: ['optim.lr=1e-3']}\n"
    (root / "compare.yaml").write_text(text)


def _write_settings(root: Path) -> None:
    (root / "run.json").write_text(json.dumps(_run().model_dump(mode="json")))


def _restore(root: Path) -> None:
    """The settings of a checkpoint, which JSON stands for here: it holds the same plain data."""
    file = root / "run.json"
    try:
        plain = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return
    if isinstance(plain, dict):
        restore(plain, str(file))


@cache
def _state() -> dict[str, Any]:
    torch.manual_seed(0)
    tasks = {"depth": small_tasks()["depth"]}
    return small_state(small_run(tasks)).state_dict()


def _write_checkpoint(root: Path) -> None:
    checkpoint.save(root / "last.pt", _state())


def _read_checkpoint(root: Path) -> None:
    state = checkpoint.load(root / "last.pt")
    for name, tensor in _state()["net"].items():
        assert torch.equal(state["net"][name], tensor), f"other weights, silently: {name}"


def _write_hub(root: Path) -> None:
    _write_checkpoint(root)
    save_pretrained(root / "last.pt", root / "hub", licence="other")


def _read_hub(root: Path) -> None:
    from_pretrained(root / "hub", device="cpu")


_RESULTS = {"depth": {"rmse_m": 0.5, "delta1": 0.9, "abs_rel": 0.1, "images": 4, "protocol": "plain"}}


def _write_run_folder(root: Path) -> None:
    row = {"kind": "train", "step": 1, "epoch": 0, "losses": {"depth": {"silog": 0.5}}, "weights": {"depth": 1.0},
           "lr": 1e-3, "grad_norm": 1.0, "images_per_s": 9.0, "data_time": 0.1}  # fmt: skip
    val = {"kind": "val", "step": 2, "epoch": 0, "results": _RESULTS}
    (root / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (row, {**row, "step": 2}, val)))
    environment = {"gpus": ["H100"], "packages": {"torch": "2"}, "cpu_cores": 2, "commit": "a" * 40}
    (root / "env.json").write_text(json.dumps(environment))
    (root / "config.yaml").write_text(dump(_run()))
    save_json(_RESULTS, root / "results.json", {"step": 2})
    (root / "wandb_run.txt").write_text("abc123\n")


def _read_run_folder(root: Path) -> None:
    write_report(root / "report.html", root, _RESULTS)


def _resume_log(root: Path) -> None:
    logging._drop_rows_after(root / "metrics.jsonl", 1, evaluated=False)


def _read_results(root: Path) -> None:
    choose_json(root / "results.json", {"step": 3}, free_name=True)
    write_report(root / "report.html", root, read_results(root / "results.json"))


def _write_study(root: Path) -> None:
    settings = comparison.settings_of(_run())
    worker.Result(settings, None, 3, _RESULTS, None, [], 9, 1.0, 2.0).save(root)
    cost = {"key": comparison.key_of(_run()), "baseline": "all", "baseline_ms": 3.0, "ratio": 1.0, "num_parameters": 9,
            "gflop": 0.1}  # fmt: skip
    (root / costs.FILE).write_text(json.dumps({"all": cost}))
    (root / affinity.FILE).write_text(json.dumps({comparison.key_of(_run()): [[None, 0.5], [0.1, None]]}))


def _read_result(root: Path) -> None:
    result = worker.load_result(root)
    assert result is not None
    worker.differences(result.settings, _run())


def _write_pipeline(root: Path) -> None:
    transform = {
        "__class_fullname__": "Compose", "p": 1.0, "transforms": [{"__class_fullname__": "Blur", "p": 0.5,
        "blur_limit": [3, 5]}], "bbox_params": None, "keypoint_params": None, "additional_targets": {},
    }  # fmt: skip
    content = {"__version__": "2.0", "transform": transform}
    (root / "pipeline.yaml").write_text(yaml.safe_dump(content))
    (root / "pipeline.json").write_text(json.dumps(content))


def _open_pipeline(name: str, root: Path) -> None:
    photometric.open_pipeline.cache_clear()
    photometric.open_pipeline(root / name)


def _write_predictions(root: Path) -> None:
    (root / "submission.json").write_text(json.dumps({"depth": {"units_per_metre": 256}}))
    (root / "depth").mkdir(exist_ok=True)
    cv2.imwrite(str(root / "depth/a.png"), np.full((H, W), 300, np.uint16))
    scores = [{"image_id": "a", "scores": {"floor": 0.5, "shelf": 0.25}}]
    (root / "scores.json").write_text(json.dumps(scores))
    (root / "description.json").write_text(
        json.dumps({"format": 1, "inputs": {"image": {"size": [8, 8]}}, "tasks": {}})
    )


def _predictions(root: Path) -> None:
    sample = Sample(image=_picture(), image_id="a")
    _, depth_m = open_predictions(root / "depth", Depth(), None).read(sample)
    assert np.isfinite(depth_m).all()


def _scores(root: Path) -> None:
    sample = Sample(image=_picture(), image_id="a")
    open_predictions(root / "scores.json", Classification(), SPACE).read(sample)


def _description(root: Path) -> None:
    file = root / "description.json"
    try:
        text = file.read_text()
    except ValueError:
        return
    parse_description(text, file)


def _run_readers() -> list[Reader]:
    return [
        Reader("config", ["fuzz.yaml"], _write_config, lambda root: config.load(root / "fuzz.yaml"), parts=2,
               share=2),
        Reader("config, base of one", ["below.yaml"], _write_config, lambda root: config.load(root / "fuzz.yaml"),
               named=["fuzz.yaml"], parts=2),
        Reader("comparison", ["compare.yaml"], _write_comparison, lambda root: comparison.read(root / "compare.yaml"),
               named=["below.yaml"], parts=2, share=0.2),
        Reader("settings in a checkpoint", ["run.json"], _write_settings, _restore, parts=2, share=2),
        Reader("checkpoint", ["last.pt"], _write_checkpoint, _read_checkpoint, ["io.tensor_files"], share=0.7),
        Reader("hub, config.json", ["hub/config.json"], _write_hub, _read_hub, share=0.2, named=["model.safetensors"]),
        Reader("hub, weights", ["hub/model.safetensors"], _write_hub, _read_hub, share=0.2),
        Reader("metrics.jsonl, report", ["metrics.jsonl"], _write_run_folder, _read_run_folder, share=0.3),
        Reader("metrics.jsonl, resume", ["metrics.jsonl"], _write_run_folder, _resume_log),
        Reader("run folder, report", ["env.json", "config.yaml"], _write_run_folder, _read_run_folder, share=0.2),
        Reader("results", ["results.json"], _write_run_folder, _read_results, share=0.3),
        Reader("run id", ["wandb_run.txt"], _write_run_folder, lambda root: _run_id(root / "wandb_run.txt"), share=0.3),
        Reader("comparison, run", [worker.RESULT], _write_study, _read_result, named=["a run of this comparison"],
               share=0.5),
        Reader("comparison, costs", [costs.FILE], _write_study, costs.read_costs, share=0.5),
        Reader("comparison, affinity", [affinity.FILE], _write_study, affinity.read_affinity, share=0.5),
        *(Reader(name, [name], _write_pipeline, partial(_open_pipeline, name), share=0.5)
          for name in ("pipeline.yaml", "pipeline.json")),
        Reader("predictions, manifest", ["submission.json"], _write_predictions, _predictions),
        Reader("predictions, depth", ["depth/a.png"], _write_predictions, _predictions),
        Reader("predictions, scores", ["scores.json"], _write_predictions, _scores),
        Reader("exported description", ["description.json"], _write_predictions, _description),
    ]  # fmt: skip


@cache
def readers() -> tuple[Reader, ...]:
    """The table."""
    return (*_run_readers(), *_text_readers(), *_layout_readers(), *_image_readers())


NOT_READERS = {
    "io.atomic": "writes files; it reads none",
    "io.download": "fetches files and compares a checksum of them; what is in them, their readers read",
    "io.remote": "fetches shards whole and compares their checksums; what is in them, io.shards reads",
    "io.objects": "takes what voc, yolo and labelme have read",
}
"""Modules of `io` without a reader of their own, and why."""
