"""The pages in a real browser: nothing is loaded, nothing fails, nothing overflows, and what is promised works."""

import json
import shutil

import numpy as np
import pytest

from visionmtl import run as config
from visionmtl.report.charts import IntervalChart, IntervalRow
from visionmtl.report.evidence import Confusion, Evidence
from visionmtl.report.report import SortableTable, render, write_report
from visionmtl.structures import Boxes, Detections, LabelSpace, Sample
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection

EVIL = "<img src=x onerror=alert(1)>"
SPACE = LabelSpace("odd", (EVIL, "lamp"), ((9, 9, 9), (1, 1, 1)))
RESULTS = {
    "detection": {
        "images": 2, "ap": 0.25, "ap50": 0.5, "pr_curves": {"iou50": [1 - at / 100 for at in range(101)]},
        "per_class": {name: {"ap": ap, "boxes": 3} for name, ap in ((EVIL, 0.1), ("lamp", 0.4), ("door", None))},
    },
    "depth": {"images": 2, "rmse_m": 0.5, "abs_rel": 0.1, "delta1": 0.9},
}  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report and a comparison."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(config.dump(config.load("configs/quickstart.yaml")))
    rows = [
        {"kind": "train", "step": step, "losses": {"depth": {"silog": 1 / step}, "detection": {"box": 2 / step}},
         "gradients": {"cosine": {"detection-depth": 0.1}, "conflict": {"detection-depth": 0.25}}}
        for step in range(1, 100)
    ]  # fmt: skip
    rows.append({"kind": "val", "step": 100, "results": {"depth": {"rmse_m": 0.5}}})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evidence = Evidence({"detection": Detection(), "depth": Depth()}, {"detection": SPACE, "depth": None})
    for number in (1, 2):
        xyxy = np.asarray([[10, 10, 40, 40]], np.float32)
        boxes = Boxes(xyxy, np.zeros(1, np.int64), np.zeros(1, bool), np.full(1, 900, np.float32))
        depth = np.full((60, 80), 2.0, np.float32)
        sample = Sample(
            image=np.full((60, 80, 3), 99, np.uint8), image_id=f"{EVIL}{number}", boxes=boxes, depth_m=depth
        )
        found = Detections(xyxy + number, np.full(1, 0.9, np.float32), np.zeros(1, np.int64))
        evidence.add(sample, {"detection": found, "depth": depth * (1 + number / 10)}, ["detection", "depth"])
    confusion = Confusion((EVIL, "lamp"), np.asarray([[0.75, 0.25], [np.nan, np.nan]]))
    facts = {"command of this page": "visionmtl eval runs/odd --report report.html"}
    write_report(
        folder / "report.html", folder, RESULTS, evidence=evidence, confusions={"segmentation": confusion}, facts=facts
    )
    chart = IntervalChart(
        "change", "change in %", (IntervalRow(EVIL, 2.0, 1.0, 3.0, (1.5, 2.5), "positive"),
                                  IntervalRow("one seed", -1.0, None, None, (-1.0,), "not shown")),
    )  # fmt: skip
    rows = [["one seed", "-1.00"], [EVIL, "+2.00 [1.0, 3.0]"], ["none", None]]
    table = SortableTable("Results", ["run", "Δm, %"], rows)
    blocks = [f"12 of **12** runs of `{EVIL}`.", [f"{EVIL} diverged"], table]
    render(folder / "comparison.html", "comparison.html.j2", name="Comparison", blocks=blocks, charts=[chart])
    return folder


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=[1280, 400])
def opened(request, browser, pages):
    """Opens a page; at the end nothing was said on the console, asked for or loaded."""
    page = browser.new_page(viewport={"width": request.param, "height": 800})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda of: None if of.url.startswith(("file:", "data:")) else said.append(of.url))

    def go(name):
        page.goto((pages / name).as_uri())
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 0, f"{name} is {overflow} px wider than the window"
        return page

    yield go
    assert said == []
    page.close()


@pytest.mark.slow
def test_a_report_is_drawn_and_answers(opened):
    page = opened("report.html")

    assert page.locator(f"text={EVIL}").count() > 3 and page.locator("img[src=x]").count() == 0
    charts = page.locator("[data-chart] svg")
    assert charts.count() >= 7 and all(charts.nth(k).locator("text").count() > 4 for k in range(charts.count()))
    loss = page.locator("figure", has_text="depth: training loss").locator("svg")
    loss.scroll_into_view_if_needed()
    box = loss.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    assert "training step" in page.locator(".tip").inner_text() and "silog: 0.0" in page.locator(".tip").inner_text()
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=3)
    page.mouse.up()
    page.get_by_text("whole range").first.click()
    assert page.get_by_text("whole range").count() == 0


@pytest.mark.slow
def test_tables_sort_pictures_open_and_sliders_move(opened):
    page = opened("report.html")

    table = page.locator("table.sortable").first
    first = lambda: table.locator("tbody th").first.inner_text()  # noqa: E731
    table.get_by_role("button", name="ap").click()
    assert first() == "lamp"
    table.get_by_role("button", name="ap").click()
    assert first() == EVIL and table.locator("tbody th").last.inner_text() == "door", "what is missing comes last"

    slider = page.locator(".slider").first
    slider.locator("input").evaluate("input => { input.value = 80; input.oninput(); }")
    assert "20%" in slider.locator(".over").evaluate("img => getComputedStyle(img).clipPath")
    slider.locator(".open").click()
    assert page.locator("dialog[open] img").evaluate("img => img.naturalWidth") > 300
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


@pytest.mark.slow
def test_a_comparison_is_drawn_and_sorts(opened):
    page = opened("comparison.html")
    assert page.locator("p strong").inner_text() == "12" and page.locator("p code").inner_text() == EVIL
    assert page.locator("ul li").all_inner_texts() == [f"{EVIL} diverged"]

    assert page.locator("[data-chart] svg text").count() > 4
    page.get_by_role("button", name="Δm").click()
    names = page.locator("tbody th").all_inner_texts()
    assert names == [EVIL, "one seed", "none"]
