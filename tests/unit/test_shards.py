"""Shards: every data set's samples bit for bit, an order that reads shard by shard, and damage that is named."""

import json
import os
import re
import tarfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import write_jpegs
import write_layouts
from contract import SPACE, sample
from drawn_layouts import LAYOUTS
from pydantic import TypeAdapter, ValidationError

from visionmtl.cli import main
from visionmtl.data.cache.decoded import with_cache
from visionmtl.data.sampler import BatchSampler, MixtureSampler
from visionmtl.data.shard_writer import write_shards
from visionmtl.datasets import Dataset, Locality, NamedDataset, read_part
from visionmtl.datasets.shards import Shards, ShardsReader
from visionmtl.datasets.subset import Subset
from visionmtl.io import shards
from visionmtl.io.shards import read_places, to_members, to_sample
from visionmtl.structures import EVERYTHING, LABEL_FIELDS, ReadRequest, Sample

SPEC = TypeAdapter(Dataset)
EVERY_FIELD = frozenset(LABEL_FIELDS)


def written(settings: dict, folder: Path, shard_bytes: int = 20_000) -> tuple[NamedDataset, ShardsReader]:
    """The data set, and what comes back from its shards."""
    spec = SPEC.validate_python(settings)
    source = NamedDataset("it", spec.build())
    write_shards(source, spec, folder, shard_bytes, workers=0)
    return source, Shards(root=str(folder)).build()


def assert_same(one: Sample, other: Sample) -> None:
    """Bit for bit, types included."""
    for name in ("image", "segmentation", "depth_m", "normals", "image_labels"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), name
    assert (one.boxes is None) == (other.boxes is None)
    if one.boxes is not None and other.boxes is not None:
        for name in ("xyxy", "labels", "crowd", "area"):
            a, b = getattr(one.boxes, name), getattr(other.boxes, name)
            assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), name
    for name in ("image_id", "disparity_px_metre", "intrinsics", "size", "jpeg_scale"):
        assert getattr(one, name) == getattr(other, name), name


def settings_of(layout: str, root: Path) -> dict:
    root.mkdir(exist_ok=True)
    if layout == "scenes":
        return {"type": "scenes", "num_images": 3, "size": (48, 64)}
    if layout in ("jpegs", "turned"):
        return write_jpegs.write_jpegs(root, 4, **({"orientation": 6} if layout == "turned" else {}))
    LAYOUTS[layout].write(root)
    return {**LAYOUTS[layout].settings, "root": str(root)}


@pytest.mark.parametrize("layout", [*LAYOUTS, "jpegs", "turned", "scenes"])
def test_samples_of_shards_are_those_of_their_source_bit_for_bit(layout: str, tmp_path: Path):
    if layout == "nyuv2_mat":
        pytest.importorskip("h5py")
    source, reader = written(settings_of(layout, tmp_path / "source"), tmp_path / "shards")

    assert len(reader) == len(source) and reader.provides == source.provides
    for index in range(len(source)):
        assert_same(source.read(index), reader.read(index))
        for divisor in (2, 8):  # as training asks for large images
            request = ReadRequest(EVERY_FIELD, lambda size, divisor=divisor: divisor)
            assert_same(read_part(source.reader, index, request), reader.read_part(index, request))
    image_alone = reader.read_part(0, ReadRequest(frozenset()))
    assert all(getattr(image_alone, name) is None for name in LABEL_FIELDS)


def test_a_sample_without_labels_or_with_empty_ones_or_other_channels_comes_back():
    space = dict.fromkeys(("boxes", "segmentation", "image_labels"), SPACE) | {"depth_m": None, "normals": None}
    whole = sample(1)
    few = replace(sample(2, "boxes", num_boxes=0), image_labels=np.zeros(0, np.int64))
    many_values = np.random.default_rng(0).random((300, 300)).astype(np.float32) + 1
    rough = replace(
        whole, depth_m=many_values, image=np.zeros((300, 300, 5), np.uint8), segmentation=None, normals=None
    )
    for one in (whole, few, rough, sample(3, "depth_m")):
        members = to_members(one, shards.lossless(one.image))
        assert_same(one, to_sample(members, EVERYTHING, space, "it"))
    assert "depth.png" not in to_members(rough, shards.lossless(rough.image))


