"""The predictor: the numbers of eval.py, alone, in batches and in threads; metres of boxes; results as plain data."""

import itertools
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import scene_run
import torch
from PIL import Image
from pycocotools.coco import COCO

import visionmtl
from visionmtl.api import Evaluation
from visionmtl.cli import predict as predict_tool
from visionmtl.engine.checkpoint import open_model
from visionmtl.engine.distributed import Ranks
from visionmtl.inference.predictor import Result, ResultBoxes
from visionmtl.metrics.distance import DistanceMeter
from visionmtl.structures import Sample

ALONE = Ranks(0, 1, torch.device("cpu"))
SIZES = [(50, 70), (33, 20), (64, 64), (90, 40), (50, 70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not trained, judged on images of two sizes."""
    sets = [scene_run.scenes(3, split="val"), scene_run.scenes(2, split="val", size=[96, 64], name="tall")]
    return scene_run.save_untrained(scene_run.run(data={"val": sets}), tmp_path_factory.mktemp("run")).parent.parent


@pytest.fixture(scope="module")
def model(folder: Path) -> visionmtl.Predictor:
    return visionmtl.load(folder, device="cpu")


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


def assert_equal(result: Result, other: Result) -> None:
    assert np.array_equal(result.boxes.xyxy, other.boxes.xyxy) and np.array_equal(
        result.boxes.scores, other.boxes.scores
    )
    assert np.array_equal(result.segmentation, other.segmentation) and np.array_equal(result.depth_m, other.depth_m)


# ---- the numbers of eval.py ----


@pytest.mark.parametrize(("precision", "batch_size"), [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 5)])
def test_single_images_and_batches_of_unequal_sizes_are_those_of_eval_bit_for_bit(folder, precision, batch_size):
    opened = open_model(folder, "cpu", [f"train.precision={precision}"])
    images, expected = [], []

    def keep(sample: Sample, predictions: dict, judged: list[str]) -> None:
        images.append(sample.image)
        expected.append(Result.of(sample.image, None, predictions, opened.net.tasks, opened.net.spaces))

    evaluation = Evaluation(opened, ALONE, (), None)
    evaluation.measure(batch_size=batch_size, on_image=keep)
    predictor = visionmtl.Predictor(opened, batch_size=batch_size)

    assert len({image.shape for image in images}) == 2
    results = [predictor(image) for image in images] if batch_size == 1 else predictor(images)
    for result, of_evaluation in zip(results, expected, strict=True):
        assert_equal(result, of_evaluation)


def test_other_images_of_a_batch_change_nothing(model, photos):
    assert model.batch_size == 2
    assert_equal(model(photos[:2])[1], model([photos[3], photos[1]])[1])


def test_evaluation_scores_the_distances_that_the_predictor_gives(folder, model):
    evaluation = Evaluation(open_model(folder, "cpu"), ALONE, ["tall"], None)
    samples: list[Sample] = []
    results = evaluation.measure(on_image=lambda sample, *_: samples.append(sample))
    by_hand = DistanceMeter(model.net.spaces["detection"])
    for sample, result in zip(samples, model(samples), strict=True):
        by_hand.update((result.predictions["detection"], result.depth_m), sample)

    assert results["detection+depth"] == {"images": 2, **by_hand.compute()}
    assert results["detection+depth"]["boxes"] > 0
    without = visionmtl.evaluate(folder, "tasks.detection.min_score=0.99", data=["tall"], device="cpu")
    assert without["detection+depth"]["matched"] == 0 and without["detection+depth"]["abs_rel"] is None


def test_each_data_set_has_its_own_distances_and_a_protocol_has_none(folder):
    opened = open_model(folder, "cpu")
    assert {"detection+depth@scenes", "detection+depth@tall"} < set(Evaluation(opened, ALONE, (), None).meters)
    assert set(Evaluation(opened, ALONE, ["tall"], "nyu_eigen").meters) == {"depth"}


# ---- sources ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, photos) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, photo in enumerate(photos):
        Image.fromarray(photo).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_folder_is_read_ahead_in_order(folder, files, photos, threads):
    model = visionmtl.load(folder, device="cpu", batch_size=2, threads=threads)
    results = model(files)
    first = next(results)
    assert first.source == str(files / "0.png")
    for result, photo in zip([first, *results], photos, strict=True):
        assert np.array_equal(result.image, photo)


def test_progress_is_shown_on_stderr_and_changes_nothing(model, files, photos, capfd):
    shown = list(model(files, progress=True))
    assert "images" in capfd.readouterr().err
    for result, other in zip(shown, model(photos), strict=True):
        assert_equal(result, other)


def test_a_video_and_a_generator_are_read_as_they_go(model, photos, tmp_path: Path):
    file = str(tmp_path / "a.avi")
    writer = cv2.VideoWriter(file, cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(3):
        writer.write(np.full((48, 64, 3), 90, np.uint8))
    writer.release()

    assert [result.source for result in model(file)] == [f"{file}#0", f"{file}#1", f"{file}#2"]
    endless = model(itertools.repeat(photos[0]))
    assert_equal(next(endless), next(endless))


def test_a_video_that_was_cut_short_ends_with_an_error(model, tmp_path: Path):
    file, rng = tmp_path / "cut.avi", np.random.default_rng(0)
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(12):
        writer.write(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    writer.release()
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    results, found = model(str(file)), []
    with pytest.raises(ValueError, match=r"cut\.avi says it has 12 frames, and [3-7] can be read; a whole file"):
        found.extend(results)
    assert len(found) >= 1


def test_a_missing_file_is_named_by_the_reading_thread(model, files):
    with pytest.raises(ValueError, match=r"nothing\.png"):
        model([files / "0.png", files / "nothing.png"])


# ---- threads, tasks, precision, compilation ----


def test_threads_share_a_predictor_and_get_what_they_would_get_in_turn(model, photos):
    in_turn = [model(photo) for photo in photos] * 4
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(model, photos * 4))
    for result, other in zip(at_once, in_turn, strict=True):
        assert_equal(result, other)


def test_unused_heads_are_not_run(model, photos):
    ran: list[str] = []
    hooks = [
        decoder.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, decoder in model.net.decoders.items()
    ]
    result = model(photos[0], tasks=["depth"])
    for hook in hooks:
        hook.remove()

    assert ran == ["depth"] and set(result.predictions) == {"depth"} and result.boxes is None
    assert np.array_equal(result.depth_m, model(photos[0]).depth_m)
    with pytest.raises(ValueError, match=r"no task 'dept' \(did you mean 'depth'\?\)"):
        model(photos[0], tasks=["dept"])
    for tasks in ([], "depth"):
        with pytest.raises(ValueError, match="a list of one name or more is needed"):
            model(photos[0], tasks=tasks)


def test_an_image_without_pixels_is_refused(model):
    with pytest.raises(ValueError, match="image 0 is 0x5 px; one pixel or more"):
        model(np.zeros((0, 5, 3), np.uint8))


@pytest.mark.parametrize("setting", [{"precision": "fp8"}, {"batch_size": "4"}, {"threads": 1.5}])
def test_settings_of_another_kind_are_refused(folder, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .*allowed"):
        visionmtl.load(folder, device="cpu", **setting)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near(folder, model, photos, precision):
    half = visionmtl.load(folder, device="cpu", precision=precision)
    np.testing.assert_allclose(half(photos[0]).depth_m, model(photos[0]).depth_m, rtol=0.05)


def test_a_compiled_predictor_fills_up_its_last_batch(folder, photos, monkeypatch):
    sizes: list[int] = []

    def counted(net, **options):
        return lambda image, tasks: (sizes.append(len(image)), net(image, tasks))[1]

    monkeypatch.setattr(torch, "compile", counted)
    model = visionmtl.load(folder, device="cpu", batch_size=3, compile=True)
    results = [*model(photos), model(photos[0])]

    assert sizes == [3, 3, 1] and len(results) == 6
    plain = visionmtl.load(folder, device="cpu", batch_size=3)
    for result, other in zip(results[:3], plain(photos), strict=False):
        assert_equal(result, other)


@pytest.mark.slow
def test_a_compiled_predictor_is_near_the_plain_one(folder, model, photos):
    compiled = visionmtl.load(folder, device="cpu", batch_size=2, compile=True)
    for result, other in zip(compiled(photos), model(photos), strict=True):
        np.testing.assert_allclose(result.depth_m, other.depth_m, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"), [({"batch_size": 0}, "batch_size is 0; 1"), ({"threads": -1}, "is -1; 0")]
)
def test_settings_out_of_range_are_refused(folder, settings, said):
    with pytest.raises(ValueError, match=said):
        visionmtl.load(folder, device="cpu", **settings)


def test_a_sample_is_given_no_class_that_its_data_set_does_not_annotate(model, photos):
    space = model.net.spaces["segmentation"]
    free, boxes = model(photos[0]), model.net.spaces["detection"]
    most = int(np.bincount(free.segmentation.ravel()).argmax())
    annotated = {"segmentation": np.arange(len(space.classes)) != most, "boxes": np.arange(len(boxes.classes)) == 1}
    told = Sample(image=photos[0], image_id="7", annotated=annotated)

    for result in (model(told), model([photos[1], told])[1]):
        assert most not in result.segmentation and set(result.boxes.labels[result.boxes.scores > 0]) <= {1}
    assert most in model([photos[0], told])[0].segmentation, "a photo beside it may show anything"


# ---- metres ----


def test_positions_by_hand():
    """A camera of 100 px focal length in the middle of 40x20 px: the box's middle is 10 px right and 5 px above it."""
    xyxy = np.array([[28, 3, 32, 7]], np.float32)
    depth_m = np.full((20, 40), 2, np.float32)
    boxes = ResultBoxes(xyxy, np.ones(1, np.float32), np.zeros(1, np.int64), ["a"], depth_m, (100, 100, 20, 10))

    np.testing.assert_allclose(boxes.positions_m, [[0.2, -0.1, 2]], rtol=1e-6)
    assert boxes.rows()[0]["position_m"] == pytest.approx([0.2, -0.1, 2], rel=1e-6)
    assert boxes.distance_spread_m.tolist() == [0]


def test_intrinsics_come_with_the_call_or_the_sample(model, photos):
    sample = Sample(image=photos[0], image_id="7", intrinsics=(80.0, 80.0, 35.0, 25.0))
    from_sample, given = model(sample), model(photos[0], intrinsics=(80, 80, 35, 25))

    assert np.array_equal(from_sample.boxes.positions_m, given.boxes.positions_m) and from_sample.source == "7"
    assert np.array_equal(given.boxes.positions_m[:, 2], given.boxes.distance_m)
    assert model(photos[0]).boxes.positions_m is None
    assert not np.array_equal(model(sample, intrinsics=(40, 40, 35, 25)).boxes.positions_m, given.boxes.positions_m)


@pytest.mark.parametrize(
    ("intrinsics", "tasks", "said"),
    [
        (5, None, r"intrinsics are 5; \(fx, fy, cx, cy\) in pixels with focal lengths above 0 are needed"),
        ((0, 1, 1, 1), None, r"intrinsics are \(0, 1, 1, 1\); \(fx, fy, cx, cy\) in pixels with focal lengths above 0"),
        ((1, 1, 1), None, r"are \(1, 1, 1\)"),
        ((1, 1, 1, 1), ["depth"], "would have no effect: .* the tasks depth do not predict boxes; leave them out"),
    ],
)
def test_intrinsics_that_cannot_be_used_are_refused(model, photos, intrinsics, tasks, said):
    with pytest.raises(ValueError, match=said):
        model(photos[0], intrinsics=intrinsics, tasks=tasks)


# ---- plain data ----


def test_to_dict_is_ready_for_json(model, photos):
    result = model(photos[0], intrinsics=(80, 80, 35, 25))
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))

    assert plain["size"] == [50, 70] and plain["source"] is None
    first = plain["boxes"][0]
    assert first["name"] == result.boxes.names[0] and first["xyxy"] == result.boxes.xyxy[0].tolist()
    assert first["distance_m"] == result.boxes.distance_m[0] and len(first["position_m"]) == 3
    assert sum(plain["segmentation"].values()) == pytest.approx(1)
    assert plain["depth_m"]["min"] <= plain["depth_m"]["median"] <= plain["depth_m"]["max"]
    assert result.to_dict(min_score=1.0)["boxes"] == []
    middle = float(np.median(result.boxes.scores))
    likely = result.boxes.above(middle)
    assert likely.rows() == [row for row in result.boxes.rows() if row["score"] >= middle]


