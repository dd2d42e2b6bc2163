"""Claims about `visionmtl.report.report`: one page that holds everything and loads nothing."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from visionmtl import run as config
from visionmtl.inference.ranking import choose_metric, ranked
from visionmtl.report import report
from visionmtl.report.charts import MAX_POINTS, line_chart
from visionmtl.report.evidence import Confusion, Evidence
from visionmtl.report.report import read_rows, write_report
from visionmtl.structures import Sample
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.segmentation import Segmentation
from visionmtl.visualization.draw import draw_depth

RESULTS = {
    "segmentation": {
        "images": 3,
        "pixel_accuracy": 0.75,
        "miou": 0.4921,
        "per_class": {"wall": {"iou": 0.8, "pixels": 1234567}, "<door>": {"iou": None, "pixels": 0}},
        "absent": ["<door>"],
        "protocol": "pooled & exact",
    },
    "depth": {"images": 3, "abs_rel": 0.1, "rmse_m": 0.6123, "protocol": "eigen"},
}
VOID = {"meta", "img", "br", "link", "input"}


@pytest.fixture
def run_dir(tmp_path):
    """A run's folder as training leaves it."""
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config.dump(config.load("configs/quickstart.yaml")))
    (folder / "env.json").write_text('{"gpus": ["NVIDIA <GPU>"], "torch": "2.11"}')
    rows = [
        {"kind": "train", "step": step, "epoch": 0, "losses": {"depth": {"silog": 1 / step}}, "lr": 1e-3}
        for step in range(1, 1000)
    ]
    rows.append({"kind": "val", "step": 1000, "epoch": 1, "results": {"depth": {"abs_rel": 0.1, "rmse_m": 0.6}}})
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return folder