def test_photographs_keep_their_bytes_and_the_tars_are_webdatasets(tmp_path: Path):
    source, _ = written(settings_of("jpegs", tmp_path / "source"), tmp_path / "shards", shard_bytes=10**9)
    tar = tmp_path / "shards" / "000000.tar"
    with tarfile.open(tar) as opened:
        assert opened.getnames()[:5] == [
            f"000000000.{end}" for end in ("jpg", "json", "segmentation.png", "depth.png", "depth.npy")
        ]
        assert all(member.isreg() and member.mtime == 0 for member in opened)
        photo = opened.extractfile("000000002.jpg")
        assert photo is not None and photo.read() == Path(str(source.file(2))).read_bytes()

    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False).decode())
    assert [one["__key__"] for one in samples] == [f"{i:09d}" for i in range(4)]
    for index, one in enumerate(samples):
        truth = source.read(index)
        assert one["json"]["boxes"]["xyxy"] == truth.boxes.xyxy.tolist()
        codes = shards.decode_png("codes", one["depth.png"]) if isinstance(one["depth.png"], bytes) else None
        if codes is not None:
            np.testing.assert_array_equal(one["depth.npy"][codes], truth.depth_m)


def test_a_stopped_writer_goes_on_where_it_was_and_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = settings_of("jpegs", tmp_path / "source")
    written(settings, tmp_path / "whole")
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == [*(f"{i:06d}.{end}" for i in range(4) for end in ("json", "tar")), "index.json"]

    write, calls = shards.write_shard, []

    def stops(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return write(*args)

    monkeypatch.setattr("visionmtl.data.shard_writer.write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        written(settings, tmp_path / "cut")
    with pytest.raises(ValueError, match=r"found no .*index\.json; it lists the shards"):
        Shards(root=str(tmp_path / "cut")).build()
    before = (tmp_path / "cut" / "000001.tar").stat().st_mtime_ns
    monkeypatch.setattr("visionmtl.data.shard_writer.write_shard", write)

    written(settings, tmp_path / "cut")

    assert (tmp_path / "cut" / "000001.tar").stat().st_mtime_ns == before
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ValueError, match="holds shards of another data set, or of the same with other settings"):
        written(settings, tmp_path / "cut", shard_bytes=50_000)

    (tmp_path / "cut/index.json").unlink()
    changed = next(Path(settings["root"]).rglob("*.jpg"))
    os.utime(changed, ns=(0, 0))  # its content might be another
    with pytest.raises(ValueError, match="or before its files changed"):
        written(settings, tmp_path / "cut")


def _flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("damage", "kept", "told"),
    [
        (lambda folder: [(folder / f"000002.{ending}").unlink() for ending in ("tar", "json")], 2, None),
        (lambda folder: (folder / "000002.tar").unlink(), 2, None),
        (lambda folder: os.truncate(folder / "000001.tar", 700), 1, "000001.tar"),
        (lambda folder: _flip(folder / "000000.tar", 700), 0, "000000.tar"),  # not in the last sample
        (lambda folder: _flip(folder / "000001.tar", -1), 1, "000001.tar"),  # behind the last sample
    ],
)
def test_shards_that_are_missing_or_damaged_are_written_anew(damage, kept, told, finished: bool, tmp_path: Path):
    settings = {"type": "scenes", "num_images": 10, "size": (48, 64)}
    written(settings, tmp_path, 150_000)
    whole = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(whole) >= 7 and len(read_places(tmp_path / "000000.json", 150_000).samples) > 1
    before = [file.stat().st_mtime_ns for file in sorted(tmp_path.glob("*.tar"))]

    damage(tmp_path)
    if not finished:
        (tmp_path / "index.json").unlink()
    with pytest.warns(match=f"{told} or .* both are written anew") if told else nullcontext():
        written(settings, tmp_path, 150_000)

    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == whole
    after = [file.stat().st_mtime_ns for file in sorted(tmp_path.glob("*.tar"))]
    assert [one == other for one, other in zip(before, after, strict=True)].index(False) == kept


