"""tools/visualize.py: pictures of predictions, of truth and of training data, which are never written over others."""

import io
import json
import re
import resource
import sys

import cv2
import numpy as np
import pytest
import scene_run
from PIL import Image

from visionmtl import run as config
from visionmtl.cli import main
from visionmtl.data.label_spaces import resolve_spaces
from visionmtl.data.loader import train_loader
from visionmtl.datasets import open_datasets
from visionmtl.engine.checkpoint import open_model
from visionmtl.inference.predictor import Predictor, picture, save_picture
from visionmtl.io.images import read_image
from visionmtl.io.video import count_frames, read_frames, write_video
from visionmtl.visualization import canvas, draw, panels

SMALL = [
    "data.train.0.num_images=4", "data.val.0.num_images=3", "data.train.0.size=[64,96]", "data.val.0.size=[64,96]",
    "data.size=[64,96]", "data.workers=0", "data.augment.brightness=0.4", "model.pyramid.channels=16",
]  # fmt: skip
NOISE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint of an untrained run."""
    return scene_run.save_untrained(config.load("configs/quickstart.yaml", SMALL), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def opened(saved):
    return open_model(saved)


def drawn(saved, *arguments):
    return main(["visualize", str(saved), *map(str, arguments)])


def test_a_task_without_a_value_leaves_its_place_empty(opened):
    run, net = opened.run, opened.net
    prediction = Predictor(opened)(NOISE).predictions

    one = picture(run.tasks, net.spaces, NOISE, {"prediction": prediction, "label": {}})
    two = picture(run.tasks, net.spaces, NOISE, {"prediction": prediction, "label": {"depth": prediction["depth"]}})

    assert two.shape[1] == one.shape[1] and two.shape[0] > one.shape[0]


def test_a_folder_a_glob_and_a_file_are_drawn_in_their_own_numbers(saved, tmp_path, capsys):
    for name in ("a.png", "b.jpg"):
        Image.fromarray(NOISE).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")

    assert drawn(saved, tmp_path, tmp_path / "*.jpg", tmp_path / "a.png", "--output", tmp_path / "out") == 0

    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["000_a.png", "001_b.png", "002_b.png", "003_a.png", "contact_sheet.jpg"]
    assert capsys.readouterr().out.count("written: ") == 5


def test_pictures_that_were_drawn_into_the_folder_of_the_images_are_not_drawn_again(saved, tmp_path, capsys):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    assert drawn(saved, tmp_path, "--output", tmp_path / "out") == 0
    assert drawn(saved, tmp_path, "--output", tmp_path / "out") == 2
    assert "out/000_a.png lies in" in capsys.readouterr().err


def test_pictures_keep_the_letters_of_a_name_in_any_script(saved, tmp_path):
    accent = "\u0301"  # as macOS writes it: e, then the accent
    for name in ("台所.png", f"cafe{accent} 1.png", f"{'長' * 80}.png"):
        Image.fromarray(NOISE).save(tmp_path / name)

    assert drawn(saved, tmp_path, "--output", tmp_path / "out") == 0

    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names[:2] == ["000_café_1.png", "001_台所.png"]
    assert names[2].startswith("002_" + "長" * 66 + "-") and len(names[2].encode()) < 255


def test_compare_draws_validation_images_into_the_run_folder(saved):
    assert drawn(saved, "--num", 2, "--tasks", "depth,segmentation") == 0

    files = sorted((saved.parent.parent / "samples" / "compare").iterdir())
    assert [file.name[:4] for file in files] == ["000_", "001_", "cont"]
    assert read_image(files[0]).shape[1] > 3 * 480  # the image and two tasks, enlarged to be legible


def test_data_draws_the_batch_that_training_sees_first(saved, tmp_path):
    assert drawn("configs/quickstart.yaml", *SMALL, "--mode", "data", "--num", 2, "--output", tmp_path) == 0
    assert drawn(saved, "--mode", "data", "--num", 2, "--output", tmp_path / "same") == 0

    first = next(tmp_path.glob("000_*.png"))
    assert first.read_bytes() == (tmp_path / "same" / first.name).read_bytes()
    order = np.random.default_rng([0, 0]).permutation(4)
    assert first.stem.endswith(f"{order[0]}")


def test_several_data_sets_are_drawn_in_the_shares_and_the_order_of_training(tmp_path):
    one = "{type: scenes, split: train, num_images: %d, size: [64, 96], name: %s, weight: %d}"
    mixed = f"data.train=[{one % (6, 'many', 1)},{one % (2, 'few', 9)}]"
    settings = [mixed, *SMALL[3:], "data.val.0.num_images=3", "data.val.0.size=[64,96]"]
    assert drawn("configs/quickstart.yaml", *settings, "--mode", "data", "--num", 6, "--output", tmp_path) == 0

    run = config.load("configs/quickstart.yaml", settings)
    sources = open_datasets(run.data.train)
    loader = train_loader(run.data, run.tasks, resolve_spaces(run.tasks, sources), sources, 1, run.seed)
    ids = [source.read(index).image_id for source in sources for index in range(len(source))]
    drawn_ids = [re.sub(r"[^A-Za-z0-9.-]+", "_", ids[key.index]) for (key,) in list(loader.batch_sampler)[:6]]
    assert [file.stem.partition("_")[2] for file in sorted(tmp_path.glob("0*.png"))] == drawn_ids


def test_a_setting_of_the_run_can_be_replaced(saved, tmp_path):
    assert drawn(saved, "data.val.0.num_images=1", "--output", tmp_path) == 0

    assert [file.name[:4] for file in tmp_path.iterdir()] == ["000_"]


def write_clip(path, num_frames, size=(70, 50)):
    path.parent.mkdir(exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, size)
    for _ in range(num_frames):
        writer.write(NOISE)
    writer.release()


def test_a_video_becomes_a_video(saved, tmp_path):
    write_clip(tmp_path / "in.avi", 3)

    # into a folder of its own: the one the video lies in is refused
    assert drawn(saved, tmp_path / "in.avi", "--num", 2, "--output", tmp_path / "out", "--tasks", "depth") == 0

    frames_per_s, frames = read_frames(str(tmp_path / "out" / "in.mp4"))
    assert frames_per_s == 10 and len(list(frames)) == 2


def test_neither_an_input_nor_a_result_of_the_same_name_is_written_over(saved, tmp_path, capsys):
    for folder in ("a", "b"):
        write_clip(tmp_path / folder / "clip.avi", 2)
    (tmp_path / "a" / "clip.mp4").write_bytes(b"the user's")

    assert drawn(saved, tmp_path / "a" / "clip.avi", "--output", tmp_path / "a") == 2
    assert (tmp_path / "a" / "clip.mp4").read_bytes() == b"the user's"
    assert "holds files already, and nothing is written over" in capsys.readouterr().err

    clips = [tmp_path / folder / "clip.avi" for folder in ("a", "b")]
    assert drawn(saved, *clips, "--num", 1, "--tasks", "depth", "--output", tmp_path / "out") == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["clip-2.mp4", "clip.mp4"]


def test_the_default_folder_of_a_second_call_is_a_new_one(saved, tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    for _ in range(2):
        assert drawn(saved, tmp_path / "a.png", "--tasks", "depth") == 0

    samples = saved.parent.parent / "samples"
    assert [len(list((samples / name).iterdir())) for name in ("predict", "predict-2")] == [1, 1]


def test_an_output_called_as_a_picture_is_one_picture(saved, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        Image.fromarray(NOISE).save(tmp_path / name)

    assert drawn(saved, tmp_path / "a.png", "--output", tmp_path / "out.jpg") == 0
    assert read_image(tmp_path / "out.jpg").shape[2] == 3

    assert drawn(saved, tmp_path / "a.png", "--output", tmp_path / "out.jpg") == 2
    assert "out.jpg exists already; nothing is written over" in capsys.readouterr().err
    assert drawn(saved, tmp_path / "a.png", tmp_path / "b.png", "--output", tmp_path / "two.png") == 2
    assert "is one file, but there are 2 results; a folder is needed" in capsys.readouterr().err
    for name in ("one.mp4", "one.GIF"):
        assert drawn(saved, tmp_path / "a.png", "--output", tmp_path / name) == 2
        assert f"{name} does not end as pictures do" in capsys.readouterr().err and not (tmp_path / name).exists()
    assert not (tmp_path / "two.png").exists()


def test_a_setting_of_training_or_of_data_sets_is_refused_where_neither_is_at_work(saved, tmp_path, capsys):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    settings = ("optim.lr=3", "balance.type=mgda", "train.epochs=9", "seed=4", "data.augment.flip=0.3")
    bound = ("model.encoder.mean=[0.1,0.1,0.1]", "tasks.depth.weight=3", "tasks.segmentation.dropout=0.5")
    for setting in (*settings, *bound):
        assert drawn(saved, tmp_path / "a.png", setting, "--output", tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {setting.partition('=')[0]} would have no effect, or a wrong one: ")
    for setting in ("data.workers=3", "data.root=elsewhere", "data.val.0.split=train"):
        assert drawn(saved, tmp_path / "a.png", setting, "--output", tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {setting.partition('=')[0]} would have no effect: the data sets of ")
    assert not (tmp_path / "out").exists()
    allowed = "train.precision=fp32", "tasks.detection.min_score=0.2"
    assert drawn(saved, tmp_path / "a.png", *allowed, "--output", tmp_path / "out") == 0


def test_a_damaged_picture_is_told_and_the_others_are_drawn(saved, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.fromarray(NOISE).save(tmp_path / "in" / "good.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")

    assert drawn(saved, tmp_path / "in", "--output", tmp_path / "out") == 2

    assert [file.name for file in (tmp_path / "out").iterdir()] == ["000_good.png"]
    assert re.search(r"error: .*bad\.png is missing or no readable image", capsys.readouterr().err)


def test_a_name_as_long_as_a_disk_allows_is_cut_in_the_result(saved, tmp_path):
    names = [f"{'x' * 250}{end}.png" for end in "ab"]
    for name in names:
        Image.fromarray(NOISE).save(tmp_path / name)

    assert drawn(saved, *(tmp_path / name for name in names), "--tasks", "depth", "--output", tmp_path / "out") == 0

    results = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert len(results) == 3 and results[0][4:] != results[1][4:] and all(len(name) <= 255 for name in results)


def test_a_setting_that_does_not_fit_is_one_line_with_its_path(saved, tmp_path, capsys):
    assert drawn(saved, "data.wrokers=1", "--output", tmp_path / "out") == 2

    told = capsys.readouterr().err
    assert re.fullmatch(r"error: data\.wrokers: unknown field .* \(did you mean 'workers'\?\).*\n", told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "hint"), [("40", "; did you mean 0.4?"), ("-1", ""), ("high", "")])
def test_a_score_that_is_no_share_is_refused(text, hint, capsys):
    with pytest.raises(SystemExit) as ended:
        drawn("best.pt", f"--score={text}")

    assert ended.value.code == 2
    assert f"{text!r} is no score; scores are 0 to 1{hint}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.jpg"], "'nothing.jpg' names no file; an image .*; check the path"),
        (["--tasks", "depht"], r"'depht' \(did you mean 'depth'\?\); this run has .*; correct it"),
        (["--mode", "predict"], "predict was given 0 inputs; .*; name an image"),
        (["nothing.mp4"], "nothing.mp4 cannot be opened as a video; .*; check the path"),
        (["camera:front"], "names no camera; camera:0 is the first"),
    ],
)
def test_mistakes_are_explained_and_leave_no_folder(saved, tmp_path, capfd, arguments, said):
    assert drawn(saved, *arguments, "--output", tmp_path / "out") == 2  # as every tool: 1 is a check that failed

    printed = " ".join(line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert re.search(said, printed)
    assert not (tmp_path / "out").exists()


def test_a_forgotten_photograph_is_asked_for_where_validation_data_are_not_there(saved, tmp_path, capsys):
    gone = f"data.val=[{{type: folder, root: {tmp_path / 'gone'}, images: '*.jpg'}}]"
    assert drawn(saved, gone, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "or name a photograph, for without one" in error and "data.val.0.root=DIR" in error
    assert drawn(saved, gone, "--mode", "compare", "--output", tmp_path / "out") == 2
    assert "name a photograph" not in capsys.readouterr().err


def test_predictions_on_photos_come_as_json_and_maps_too(saved, tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    options = ["--json", "--maps", "--no-pictures", "--score", 0]

    assert drawn(saved, tmp_path / "a.png", *options, "--output", tmp_path / "out") == 0

    result = Predictor(open_model(saved))(NOISE)
    plain = json.loads((tmp_path / "out" / "000_a.json").read_text())
    assert plain["size"] == [50, 70] and len(plain["boxes"]) == len(result.boxes)
    classes = cv2.imread(str(tmp_path / "out" / "000_a_segmentation.png"), cv2.IMREAD_UNCHANGED)
    depth = cv2.imread(str(tmp_path / "out" / "000_a_depth.png"), cv2.IMREAD_UNCHANGED)
    assert (classes == result.segmentation).all()
    assert depth.dtype == np.uint16 and np.abs(depth / 1000 - result.depth_m).max() <= 0.0005 + 1e-6
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_depth_beyond_65_metres_is_not_cut_off_in_files_of_16_bits(saved, tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    far = ["tasks.depth.min_depth_m=70", "tasks.depth.max_depth_m=100", "--maps", "--no-pictures"]
    assert drawn(saved, tmp_path / "a.png", *far, "--output", tmp_path / "out") == 0
    depth = cv2.imread(str(tmp_path / "out" / "000_a_depth.png"), cv2.IMREAD_UNCHANGED)
    assert (depth >= 70 * 256).all() and (depth <= 100 * 256).all()
    farther = ["tasks.depth.min_depth_m=70", "tasks.depth.max_depth_m=300", "--no-pictures"]
    assert drawn(saved, tmp_path / "a.png", *farther, "--maps", "--output", tmp_path / "none") == 2
    assert drawn(saved, tmp_path / "a.png", *farther, "--json", "--output", tmp_path / "json") == 0


def test_a_file_name_that_is_no_utf8_is_written_as_json_escapes_it(saved, tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "\udcff.png")
    assert drawn(saved, tmp_path, "--json", "--no-pictures", "--output", tmp_path / "out") == 0
    (file,) = (tmp_path / "out").iterdir()
    assert json.loads(file.read_text(encoding="utf-8"))["source"] == str(tmp_path / "\udcff.png")


def test_a_video_that_ends_early_is_an_error_and_what_can_be_read_is_drawn(saved, tmp_path, capsys):
    video = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (64, 48))
    for number in range(20):
        video.write(np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8))
    video.release()
    content = (tmp_path / "v.avi").read_bytes()
    (tmp_path / "v.avi").write_bytes(content[: len(content) // 2])
    assert drawn(saved, tmp_path / "v.avi", "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "says it has 20 frames, and" in said and "v.avi after frame" in said.splitlines()[-1]
    assert (tmp_path / "out" / "v.mp4").stat().st_size > 0


def test_a_video_without_frames_is_told_of_however_it_is_read(saved, tmp_path, capfd):
    video = cv2.VideoWriter(str(tmp_path / "e.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (64, 48))
    video.release()
    assert drawn(saved, tmp_path / "e.avi", "--json", "--no-pictures", "--output", tmp_path / "out") == 2
    assert "no frame that can be read" in capfd.readouterr().err or not (tmp_path / "e.avi").exists()
    with pytest.raises(ValueError, match=r"o\.webm is to be a video; \.mp4 .* can be written; choose such an ending"):
        write_video(tmp_path / "o.webm", [], 10.0)


def test_an_overlay_has_the_size_of_the_photo_above_its_legend(saved, tmp_path, monkeypatch):
    Image.fromarray(np.tile(NOISE, (8, 8, 1))).save(tmp_path / "a.png")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{tmp_path / 'a.png'}\n\n"))

    assert drawn(saved, "-", "--layout", "overlay", "--output", tmp_path / "out.png") == 0

    picture = read_image(tmp_path / "out.png")
    assert picture.shape[1] == 560 and 400 < picture.shape[0] < 600


def test_the_worst_images_come_first_and_say_how_bad_they_are(saved, tmp_path, capsys, monkeypatch):
    titles = []
    monkeypatch.setattr(panels.draw, "compare", lambda rows, cell_px: titles.append(rows[0][0][0]) or NOISE)

    assert drawn(saved, "--worst", 2, "--by", "depth/mae_m", "--output", tmp_path / "worst") == 0
    assert drawn(saved, "--best", 3, "--by", "depth/mae_m", "--output", tmp_path / "best") == 0

    values = [float(title.removeprefix("image, mae_m ")) for title in titles if title.startswith("image, ")]
    assert values[0] > values[1] and values[2:] == [*sorted(values[2:])] and values[2:][::-1][:2] == values[:2]


def test_damaged_files_are_listed_at_the_end(saved, tmp_path, capsys):
    names = ["bad.png", "good.png", "worse.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(b"no picture")
    Image.fromarray(NOISE).save(tmp_path / "good.png")

    assert drawn(saved, tmp_path, "--tasks", "depth", "--output", tmp_path / "out") == 2

    ends = capsys.readouterr().err.splitlines()[-3:]
    assert ends == ["not drawn, 2 of the inputs:", f"  {tmp_path / 'bad.png'}", f"  {tmp_path / 'worse.jpg'}"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["a.png", "--worst", "3"], "--worst would have no effect with mode predict"),
        (["a.png", "--no-pictures"], "--no-pictures alone would write nothing"),
        (["--by", "depth"], "--by would have no effect without --worst N or --best N"),
        (["--worst", "2", "--by", "depth/images"], "'images' is no metric of depth .* allowed are abs_rel"),
        (["--mode", "data", "--score", "0.4"], "--score would have no effect with mode data"),
        (["--mode", "data", "--device", "cpu"], "--device would have no effect with mode data"),
        (["a.png", "--maps", "--no-pictures", "--score", "0.5"], "--score would have no effect .* without pictures"),
        (["--tasks", ","], "there is no task ''; this run has detection"),
        (["a.mp4", "--maps"], "--maps writes files for each image, and a.mp4 is a video"),
    ],
)
def test_options_without_effect_are_refused(saved, tmp_path, capsys, options, said):
    assert drawn(saved, *options, "--output", tmp_path / "out") == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_range_of_depth_that_an_overlay_does_not_show_is_refused(saved, tmp_path, capsys):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    options = ["--layout", "overlay", "--depth-range", "1:5", "--output", tmp_path / "out"]
    assert drawn(saved, tmp_path / "a.png", *options) == 2
    assert "--depth-range would have no effect in an overlay of detection" in capsys.readouterr().err
    assert drawn(saved, tmp_path / "a.png", "--tasks", "depth", *options) == 0


@pytest.mark.parametrize(
    ("tasks", "option", "label"),
    [("depth", ["--score", "0.3"], "boxes"), ("detection", ["--depth-range", "1:5"], "depth_m")],
)
def test_options_of_a_task_that_is_left_out_are_refused(saved, tmp_path, capsys, tasks, option, label):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    assert drawn(saved, tmp_path / "a.png", "--tasks", tasks, *option, "--output", tmp_path / "out") == 2
    assert f"{option[0]} would have no effect: it is for {label}, which no task here" in capsys.readouterr().err


def test_depth_alone_has_the_colours_of_its_task_in_an_overlay(opened):
    predictor = Predictor(opened)
    result = predictor(NOISE, tasks=["depth"])
    task, value = result.tasks["depth"], result.predictions["depth"]
    overlay = panels.draw_overlay(result.spaces, NOISE, result.predictions, tasks=result.tasks)
    size = canvas.enlarge(NOISE).shape[:2]
    expected = task.draw(canvas.enlarge(NOISE), draw.scaled(value, NOISE.shape[:2], size), None, panels.DEFAULTS)
    np.testing.assert_array_equal(overlay, expected)


def test_a_video_that_does_not_fit_on_the_disk_is_told_and_removed(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    frames = np.random.default_rng(0).integers(0, 256, (8, 96, 128, 3), np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ValueError, match=r"clip.mp4 holds 0 of 8 frames and is removed; room for the whole"):
            write_video(tmp_path / "clip.mp4", frames, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_what_was_recorded_before_a_stop_stays(tmp_path):
    def frames():
        yield from np.random.default_rng(0).integers(0, 256, (8, 96, 128, 3), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "clip.mp4", frames(), 10)
    assert count_frames(str(tmp_path / "clip.mp4")) == 8


@pytest.mark.parametrize("rate", [0, 0.001, 65536, float("nan")])
def test_a_rate_that_mpeg_4_does_not_hold_is_refused(tmp_path, rate):
    with pytest.raises(ValueError, match=r"MPEG-4 holds 0\.01 to 1000; choose such a rate"):
        write_video(tmp_path / "clip.mp4", [NOISE], rate)


def test_a_picture_that_its_format_cannot_hold_leaves_no_file(tmp_path):
    wide = Image.new("RGB", (17_000, 2))
    with pytest.raises(ValueError, match=r"cannot hold this picture of 17000x2 pixels .* choose \.png"):
        save_picture(tmp_path / "a.webp", wide)
    assert not list(tmp_path.iterdir())
    assert save_picture(tmp_path / "a.png", wide).exists()


def test_a_glob_names_images_and_videos(saved, tmp_path):
    folder = tmp_path / "in"
    for name in ("b.avi", "a.avi"):
        write_clip(folder / name, 2)
    Image.fromarray(NOISE).save(folder / "c.png")

    assert drawn(saved, folder / "*.avi", "--num", 1, "--tasks", "depth", "--output", tmp_path / "clips") == 0
    assert sorted(file.name for file in (tmp_path / "clips").iterdir()) == ["a.mp4", "b.mp4"]
    assert drawn(saved, folder / "*", "--num", 1, "--tasks", "depth", "--output", tmp_path / "all") == 0
    assert sorted(file.name for file in (tmp_path / "all").iterdir()) == ["000_c.png", "a.mp4", "b.mp4"]


@pytest.mark.skipif(sys.platform == "win32", reason="a drive's letter stands before a colon there")
def test_a_video_with_a_colon_in_its_name_is_a_file(saved, tmp_path, monkeypatch):
    write_clip(tmp_path / "plain.avi", 2)
    (tmp_path / "plain.avi").rename(tmp_path / "x:y.avi")
    monkeypatch.chdir(tmp_path)

    assert drawn(saved, "x:y.avi", "--tasks", "depth", "--output", "z:out.mp4") == 0
    assert count_frames("x:y.avi") == count_frames("z:out.mp4") == 2


def test_names_on_standard_input_keep_their_spaces(saved, tmp_path, monkeypatch):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / " a ")
    monkeypatch.setattr("sys.stdin", io.StringIO(" a \r\n"))
    monkeypatch.chdir(tmp_path)
    assert drawn(saved, "-", "--tasks", "depth", "--output", tmp_path / "out") == 0