class Balanced(HTMLParser):
    """Fails on a tag that is closed without having been opened, or never closed."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass  # <line/>: opened and closed at once

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def written(run_dir, results=RESULTS, pictures=()):
    write_report(run_dir / "report.html", run_dir, results, pictures)
    return (run_dir / "report.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_loads_nothing(run_dir):
    page = written(run_dir, pictures=[("first", np.zeros((20, 30, 3), np.uint8))])

    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "@import" not in page
    assert re.findall(r"https?://[^\s\"']+", page) == ["http://www.w3.org/2000/svg"], "the name of SVG, not an address"


def test_the_head_says_what_was_trained_on_what(run_dir):
    head = written(run_dir).partition("</header>")[0]

    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", head))
    expected = {
        "encoder": "resnet10t",
        "trained on": "scenes",
        "input": "128 x 160 px",
        "device of the training": "NVIDIA &lt;GPU&gt;",
    }
    assert {key: facts[key] for key in expected} == expected
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", facts["written"]) and facts["step"] == "1,000"


def test_names_from_outside_cannot_become_markup(run_dir):
    page = written(run_dir)

    assert "<door>" not in page and "&lt;door&gt;" in page


def test_curves_settings_and_pictures_are_inside(run_dir):
    page = written(run_dir, pictures=[("val/0001", np.zeros((20, 4000, 3), np.uint8))])

    assert "depth: training loss" in page and "depth: validation" in page and "learning rate" in page
    assert "type: scenes" in page and "&#34;torch&#34;: &#34;2.11&#34;" in page
    assert "val/0001" in page and "data:image/webp;base64," in page


def test_a_folder_without_a_run_still_gives_its_results(tmp_path):
    page = written(tmp_path)

    assert "no metrics.jsonl in the run" in page and "0.4921" in page and "Curves" not in page


def test_a_network_without_a_run_folder_is_described_by_its_own_settings(tmp_path):
    run = config.load("configs/quickstart.yaml")
    write_report(tmp_path / "report.html", tmp_path, RESULTS, run=run)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"<dd>{run.model.encoder.name}</dd>" in page and "higher is better" in page
    assert "no config.yaml" not in page and "no metrics.jsonl" not in page and "warmup_steps" in page


def test_a_task_without_labels_says_so(run_dir):
    assert "no label in this split" in written(run_dir, {"depth": {"images": 0}})


def test_a_line_cut_off_by_a_crash_is_left_out_but_a_broken_one_is_named(tmp_path):
    rows = tmp_path / "metrics.jsonl"
    rows.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    assert len(read_rows(rows)) == 1

    rows.write_text('{"kind"\n{"kind": "train", "step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1 is not JSON .*; one object a line is needed; repair"):
        read_rows(rows)


def test_long_curves_are_thinned_and_keep_their_last_value():
    points = [(float(step), float(step)) for step in range(1001)]

    chart = line_chart("long", {"a": points})

    assert chart
    (line,) = chart.lines
    assert len(line.points) <= MAX_POINTS and line.points[-1] == (1000, 1000)


def test_values_that_are_not_finite_and_lone_points_can_be_drawn():
    assert line_chart("none", {"a": [(1, float("nan"))]}) is None
    assert "nan" not in str(line_chart("some", {"a": [(5, 0.0)], "b": [(5, 0.0), (6, float("inf"))]}))


def test_a_folder_named_like_a_placeholder_does_no_harm(run_dir):
    odd = run_dir.parent / "run {body}"
    shutil.copytree(run_dir, odd)

    assert written(odd).count("<section") == written(run_dir).count("<section")


def looked_at(*errors):
    """Evidence of one image for each relative error of depth; true depth is 2 m left, 20 m right."""
    evidence = Evidence({"depth": Depth(max_depth_m=80)}, {"depth": None})
    true_m = np.repeat(np.asarray([[2, 2, 2, 20]], np.float32), 4, axis=0)
    for number, error in enumerate(errors):
        sample = Sample(image=np.zeros((4, 4, 3), np.uint8), image_id=f"image {number}", depth_m=true_m)
        evidence.add(sample, {"depth": true_m * (1 + np.float32(error))}, ["depth"])
    return evidence


def test_the_worst_and_the_best_images_are_kept():
    titles = [of.title for of in looked_at(0.2, 0.1, 0.5, 0.4).images()]

    assert [re.findall(r"(worst|best) depth: rmse_m .* \(image (image \d)\)", title)[0] for title in titles] == [
        ("worst", "image 2"), ("worst", "image 3"), ("best", "image 1"),
    ]  # fmt: skip


def test_depth_and_its_truth_have_one_range_of_colours():
    (image, *_) = looked_at(1.0).images()
    panels = image.panels["depth"]
    near, far = panels["truth"][0, 0], panels["prediction"][0, -1]  # 2 m; 20 m seen as 40 m
    assert (panels["prediction"][0, 0] != near).any() and (panels["truth"][0, -1] != far).any()
    assert (draw_depth(image.image, np.full(image.image.shape[:2], 2, np.float32), 2.0, 40.0)[0, 0] == near).all()


def test_depth_errors_are_collected_by_true_distance():
    ((near, error, share), (far, *_)) = looked_at(0.1, 0.3).depth_by_distance()["depth"]

    assert near == pytest.approx(2 * 2**0.25) and error == pytest.approx(0.2, rel=1e-5) and share == 0.75
    assert 16 < far < 22.7


def test_the_largest_confusions_are_named_and_the_diagonal_is_none():
    table = np.asarray([[0.6, 0.4, 0], [0.1, 0.9, 0], [np.nan] * 3])
    assert Confusion(("a", "b", "c"), table).largest(5) == [("a", "b", 0.4), ("b", "a", 0.1)]


def test_the_summary_says_what_is_weak(run_dir):
    confusion = Confusion(("wall", "door"), np.asarray([[0.9, 0.1], [0.7, 0.3]]))
    write_report(run_dir / "report.html", run_dir, RESULTS, confusions={"segmentation": confusion})
    summary = re.search(r'<ul class="summary">(.*?)</ul>', (run_dir / "report.html").read_text(), re.S)[1]

    assert "mean intersection over union is 0.4921 (higher is better) on 3 images" in summary
    assert "takes door for wall (70% of its pixels), wall for door (10% of its pixels)" in summary

    ious = {"wall": 0.5, "door": 0.0, "lamp": 0.0}
    results = {
        "segmentation": {"miou": 1 / 6, "images": 3, "per_class": {name: {"iou": iou} for name, iou in ious.items()}}
    }
    write_report(run_dir / "few.html", run_dir, results)
    assert "segmentation is best at wall (0.50) and finds none of door, lamp." in (run_dir / "few.html").read_text()


def test_images_are_ranked_by_any_metric_that_is_better_or_worse():
    tasks = {"depth": Depth(), "segmentation": Segmentation()}

    assert choose_metric(tasks, None) == ("depth", "rmse_m") and choose_metric(tasks, "depth/delta1")[1] == "delta1"
    assert ranked([0.3, None, 0.1, 0.2], tasks["depth"]) == [0, 3, 2]
    assert ranked([0.3, None, 0.1, 0.2], tasks["depth"], "delta1") == [2, 3, 0]
    with pytest.raises(ValueError, match=r"'pixels' is no metric of depth .*; allowed are abs_rel"):
        choose_metric(tasks, "depth/pixels")


def test_the_card_of_distances_says_which_way_is_better():
    card = report._card("detection+depth", {"abs_rel": 0.11, "delta1": 0.9, "matched": 4, "boxes": 5}, {})
    assert (card["metric"], card["better"]) == ("abs_rel", "lower is better")