def test_places_that_an_index_contradicts_are_written_anew(tmp_path: Path):
    settings, folder = settings_of("jpegs", tmp_path / "source"), tmp_path / "shards"
    written(settings, folder)
    places = folder / "000001.json"
    whole = places.read_text()
    places.write_text(whole.replace('"jpg", 512', '"jpg", 513'))  # no checksum of the tar tells

    with pytest.warns(UserWarning, match=r"000001\.tar or 000001\.json is not as it was written"):
        written(settings, folder)

    assert places.read_text() == whole


def test_a_tar_of_the_users_is_not_written_over(tmp_path: Path):
    settings, mine = settings_of("jpegs", tmp_path / "source"), tmp_path / "shards/000001.tar"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"000001.tar has no 000001.json beside it.*nothing of yours is written over"):
        written(settings, tmp_path / "shards")
    assert mine.read_bytes() == b"mine"
    other = mine.with_name("000000.json")
    mine.rename(mine.with_name("mine.tar"))
    other.write_text("{}")
    with pytest.raises(ValueError, match=r"000000.json has no field 'first'"):
        written(settings, tmp_path / "shards")
    assert other.read_text() == "{}"
    other.unlink()
    last = other.with_name("000009.json")  # behind a gap
    last.write_text('{"first": 0, "made_of": "mine"}')
    with pytest.raises(ValueError, match=r"holds shards of another data set.*nothing is written over"):
        written(settings, tmp_path / "shards")
    assert last.read_text() == '{"first": 0, "made_of": "mine"}'


def test_what_is_damaged_is_named_and_never_read_as_something_else(tmp_path: Path):
    _, reader = written(settings_of("jpegs", tmp_path / "source"), tmp_path / "shards")
    tar = tmp_path / "shards" / "000001.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=r"000001\.tar#000000001 has another checksum than when it was written"):
        reader.read(1)
    tar.unlink()
    with pytest.raises(ValueError, match=r"000001\.tar#000000001 is missing"):
        reader.read(1)
    reader.read(0)

    index = tmp_path / "shards" / "index.json"
    plain = json.loads(index.read_text())
    for keys, value, told in (
        (("version",), 2, "version 2; 'visionmtl shards', version 1 is read"),
        (("provides", "boxes"), None, "provides.boxes is no label of samples, or has not the classes"),
        (("shards", 0, "samples"), 0, "has 0 samples"),
        (("shards", 0, "samples"), 2**60, "samples; 1 to"),
        (("shards", 0, "tar", "sha256"), "../../x", "no length and SHA-256"),
        (("channels",), "3", "a text as 'channels'"),
    ):
        changed = json.loads(json.dumps(plain))
        inner = changed
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        index.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=told):
            Shards(root=str(tmp_path / "shards")).build()

    places = tmp_path / "shards" / "000000.json"
    text = places.read_text()
    for old, new in (('"jpg", 512', '"jpg", 51200000'), ("[[0, ", "[[-1, "), ('"jpg"', "7")):
        places.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match="is no place within its shard"):
            read_places(places, (tmp_path / "shards" / "000000.tar").stat().st_size)


