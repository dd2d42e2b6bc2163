"""Images that are not RGB: every channel is read, scaled by what is declared, trained on, drawn in part and said so."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

import visionmtl
from visionmtl.cli import main
from visionmtl.data.check.sheet import draw_sheet
from visionmtl.data.check.survey import open_data_sets, plan, read_all
from visionmtl.data.transforms.crop_resize import CropParams, CropResize
from visionmtl.datasets import Dataset
from visionmtl.io.channels import read_channels
from visionmtl.io.images import read_photo
from visionmtl.modeling.encoder import Encoder
from visionmtl.run import load, load_data
from visionmtl.structures import as_rgb, channels_shown

H, W = 64, 96


def bands(seed: int, channels: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 10_000, (H, W, channels)).astype(np.uint16)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four RGB images with depth in millimetres beside them, the same as .npy of five bands, and label maps."""
    for folder in ("rgb", "depth", "bands", "labels"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        rgb = np.random.default_rng(number).integers(0, 256, (H, W, 3), dtype=np.uint8)
        Image.fromarray(rgb).save(tmp_path / f"rgb/{number}.png")
        depth = (np.indices((H, W))[1] * 100).astype(np.uint16)
        Image.fromarray(depth).save(tmp_path / f"depth/{number}.png")
        np.save(tmp_path / f"bands/{number}.npy", bands(number))
        Image.fromarray((np.indices((H, W))[0] // 32).astype(np.uint8)).save(tmp_path / f"labels/{number}.png")
    return tmp_path


def settings(root: Path, **more: Any) -> dict[str, Any]:
    labels = {"files": "labels/{stem}.png", "classes": ["far", "near"]}
    return {"type": "folder", "root": str(root), "images": "rgb/*.png", "segmentation": labels, **more}


def open_folder(root: Path, **more: Any) -> Any:
    return TypeAdapter(Dataset).validate_python(settings(root, **more)).build()


RGBD = {"channels": 4, "more_channels": [{"files": "depth/{stem}.png", "range": [0, 5000]}]}
BANDS = {"images": "bands/*.npy", "channels": 5, "image_range": [0, 10_000]}


def test_depth_becomes_a_fourth_channel(root):
    reader = open_folder(root, **RGBD)
    image, rgb = reader.read(1).image, np.asarray(Image.open(root / "rgb/1.png"))
    assert image.shape == (H, W, 4) and image.dtype == np.uint8 and reader.channels == 4
    np.testing.assert_array_equal(image[..., :3], rgb)
    # 0 mm, 2500 mm and 5000 mm and beyond, of a range of 0 to 5000
    assert image[0, [0, 25, 50, 60], 3].tolist() == [0, 128, 255, 255]
    assert root / "depth/1.png" in reader.label_files(1)
    assert any("images have 4 channels, at 8 bits each; values of 0 to 5000 become 0 to 255" in n for n in reader.notes)


@pytest.mark.parametrize("planar", ["npy", "pixel", "plane", "pages"])
def test_every_band_is_read(root, planar):
    values = bands(0)
    if planar != "npy":
        tifffile = pytest.importorskip("tifffile")
        (root / "bands/0.npy").unlink()
        options: dict[str, Any] = {"photometric": "minisblack"}
        if planar != "pages":
            options["planarconfig"] = "contig" if planar == "pixel" else "separate"
        stored = values if planar == "pixel" else values.transpose(2, 0, 1)
        tifffile.imwrite(root / "bands/0.tif", stored, **options)
    reader = open_folder(root, **{**BANDS, "images": "bands/0.*"})
    expected = np.rint(values / 10_000 * 255)
    assert np.abs(reader.read(0).image - expected).max() <= 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({**BANDS, "image_range": None}, r"bands/0.npy is uint16, .* set image_range: \[LOW, HIGH\]"),
        ({**BANDS, "channels": 4}, r"bands/0.npy has 5 channels \(5 of .*\), and `channels` is 4"),
        ({"channels": 4}, r"rgb/0.png has 3 channels .*`channels` is 4"),
        ({**RGBD, "more_channels": [{"files": "depth/{stem}.png"}]}, "depth/0.png is uint16, .*more_channels.0.range"),
    ],
)
def test_channels_that_do_not_add_up_are_named(root, more, message):
    with pytest.raises(ValueError, match=message):
        open_folder(root, **more).read(0)


def test_more_channels_need_their_files_and_a_number(root):
    (root / "depth/2.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 files listed in more_channels\[0\].*depth/2.png"):
        open_folder(root, **RGBD)
    with pytest.raises(ValidationError, match="channels is 1, but more_channels are 1 files"):
        open_folder(root, **{**RGBD, "channels": 1})
    with pytest.raises(ValidationError, match=r"range is \[5.0, 5.0\]"):
        open_folder(root, channels=4, more_channels=[{"files": "depth/{stem}.png", "range": [5, 5]}])


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("kind", ["five", "nir", "pages"])
def test_a_photograph_of_other_channels_is_refused_not_cut(tmp_path, upright, kind):
    tifffile = pytest.importorskip("tifffile")
    file = tmp_path / "a.tif"
    values = np.zeros((H, W, 5 if kind == "five" else 4), np.uint8)
    if kind == "pages":
        tifffile.imwrite(file, values.transpose(2, 0, 1), photometric="minisblack")
    elif kind == "nir":
        tifffile.imwrite(file, values, photometric="rgb", extrasamples=["unspecified"])
    else:
        tifffile.imwrite(file, values, photometric="minisblack", planarconfig="contig")
    with pytest.raises(
        ValueError, match=r"a.tif .*none is left out or mixed in silence; in a `folder`, set `channels`"
    ):
        read_photo(file, upright=upright)
    tifffile.imwrite(file, values[..., :3], photometric="rgb")
    assert read_photo(file, upright=upright)[0].shape == (H, W, 3)


def test_an_alpha_channel_is_said(root):
    rgba = np.full((H, W, 4), 255, np.uint8)
    for number in range(4):
        Image.fromarray(rgba).save(root / f"rgb/{number}.png")
    assert any("images have an alpha channel" in note and "set channels: 4" in note for note in open_folder(root).notes)
    assert open_folder(root, channels=4).read(0).image.shape == (H, W, 4)


def test_a_turned_image_of_one_channel_is_refused_unless_read_as_stored(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(4):
        Image.fromarray(np.zeros((H, W), np.uint8)).save(root / f"rgb/{number}.png", exif=exif)
    with pytest.raises(ValueError, match=r"0.png has an EXIF orientation, .* set upright: false"):
        open_folder(root, channels=1).read(0)
    assert open_folder(root, channels=1, upright=False).read(0).image.shape == (H, W, 1)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_views_keep_every_channel(channels):
    image = bands(3, channels).astype(np.uint8)
    for zoom, mirrored in ((0.5, True), (2.0, True), (1.0, True), (1.0, False)):
        params = CropParams(zoom, 0.3, 0.2, mirrored)
        whole = CropResize.cut((H, W), (H, W), params).image(image)
        one_by_one = [CropResize.cut((H, W), (H, W), params).image(image[..., k : k + 1]) for k in range(channels)]
        np.testing.assert_array_equal(whole, np.concatenate(one_by_one, axis=2))


def test_what_is_shown_of_channels():
    image = bands(0).astype(np.uint8)
    np.testing.assert_array_equal(as_rgb(image), image[..., :3])
    assert as_rgb(image[..., :2])[0, 0].tolist() == [image[0, 0, 0]] * 3
    assert [channels_shown(count) for count in (1, 3, 5)] == ["channel 1 of 1", "", "channels 1 to 3 of 5"]


def test_timm_adapts_pretrained_weights_and_means_are_asked_for(tmp_path):
    torch.manual_seed(0)
    rgb = timm.create_model("test_resnet")
    torch.save(rgb.state_dict(), tmp_path / "rgb.pth")
    more = {"in_chans": 4, "mean": (0.4, 0.4, 0.4, 0.1), "std": (0.2,) * 4}
    built = Encoder(name="test_resnet", checkpoint=tmp_path / "rgb.pth", **more).build()
    first, expected = (next(v for v in net.state_dict().values() if v.ndim == 4) for net in (built.body, rgb))
    torch.testing.assert_close(first, timm.models.adapt_input_conv(4, expected))
    assert built.mean == (0.4, 0.4, 0.4, 0.1)
    with pytest.raises(
        ValidationError, match="in_chans is 4, and mean is not set, which timm knows for RGB alone; 4 values"
    ):
        Encoder(in_chans=4)
    with pytest.raises(ValidationError, match="mean has 3 values, and in_chans is 4"):
        Encoder(**{**more, "mean": (0.5,) * 3})


def config(root: Path, data: dict[str, Any], channels: int) -> Path:
    each = [0.5] * channels
    values = {
        "model": {
            "encoder": {"name": "test_resnet", "in_chans": channels, "mean": each, "std": each},
            "pyramid": {"type": "fpn", "channels": 16},
        },
        "tasks": {"segmentation": {"type": "segmentation", "decoder": {"type": "semantic_fpn", "channels": 16}}},
        "data": {"train": [data], "val": [data], "size": [64, 96], "workers": 0,
                 "augment": {"flip": 0.5, "zoom": [1, 1.3]}},
        "train": {"epochs": 1, "batch_size": 2, "precision": "fp32"},
    }  # fmt: skip
    file = root / "config.json"
    file.write_text(json.dumps(values))
    return file


@pytest.mark.parametrize("more", [RGBD, BANDS], ids=["rgbd", "bands"])
def test_a_network_learns_and_is_evaluated_on_more_channels(root, more, capsys):
    channels = more["channels"]
    file = config(root, settings(root, **more), channels)
    cache = ["data.cache=" + str(root / "cache")] if more is BANDS else []
    assert main(["train", str(file), *cache, "--output", str(root / "run"), "--device", "cpu"]) == 0
    assert main(["eval", str(root / "run"), "--device", "cpu", "--report", str(root / "page.html")]) == 0
    assert "miou" in capsys.readouterr().out
    model = visionmtl.load(root / "run", device="cpu")
    assert model(open_folder(root, **more).read(0).image).segmentation.shape == (H, W)
    with pytest.raises(ValueError, match=rf"uint8 \[H, W, {channels}\], as training read it, is needed"):
        model(np.zeros((H, W, 3), np.uint8))
    assert main(["train", str(file), "data.augment.brightness=0.2", "--dry-run"]) == 2
    assert "changes colours of RGB" in capsys.readouterr().err
    wrong = ["model.encoder.in_chans=3", "model.encoder.mean=null", "model.encoder.std=null"]
    assert main(["train", str(file), *wrong, "--dry-run"]) == 2
    assert f"have {channels} channels, but model.encoder.in_chans is 3" in capsys.readouterr().err


def test_the_check_measures_channels_and_draws_the_first_three(root):
    file = config(root, settings(root, **BANDS), 5)
    checked = open_data_sets(load_data(file))
    plan(checked, None)
    read_all(checked, 0, lambda images: None)
    numbers = checked[0].numbers()
    expected = np.stack([np.rint(bands(k) / 10_000 * 255) for k in range(4)]).reshape(-1, 5) / 255
    np.testing.assert_allclose(numbers["channels"]["mean"], expected.mean(0), atol=1e-3)
    np.testing.assert_allclose(numbers["channels"]["std"], expected.std(0), atol=1e-3)
    assert draw_sheet(checked, []).shape[2] == 3
    assert load(file).model.encoder.in_chans == 5


def test_grey_with_alpha_has_two_channels(tmp_path: Path):
    Image.fromarray(np.dstack([np.full((4, 5), 9, np.uint8), np.full((4, 5), 200, np.uint8)])).save(tmp_path / "a.png")
    values = read_channels(tmp_path / "a.png")
    assert values.shape == (4, 5, 2) and values[0, 0].tolist() == [9, 200]
