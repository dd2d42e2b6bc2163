"""tools/export.py: files that other runtimes run, equal to the network, with everything a user must know inside."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import scene_run
from project import ROOT

from visionmtl.cli import main
from visionmtl.export import exporter
from visionmtl.export.base import Format, format_of
from visionmtl.export.exported import ExportedModel
from visionmtl.export.formats.executorch import ExecuTorch
from visionmtl.export.formats.onnx import Onnx
from visionmtl.export.formats.openvino import OpenVINO
from visionmtl.export.formats.torch_export import TorchExport
from visionmtl.export.graph import depth_zoom, make_graph
from visionmtl.export.parity import compare
from visionmtl.inference.predictor import predict

SIZES = ((64, 64), (54, 66), (66, 54), (33, 32), (130, 128))
"""Of images: the input exactly, padded below and at the right, enlarged, reduced. Padding is thin: where random weights
see nothing else, scores are equal, and rounding decides which of two boxes is kept."""


def sure(folder: Path, **changes: Any) -> Path:
    """A run folder with a network that is sure of some boxes and pixels."""
    # few candidates: of 1000 random ones some have the same score to 1e-6, and rounding decides which is kept
    few = {"tasks": {"detection": {"candidates": 60, "max_detections": 20}}}
    return scene_run.save_sure(scene_run.run(folder, **few, **changes), folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sure(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [cv2.resize(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8), size[::-1]) for size in SIZES]


@pytest.fixture(scope="module")
def onnx_file(trained: Path) -> Path:
    """Decoded, any number of images."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path = trained / "net.onnx"
    opened = exporter.open_network(trained, (), None)
    Onnx().write(make_graph(opened.net, opened.run, batch=None), path)
    return path


def check_equal(trained: Path, file: Path, images: list[np.ndarray], tasks: list[str] | None = None) -> None:
    opened = exporter.open_network(trained, (), tasks)
    parity = compare(opened.net, ExportedModel(file, threads=1), images)
    assert [one.task for one in parity] == list(opened.net.tasks)
    assert all(one.kept for one in parity), parity


def test_decoded_onnx_equals_the_network_on_images_of_any_shape(
    trained: Path, onnx_file: Path, images: list[np.ndarray]
):
    check_equal(trained, onnx_file, images)
    check_equal(trained, onnx_file, images[1:2])  # one image, where two were traced


def test_predictions_at_the_original_size_are_those_of_the_predictor(
    trained: Path, onnx_file: Path, images: list[np.ndarray]
):
    opened = exporter.open_network(trained, (), None)
    expected = predict(opened.net, images, opened.run.data.input_size, "fp32", len(images))
    found = ExportedModel(onnx_file, threads=1).predict(images)
    assert any(len(one["detection"].scores) for one in expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one["detection"].xyxy, other["detection"].xyxy, atol=1e-3)
        np.testing.assert_array_equal(one["detection"].labels, other["detection"].labels)
        assert one["depth"].shape == other["depth"].shape == one["segmentation"].shape
        assert np.median(np.abs(one["depth"] / other["depth"] - 1)) < 0.01  # metres are resized, not their logarithm
        assert (one["segmentation"] == other["segmentation"]).mean() > 0.9  # nearest, not logits resized


def test_the_file_says_what_its_user_must_know(trained: Path, onnx_file: Path):
    import onnx
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["visionmtl"])
    image, tasks = about["inputs"]["image"], about["tasks"]
    assert (image["size"], image["batch"], image["layout"], image["dtype"]) == ([64, 64], None, "NHWC", "uint8")
    assert len(image["mean"]) == len(image["std"]) == 3
    space = tasks["detection"]["space"]
    assert len(space["classes"]) == len(space["colours"]) > 1
    assert (tasks["depth"]["settings"]["min_depth_m"], tasks["depth"]["settings"]["max_depth_m"]) == (0.1, 12.0)
    assert [name for task in tasks.values() for name in task["outputs"]] == [one.name for one in session.get_outputs()]
    model = onnx.load(str(onnx_file))
    assert [one.version for one in model.opset_import if not one.domain] == [20]
    assert str(ROOT) not in str(model), "no path of the machine that exported it"