@pytest.mark.parametrize(
    ("ending", "change", "told"),
    [
        ("json", lambda told: told["boxes"].update(labels=[0, 0, 9]), "class number 9 of toy, which has 3 classes"),
        ("json", lambda told: told["boxes"].update(area=[1.0]), "numbers of another kind"),
        ("json", lambda told: told["boxes"].pop("crowd"), "boxes without their four lists"),
        ("json", lambda told: told.pop("image"), "no field 'image.upright'"),
        ("segmentation.png", np.full((50, 96), 3, np.uint8), "class number 3 of toy"),
        (
            "segmentation.png",
            np.full((50, 95), 0, np.uint8),
            r"an array uint8 \[50, 95\] where uint8 \[50, 96\] belongs",
        ),
        ("depth.png", np.full((50, 96), 60_000, np.uint16), "a depth code of 60000 for a table of"),
    ],
)
def test_a_sample_that_visionmtl_would_not_write_is_refused(ending, change, told):
    space = dict.fromkeys(("boxes", "segmentation", "image_labels"), SPACE) | {"depth_m": None, "normals": None}
    one = sample(1)
    members = to_members(one, shards.lossless(one.image))
    if callable(change):
        content = json.loads(members["json"])
        change(content)
        members["json"] = json.dumps(content).encode()
    else:
        members[ending] = shards._png(change)
    with pytest.raises(ValueError, match=told):
        to_sample(members, EVERYTHING, space, "it")


# ---- the order ----

LIES = Locality(np.array([4, 3, 5, 4, 4, 2]), 2)


def test_an_order_reads_shards_together_and_every_sample_once():
    order = LIES.order(np.random.default_rng(0))
    assert sorted(order) == list(range(22))
    runs = LIES.run_of(order).tolist()
    stretches = [set(runs[: runs.index(last) + 1]) for last in runs]
    for run in range(6):  # from its first to its last sample, no more than the window's shards are read
        first, last = runs.index(run), 21 - runs[::-1].index(run)
        assert len(set(runs[first : last + 1])) <= 2, stretches
    assert order.tolist() != LIES.order(np.random.default_rng(1)).tolist()


def test_any_number_of_ranks_and_a_resume_give_the_same_samples_in_the_same_order():
    mixture = MixtureSampler([22, 9], [22 / 31, 9 / 31], None, 3, [LIES, None])
    keys = mixture.keys(1)
    assert sorted(one.index for one in keys) == list(range(31))

    def batches(batch_size, rank=0, world=1, start=0):
        sampler = BatchSampler(mixture, batch_size, rank, world)
        sampler.set_epoch(1, start)
        return list(sampler)

    whole = batches(4)
    of_two = [one + other for one, other in zip(batches(2, 0, 2), batches(2, 1, 2), strict=True)]
    assert whole == of_two and whole[3:] == batches(4, start=3)
    alone = [one.index for one in keys if one.index < 22]
    assert len({*LIES.run_of(np.array(alone[:7]))}) == 2 or len({*LIES.run_of(np.array(alone[:6]))}) == 2


def test_a_subset_keeps_its_shards_together(tmp_path: Path):
    written(settings_of("jpegs", tmp_path / "source"), tmp_path / "shards")
    part = Subset(of=Shards(root=str(tmp_path / "shards"), window=1), part=(0.0, 0.5)).build()
    assert part.locality is not None and part.locality.sizes.tolist() == [1, 1] and part.locality.window == 1


def test_settings_without_effect_are_refused(tmp_path: Path):
    with pytest.raises(ValidationError, match="cache_gb, retries would have no effect, since root /data is a folder"):
        Shards(root="/data", cache_gb=3, retries=2)
    assert Shards(root="s3://bucket/train", cache_gb=3).cache_gb == 3


def test_a_root_is_a_url_in_any_case_and_files_can_lie_below_it():
    assert Shards(root="HTTPS://Host/X", cache_gb=3).root == "https://Host/X"
    assert Shards(root="C://data").root == "C://data", "a drive"
    assert Shards(root="s3://bucket/a?b").root == "s3://bucket/a?b"  # a name as any other
    for root, found in (("http://host/x?token=1", "?"), ("HTTPS://host/x#y", "#")):
        with pytest.raises(ValidationError, match=re.escape(f"has a '{found}', behind which no name of a file can")):
            Shards(root=root)


