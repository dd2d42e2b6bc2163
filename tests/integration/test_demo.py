"""The page of tools/demo.py: its data, and in a real browser what people do with it."""

import json
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scene_run
from PIL import Image

import visionmtl
from visionmtl.cli import demo as tool
from visionmtl.inference.demo import GRID_PX, build, page_data, serve

HOSTILE = "<img src=x onerror=alert(1)> {{value}} ${1+1}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scene_run.save_untrained(scene_run.run(), tmp_path_factory.mktemp("run")).parent.parent


@pytest.fixture(scope="module")
def model(folder: Path) -> visionmtl.Predictor:
    """A network whose classes have a name that would be markup."""
    model = visionmtl.load(folder, device="cpu")
    for name in ("detection", "segmentation"):
        space = model.net.spaces[name]
        model.net.spaces[name] = replace(space, classes=tuple(f"{HOSTILE} {k}" for k in range(len(space.classes))))
    return model


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)


def test_the_page_gets_what_the_result_says(model, photo):
    result = model(photo)
    data = json.loads(json.dumps(page_data(result, 0.0), allow_nan=False))

    assert [panel["title"] for panel in data["panels"]] == ["image", *model.net.tasks]
    assert all(0 < min(panel["share"]) <= max(panel["share"]) <= 1 for panel in data["panels"])
    assert all(panel["url"].startswith("data:image/jpeg;") for panel in data["panels"])
    assert len(data["boxes"]) == len(result.boxes) > 0
    np.testing.assert_allclose(
        np.array(data["boxes"][0]["xyxy"]) * [500, 300, 500, 300], result.boxes.xyxy[0], atol=1e-3
    )
    assert data["boxes"][0]["distance_m"] == result.boxes.distance_m[0]
    assert (len(data["depth_map"]), len(data["depth_map"][0])) == (GRID_PX * 3 // 5, GRID_PX)
    assert data["depth_map"][60][100] == round(float(result.depth_m[151, 251]), 2)  # under the middle of that cell
    assert data["class_map"][60][100] == result.segmentation[151, 251]
    assert "boxes" not in page_data(model(photo, tasks=["depth"])) and page_data(result, 1.0)["boxes"] == []


def test_without_gradio_the_extra_is_named(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert tool.main([str(folder), "--device", "cpu"]) == 2
    assert "error: the package gradio is not installed; the demo needs it; install" in capsys.readouterr().err


def test_the_command_listens_to_this_machine_alone_unless_told(capsys):
    args = tool.parser().parse_args(["runs/a"])
    assert (args.host, args.port) == ("127.0.0.1", 7860)
    with pytest.raises(SystemExit):
        tool.parser().parse_args(["runs/a", "--port", "70000"])
    assert "'70000' is no port; a number from 1 to 65535 is needed" in capsys.readouterr().err


def test_an_address_that_is_taken_is_refused_before_the_network_is_read(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert tool.main(["runs/nothing", "--port", str(port)]) == 2
    assert f"error: nothing can listen at 127.0.0.1:{port} (Address already in use" in capsys.readouterr().err


def test_an_upload_is_read_as_every_other_file_is(model, tmp_path: Path):
    gradio = pytest.importorskip("gradio", reason="the extra demo is not installed")
    clear = np.full((40, 60, 4), (200, 30, 30, 0), np.uint8)  # red where nobody sees it: white for `visionmtl.load`
    Image.fromarray(clear).save(tmp_path / "clear.png")
    page = build(model, "demo")
    predict = next(one for one in page.fns.values() if one.name == "predict")
    image, tasks = predict.inputs

    upload = gradio.data_classes.ImageData(path=str(tmp_path / "clear.png"), orig_name="clear.png")
    result = predict.fn(image.preprocess(upload), tasks.preprocess(["depth"]))
    assert (result.image == 255).all()
    np.testing.assert_array_equal(result.depth_m, model(tmp_path / "clear.png", tasks=["depth"]).depth_m)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(model, photo, width: int, tmp_path: Path):
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    Image.fromarray(photo).save(tmp_path / "photo.png")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    served = build(model, HOSTILE, 0.0)
    address = serve(served, "127.0.0.1", free, wait=False)
    assert address.startswith("http://127.0.0.1:")
    requests: list[str] = []
    problems: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        page.wait_for_selector("input[type=file]", state="attached")
        page.set_input_files("input[type=file]", str(tmp_path / "photo.png"))
        page.wait_for_selector(".vm-boxes tbody tr", timeout=60_000)

        # a class called as markup is text
        assert page.locator(".vm-panel").count() == 4
        assert page.locator(".vm-boxes td").first.inner_text().startswith(HOSTILE)
        assert page.locator("img[src=x]").count() == 0 and HOSTILE in page.inner_text("body")

        # pointing at a panel tells class, metres and score
        stage = page.locator(".vm-stage").nth(2)
        stage.hover(position={"x": 100, "y": 60})
        told = page.locator(".vm-tip").inner_text()
        assert HOSTILE in told and " m" in told and "here: " in told
        assert page.locator(".vm-dot").count() == 4

        # threshold and tasks
        before = page.locator(".vm-boxes tbody tr").count()
        page.locator("input[type=number]").fill("1")
        page.locator("input[type=number]").press("Enter")
        page.wait_for_selector("text=No box has this score")
        page.get_by_label("segmentation").uncheck()
        page.wait_for_function("document.querySelectorAll('.vm-panel').length == 3", timeout=60_000)

        assert before > 0 and problems == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.wait_for_timeout(500)
        assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
        browser.close()
    served.close()