def test_the_example_needs_neither_torch_nor_visionmtl(
    onnx_file: Path, images: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    example, photo, out = ROOT / "docs/examples/onnx_run.py", tmp_path / "photo.png", tmp_path / "out.png"
    cv2.imwrite(str(photo), images[1])
    text = example.read_text()
    assert len([line for line in text.split('"""', 2)[2].splitlines() if line.strip()]) <= 25
    for name in ("visionmtl", "torch"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    monkeypatch.setattr(sys, "argv", [str(example), str(onnx_file), str(photo), str(out)])
    runpy.run_path(str(example))
    assert cv2.imread(str(out)).shape == (52, 64, 3)


def test_raw_outputs_of_chosen_heads_with_preprocessing_outside(
    trained: Path, images: list[np.ndarray], tmp_path: Path
):
    opened = exporter.open_network(trained, (), ["depth", "detection"])
    graph = make_graph(opened.net, opened.run, batch=2, decoded=False, preprocessing="outside")
    assert graph.outputs == ("detection_logits", "detection_distances", "depth")
    file = tmp_path / "net.pt2"
    TorchExport().write(graph, file)
    check_equal(trained, file, images, ["depth", "detection"])
    # the same decoding as of the network, from the file's numbers
    expected = predict(opened.net, images, opened.run.data.input_size, "fp32", 1)
    for one, other in zip(ExportedModel(file).predict(images), expected, strict=True):
        np.testing.assert_allclose(one["depth"], other["depth"], rtol=1e-4)
        np.testing.assert_allclose(one["detection"].scores, other["detection"].scores, atol=1e-5)


def test_openvino_equals_the_network(trained: Path, images: list[np.ndarray], tmp_path: Path, onnx_file: Path):
    pytest.importorskip("openvino")
    about = ExportedModel(onnx_file).description
    OpenVINO().write_from_onnx(onnx_file, about, tmp_path / "net.xml")  # converts whatever is in the ONNX file
    assert ExportedModel(tmp_path / "net.xml", threads=1).description == about
    check_equal(trained, tmp_path / "net.xml", images)


def test_openvino_finds_the_first_of_equal_logits_without_sorting(tmp_path: Path):
    """It would sort the classes of each pixel, half of the time of a class map."""
    onnx, openvino = pytest.importorskip("onnx"), pytest.importorskip("openvino")
    logits = np.random.default_rng(0).integers(0, 3, (2, 7, 12, 9)).astype(np.float32)
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("ArgMax", ["logits"], ["classes"], axis=1, keepdims=0)
    inputs, outputs = [value("logits", 1, ("batch", 7, 12, 9))], [value("classes", 7, ("batch", 12, 9))]
    graph = onnx.helper.make_graph([node], "graph", inputs, outputs)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "net.onnx")
    OpenVINO().write_from_onnx(tmp_path / "net.onnx", {}, tmp_path / "net.xml")
    kinds = [node.get_type_name() for node in openvino.Core().read_model(tmp_path / "net.xml").get_ordered_ops()]
    assert "ReduceMin" in kinds and "TopK" not in kinds
    classes = OpenVINO().open(tmp_path / "net.xml", 1)({"logits": logits})["classes"]
    np.testing.assert_array_equal(classes, logits.argmax(axis=1))


@pytest.mark.slow
def test_aotinductor_equals_the_network(trained: Path, images: list[np.ndarray], tmp_path: Path):
    command = ["export", str(trained), "--format", "aotinductor", "--output", str(tmp_path / "net.aoti.pt2")]
    assert main([*command, "--num-images", "4"]) == 0
    check_equal(trained, tmp_path / "net.aoti.pt2", images)


@pytest.mark.slow
def test_executorch_equals_the_network(trained: Path, images: list[np.ndarray], tmp_path: Path):
    pytest.importorskip("executorch")
    opened = exporter.open_network(trained, (), None)
    ExecuTorch().write(make_graph(opened.net, opened.run, decoded=False), tmp_path / "net.pte")
    check_equal(trained, tmp_path / "net.pte", images)
    with pytest.raises(ValueError, match="the graph has a loop"):
        ExecuTorch().write(make_graph(opened.net, opened.run), tmp_path / "decoded.pte")


def test_the_command_writes_compares_and_overwrites_nothing(trained: Path, capsys: pytest.CaptureFixture[str]):
    command = ["export", str(trained), "--format", "torch_export", "--tasks", "depth", "--num-images", "2"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "net in float32 on 2 images" in text.replace("network", "net") and "depth  largest difference" in text
    file = trained / "export" / "last.pt2"
    assert file.is_file() and list(ExportedModel(file).tasks) == ["depth"]
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_int8_prints_what_each_metric_loses(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    file = tmp_path / "int8.onnx"
    command = ["export", str(trained), "--format", "onnx", "--int8", "--calibration-images", "4", "--output", str(file)]
    assert main([*command, "--score-images", "2"]) == 0
    text = capsys.readouterr().out
    for name in ("detection/ap ", "segmentation/miou ", "depth/rmse_m "):
        assert name in text, text

    nodes = {node.name: node for node in onnx.load(str(file)).graph.node}
    maker = {name: node for node in nodes.values() for name in node.output}
    convolutions = [node for node in nodes.values() if node.op_type == "Conv"]
    quantized = [node for node in convolutions if maker[node.input[0]].op_type == "DequantizeLinear"]
    # logits and distances on two levels, and the classes; depth's last layer is a product with a sum
    assert len(convolutions) - len(quantized) == 5
    in_float = [node for node in nodes.values() if node.op_type in ("Exp", "TopK", "NonMaxSuppression", "Sigmoid")]
    before = {maker[name].op_type for node in in_float for name in node.input if name in maker}
    assert len(in_float) >= 5 and "DequantizeLinear" not in before
    assert ExportedModel(file).description["precision"] == "int8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx", "--score-images", "3"], "would have no effect without --int8"),
        (["--format", "torch_export", "--opset", "18"], "--opset is for onnx"),
        (["--format", "torch_export", "--int8"], "is not written in INT8"),
        (["--format", "torch_export", "--output", "net.onnx"], "does not end in .pt2"),
        (["--format", "torch_export", "--tasks", "dept"], "did you mean"),
        (["--format", "torch_export", "--images", "here", "--num-images", "0"], "would have no effect"),
    ],
)
def test_refusals_say_what_to_do(trained: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(trained), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count(";") >= 1, error


def test_data_that_are_not_there_are_told_before_the_graph_is_made(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exporter, "make_graph", lambda *_, **__: pytest.fail("the graph is made"))
    gone = f"[{{type: nyuv2, root: {tmp_path / 'gone'}, split: test}}]"
    told = []
    for setting, *options in (
        (f"data.val={gone}",),
        (f"data.val={gone}", "--int8"),
        (f"data.train={gone}", "--int8"),
    ):
        assert main(["export", str(trained), setting, "--format", "onnx", *options]) == 2
        told.append(capsys.readouterr().err)
    assert "(--images DIR) or on none (--num-images 0), or give their folder as data.val.0.root=DIR" in told[0]
    assert "--score-images 0" in told[1] and "data.val.0.root=DIR" in told[1] and "data.train.0.root=DIR" in told[2]


def test_the_weights_beside_a_graph_are_not_written_over_either(tmp_path: Path):
    (tmp_path / "net.bin").touch()
    with pytest.raises(ValueError, match=r"net\.bin exists already"):
        exporter.check_target(tmp_path / "net.xml", OpenVINO(), 1)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(OpenVINO, "modules", ("no_such_runtime",))
    with pytest.raises(ValueError, match=r"no_such_runtime, .*visionmtl\[export\]"):
        OpenVINO().check_installed()


def test_images_of_other_channels_are_refused(trained: Path, tmp_path: Path):
    opened = exporter.open_network(trained, (), ["depth"])
    TorchExport().write(make_graph(opened.net, opened.run), tmp_path / "net.pt2")
    exported = ExportedModel(tmp_path / "net.pt2")
    with pytest.raises(ValueError, match=r"image 0 is uint8 \[8, 9, 4\]; uint8 \[H, W, 3\] RGB is needed"):
        exported.run_padded([np.zeros((8, 9, 4), np.uint8)])
    for image in (np.zeros((8, 9, 3), np.float32), np.zeros((8, 9), np.uint8)):
        with pytest.raises(ValueError, match=r"image 1 is .*; uint8 \[H, W, 3\] RGB is needed"):
            exported.predict([np.zeros((8, 9, 3), np.uint8), image])
    assert exported.predict([]) == []


def test_the_scale_of_depth_is_the_same_for_every_image_or_refused():
    assert depth_zoom((96, 128), (48, 64)) == 2
    with pytest.raises(ValueError, match="other proportions"):
        depth_zoom((96, 100), (48, 64))


def test_every_format_has_an_ending_of_its_own():
    kinds = Format.members()
    assert set(kinds) == {"onnx", "torch_export", "aotinductor", "openvino", "executorch"}
    assert len({kind.suffix for kind in kinds.values()}) == len(kinds)
    for kind in kinds.values():
        assert kind.quantizes == (kind.write_from_onnx is not Format.write_from_onnx), kind
    assert format_of(Path("a.aoti.pt2")).type == "aotinductor" and format_of(Path("a.pt2")).type == "torch_export"
    with pytest.raises(ValueError, match="no ending of an exported file"):
        format_of(Path("a.pb"))


TRANSFORMER = {"model": {"encoder": {"name": "test_vit"}, "pyramid": {"type": "simple", "channels": 16}}}


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["convolutions", "transformer"])
def test_onnx_and_openvino_equal_the_network_on_fifty_real_images(encoder: str, real_data: Path, tmp_path: Path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    folder = sure(tmp_path / "run", **(TRANSFORMER if encoder == "transformer" else {}))
    opened = exporter.open_network(folder, (), None)
    files = exporter.image_files(real_data / "nyuv2/image/test")[:50]
    for kind in (Onnx(), OpenVINO()):
        done = exporter.export(opened, tmp_path / f"net{kind.suffix}", kind, batch=None, images=files)
        assert (done.num_images, [one.task for one in done.parity]) == (50, list(opened.net.tasks))
        assert all(one.kept for one in done.parity), done.parity


@pytest.mark.parametrize("ending", [".onnx", ".xml", ".pt2", ".aoti.pt2"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_a_damaged_file_is_named(ending: str, content: bytes, tmp_path: Path):
    if ending in (".onnx", ".xml"):
        pytest.importorskip("onnxruntime" if ending == ".onnx" else "openvino")
    (file := tmp_path / f"net{ending}").write_bytes(content)
    with pytest.raises(ValueError, match=r"net.* cannot be opened: .+; a whole file .*; export the network again$"):
        ExportedModel(file)


def test_what_an_exported_network_does_not_take(onnx_file: Path, images: list[np.ndarray]):
    for threads in (0, -1, True):
        with pytest.raises(ValueError, match=f"threads is {threads}; a whole number of at least 1"):
            ExportedModel(onnx_file, threads)  # type: ignore[arg-type]
    model = ExportedModel(onnx_file, threads=1)
    for wrong in (images[0], iter(images), "photo.jpg"):
        with pytest.raises(ValueError, match=r"images is of type .*; a list of arrays uint8"):
            model.predict(wrong)  # type: ignore[arg-type]
    large = np.zeros((65, 64, 3), np.uint8)
    with pytest.raises(ValueError, match=r"images\[1\] has 65x64 pixels; the file's input is 64x64"):
        model.run_padded([images[0], large])