def test_to_coco_is_read_by_pycocotools(model, photos, files):
    result = model(files / "3.png")
    rows = result.to_coco()
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 3}],
        "categories": [{"id": i, "name": str(i)} for i in range(9)],
        "annotations": [],
    }
    truth.createIndex()

    assert len(truth.loadRes(rows).anns) == len(result.boxes) > 0
    assert rows[0]["image_id"] == 3 and rows[0]["distance_m"] == result.boxes.distance_m[0]
    of_others = {"drive.mp4#7": "drive#7", "room.a/img_1.5": "room.a/img_1.5", "photos/a.b.JPG": "a.b"}
    for source, image_id in of_others.items():
        assert replace(result, source=source).to_coco()[0]["image_id"] == image_id
    assert model(photos[0]).to_coco("street")[0]["image_id"] == "street"
    with pytest.raises(ValueError, match=r"from memory, so its entries have no image_id; .* to_coco\(image_id\)"):
        model(photos[0]).to_coco()
    assert [model(photos[0]).to_coco(given)[0]["image_id"] for given in (0, 5, "12", "\uff11\uff12", "9" * 20)] == [
        0, 5, 12, "\uff11\uff12", "9" * 20,
    ]  # fmt: skip
    assert result.to_coco(0)[0]["image_id"] == 0
    for wrong in ("", True, 1.5):
        with pytest.raises(ValueError, match="a text or a whole number"):
            result.to_coco(wrong)
    with pytest.raises(ValueError, match="to_coco gives boxes, but the tasks predicted are depth"):
        model(photos[0], tasks=["depth"]).to_coco("a")