def test_a_cache_of_decoded_images_follows_its_shards(tmp_path: Path):
    source, _ = written(settings_of("jpegs", tmp_path / "source"), tmp_path / "shards")
    spec = Shards(root=str(tmp_path / "shards"))

    def cached(dataset: NamedDataset | None = None) -> NamedDataset:
        opened = dataset or NamedDataset("it", spec.build())
        return with_cache([opened], [spec], tmp_path / opened.name, EVERY_FIELD, (64, 96), 1.0, workers=0)[0]

    first, of_source = cached(), cached(replace(source, name="other"))
    for index in range(4):
        assert_same(first.read_part(index, EVERYTHING), of_source.read_part(index, EVERYTHING))
    assert cached().reader.packed.folder == first.reader.packed.folder
    os.utime(tmp_path / "shards" / "index.json", (1, 1))
    assert cached().reader.packed.folder != first.reader.packed.folder


# ---- the command, and what reads a data set ----


def test_prepare_writes_the_data_sets_of_a_config_and_what_reads_them(tmp_path: Path, capsys):
    settings = settings_of("jpegs", tmp_path / "source")
    config = tmp_path / "mine.yaml"
    data = {"data": {"train": [{**settings, "weight": 2.0}, {"type": "scenes", "num_images": 3, "size": [48, 64]}],
                     "val": [{**settings, "name": "held_out"}], "size": [64, 96]}}  # fmt: skip
    config.write_text(json.dumps(data))
    target = tmp_path / "shards"

    assert main(["prepare", "shards", str(config), str(target), "data.workers=0", "--workers", "0"]) == 0

    assert "train scenes: 3 images, 1 shard(s), " in capsys.readouterr().out
    assert "weight: 2.0" in (target / "data.yaml").read_text()
    assert Shards(root=str(target / "val" / "held_out")).build().most_boxes == 3
    read = tmp_path / "read.yaml"
    read.write_text((target / "data.yaml").read_text() + "  size: [64, 96]\n")
    assert main(["check_data", str(read), "--workers", "0"]) in (0, 1)
    assert "10 images read" in (out := capsys.readouterr().out) or "7 train + 4 val images read" in out

    write_layouts.coco(tmp_path / "mine")
    of_folder = ["prepare", "shards", str(tmp_path / "mine"), str(tmp_path / "own"), "--workers", "0"]
    assert main([*of_folder, "--split", "val", "--shard-mb", "1"]) == 0
    assert "val folder: 3 images, 1 shard(s)" in capsys.readouterr().out and not (tmp_path / "own" / "train").exists()

    assert main(["prepare", "shards", str(config), str(target)]) == 2
    assert "holds shards already" in capsys.readouterr().err
    assert main([*of_folder, "--split", "train"]) == 2
    told = capsys.readouterr().err
    assert "one for each --split; choose another DST, or delete" in told and not (tmp_path / "own" / "train").exists()
    (target / "data.yaml").unlink()
    for ending in ("tar", "json"):
        (target / "train/scenes" / f"000000.{ending}").unlink()
    assert main(["prepare", "shards", str(config), str(target), "--workers", "0"]) == 0
    assert Shards(root=str(target / "train/scenes")).build().read(2).boxes is not None
    capsys.readouterr()
    (tmp_path / "mine/data.yaml").write_text("names: [cup]\n")
    assert main(["prepare", "shards", str(tmp_path / "mine"), str(tmp_path / "mine")]) == 2
    assert "data.yaml is a file of yours" in capsys.readouterr().err
    assert main(["prepare", "shards", str(tmp_path / "mine"), str(tmp_path / "mine/shards")]) == 2
    assert "whose files it would join; a folder outside of it is needed" in capsys.readouterr().err
    assert not (tmp_path / "mine/shards").exists()
    assert main(["prepare", "nyuv2", str(tmp_path), str(target), "--shard-mb", "3"]) == 2
    assert "--shard-mb has no effect on prepare nyuv2; it is for shards" in capsys.readouterr().err