def test_to_supervision(model, photos):
    supervision = pytest.importorskip("supervision", reason="the extra supervision is not installed")
    result = model(photos[0])
    found = result.to_supervision()

    assert isinstance(found, supervision.Detections) and len(found) == len(result.boxes)
    assert np.array_equal(found.data["distance_m"], result.boxes.distance_m)
    assert found.data["class_name"].tolist() == result.boxes.names
    assert len(found[found.confidence > 2]) == len(result.to_supervision(min_score=1.0)) == 0


def test_without_supervision_the_extra_is_named(model, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match=r"supervision is not installed; .* pip install 'visionmtl\[supervision\]'"):
        model(photos[0]).to_supervision()


def test_a_notebook_shows_the_picture(model, photos):
    assert model(photos[0])._repr_png_().startswith(b"\x89PNG")


def test_the_tool_writes_distances_beside_boxes(folder, model, files, tmp_path: Path):
    command = [str(folder), str(files), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert predict_tool.main([*command, "--intrinsics", "80,80,35,25"]) == 0
    rows = json.loads((tmp_path / "out" / "detection.json").read_text())
    ours = [row for row in rows if row["image_id"] == 3]
    expected = model(sorted(files.iterdir()), intrinsics=(80, 80, 35, 25))[3].to_coco()
    assert ours == expected and {"distance_m", "distance_spread_m", "position_m"} < set(ours[0])
    with pytest.raises(SystemExit):
        predict_tool.main([*command, "--intrinsics", "80"])


def test_an_empty_path_and_a_score_beyond_1_are_refused(model, photos):
    with pytest.raises(ValueError, match=r"the path is empty; a file, .* is needed"):
        model("")
    with pytest.raises(ValueError, match="min_score is 30; scores are numbers from 0 to 1"):
        model(photos[0]).boxes.above(30)
    with pytest.raises(ValueError, match="min_score is 2; scores are numbers from 0 to 1"):
        model(photos[0]).plot(min_score=2)


def test_a_predictor_can_be_pickled(model, photos):
    copied = pickle.loads(pickle.dumps(model))
    assert np.array_equal(copied(photos[0]).depth_m, model(photos[0]).depth_m)
