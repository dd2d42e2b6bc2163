"""The cache on disk gives the batches that decoding gives, is written once, and anew when anything changed."""

import os
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scene_run
import torch
import write_nyuv2
from drawn_layouts import LAYOUTS
from PIL import Image

from visionmtl.data import bad_files
from visionmtl.data.bad_files import BadFiles, UnreadableSample
from visionmtl.data.cache import decoded as data_cache
from visionmtl.data.cache.decoded import with_cache
from visionmtl.data.cache.packed import SampleStore, pack, to_parts
from visionmtl.data.label_spaces import resolve_spaces
from visionmtl.data.loader import Data, train_loader
from visionmtl.data.transforms.augment import Augment
from visionmtl.datasets import NamedDataset, open_datasets
from visionmtl.engine.trainer import train
from visionmtl.io.index import CacheError, locked
from visionmtl.structures import LABEL_FIELDS, Boxes, Sample
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection
from visionmtl.tasks.normals import Normals
from visionmtl.tasks.segmentation import Segmentation

TASKS = {"detection": Detection(), "segmentation": Segmentation(), "normals": Normals()}
TASKS["depth"] = Depth(virtual_normal_weight=1.0)  # which reads the camera, too
FIELDS = set(LABEL_FIELDS)
SIZE = (64, 96)


def scenes(folder: Path, **settings):
    """Data of five drawn scenes, and where its cache is to lie."""
    spec = {"type": "scenes", "num_images": 5, "size": (80, 100), **settings}
    augment = Augment(zoom=(0.7, 1.5), flip=0.5, brightness=0.3)
    return Data(train=[spec], val=[spec], size=SIZE, augment=augment, workers=0, cache=folder)


def cached(data: Data, fields=FIELDS, max_zoom: float | None = None):
    zoom = data.augment.largest_zoom if max_zoom is None else max_zoom
    return with_cache(open_datasets(data.train), data.train, data.cache, fields, data.size, zoom, workers=0)


def batches(data: Data, sources, tasks=TASKS):
    return list(scene_run.epoch(train_loader(data, tasks, resolve_spaces(tasks, sources), sources, 2, 0)))


def samples_file(folder: Path) -> Path:
    return next(folder.glob("*/samples.bin"))


def test_batches_are_those_without_a_cache_bit_for_bit(tmp_path):
    data = scenes(tmp_path)
    for one, other in zip(batches(data, open_datasets(data.train)), batches(data, cached(data)), strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.color, other.color)
        for task, targets in one.targets.items():
            assert torch.equal(one.labelled[task], other.labelled[task])
            assert all(torch.equal(values, other.targets[task][name]) for name, values in targets.items())


@pytest.mark.parametrize("values", [200, 40_000, 100_000])
def test_depth_comes_back_bit_for_bit_in_as_few_bits_as_it_needs(tmp_path, values):
    rng = np.random.default_rng(0)
    depth = rng.permutation(np.arange(400 * 300) % values).reshape(400, 300).astype(np.float32) * np.float32(0.00137)
    depth[0, :3] = 0, -0.0, np.nan
    sample = Sample(image=np.zeros((400, 300, 3), np.uint8), image_id="ä/1", depth_m=depth)
    parts = to_parts(sample)
    pack(tmp_path, [(parts, (400, 300), 1)], {})

    assert parts["depth_m"].dtype == {200: np.uint8, 40_000: np.uint16, 100_000: np.float32}[values]
    back = SampleStore(tmp_path).read(0, frozenset({"depth_m"}))
    assert back.depth_m.tobytes() == depth.tobytes() and back.image_id == "ä/1"


def test_labels_that_are_missing_or_empty_come_back_so(tmp_path):
    none = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_), np.zeros(0, np.float32))
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    for boxes in (None, none):
        (tmp_path / str(boxes is None)).mkdir()
        sample = Sample(image=image, image_id="a", boxes=boxes)
        pack(tmp_path / str(boxes is None), [(to_parts(sample), (4, 5), 1)], {})
    empty = SampleStore(tmp_path / "False").read(0, frozenset(LABEL_FIELDS))
    absent = SampleStore(tmp_path / "True").read(0, frozenset(LABEL_FIELDS))

    assert empty.boxes.xyxy.shape == (0, 4) and empty.boxes.labels.dtype == np.int64 and absent.boxes is None
    assert empty.segmentation is None and empty.depth_m is None and (empty.image == image).all()


def test_a_cache_is_written_once_and_says_where_it_lies(tmp_path, capsys):
    data = scenes(tmp_path)
    first, again = cached(data)[0], cached(data)[0]
    printed = capsys.readouterr().out.replace("\n", "")

    assert printed.count("writing the cache of scenes: about 0.00 GB") == 1 and printed.count("packed 5 of 5") == 1
    assert first.reader.packed.folder == again.reader.packed.folder
    assert any("read from" in note for note in again.notes)
    fewer = cached(data, {"boxes"})[0]
    assert fewer.reader.packed.folder == first.reader.packed.folder and set(fewer.provides) == {"boxes"}
    assert cached(scenes(tmp_path, seed=1))[0].reader.packed.folder != first.reader.packed.folder


def test_images_are_kept_as_large_as_the_largest_zoom_needs_them(tmp_path):
    data = scenes(tmp_path, size=(160, 200)).model_copy(update={"size": (32, 48)})
    small = cached(data, max_zoom=1.0)[0].reader.packed  # the view is a fifth: a quarter of the image is enough
    assert small.sizes.tolist() == [[160, 200, 4]] * 5
    assert small.read(0, frozenset()).image.shape == (40, 50, 3)
    large = cached(data, max_zoom=2.0)[0].reader.packed
    assert large.sizes[0].tolist() == [160, 200, 2] and large.folder != small.folder
    assert cached(data, max_zoom=1.0)[0].reader.packed.folder == small.folder  # both hold enough

    data = data.model_copy(update={"augment": Augment(zoom=(0.4, 1.0), flip=0.5)})
    pairs = zip(batches(data, open_datasets(data.train)), batches(data, cached(data)), strict=True)
    for one, other in pairs:
        # averaged twice instead of once, which changes pictures by 1 to 4 levels (`data_cache`)
        assert (one.image.int() - other.image.int()).abs().float().mean() < 4
        assert torch.equal(one.targets["segmentation"]["classes"], other.targets["segmentation"]["classes"])


def test_views_that_are_left_whole_need_more_than_the_largest_zoom_below_1(tmp_path):
    data = scenes(tmp_path, size=(256, 384))
    data = data.model_copy(update={"augment": Augment(zoom=(0.4, 0.5), whole=0.5)})

    assert len(batches(data, cached(data))) == 2


def test_a_reader_in_another_process_maps_the_same_file(tmp_path):
    source = cached(scenes(tmp_path))[0]
    sent = pickle.dumps(source)
    assert len(sent) < 5_000
    assert (pickle.loads(sent).reader.packed.read(3, frozenset()).image == source.reader.read(3).image).all()


def test_of_a_damaged_sample_the_data_set_is_read_and_it_is_told(tmp_path):
    data = scenes(tmp_path)
    cached(data)
    content = bytearray(samples_file(tmp_path).read_bytes())
    content[len(content) // 2] ^= 1
    samples_file(tmp_path).write_bytes(content)
    expected = batches(data, open_datasets(data.train))
    with pytest.warns(
        UserWarning, match=r"samples.bin is damaged: sample 2 .* delete .* until then the sample is read"
    ):
        found = batches(data, cached(data))
    assert all(torch.equal(one.image, other.image) for one, other in zip(expected, found, strict=True))


def test_a_file_cut_short_is_found_at_the_start_and_written_anew(tmp_path, capsys):
    cached(scenes(tmp_path))
    size = samples_file(tmp_path).stat().st_size
    os.truncate(samples_file(tmp_path), 1000)
    cached(scenes(tmp_path))
    assert samples_file(tmp_path).stat().st_size == size
    said = told(capsys).replace(" ", "")  # a terminal breaks lines anywhere
    assert f"samples.binismissingorhasanothersizethanthe{size}bytes" in said


def told(capsys) -> str:
    """What was said on the error stream, on one line."""
    return capsys.readouterr().err.replace("\n", " ")


def test_a_damaged_index_never_gives_another_sample(tmp_path):
    """Bits, bytes and lengths of every file of the index: told, written anew, and the samples are those before."""
    data, rng = scenes(tmp_path), np.random.default_rng(0)
    store = cached(data)[0].reader.packed
    sound = [store.read(index, frozenset({"boxes"})) for index in range(5)]
    for number, file in enumerate(sorted((store.folder / "index").iterdir()) * 4):
        content = bytearray(file.read_bytes())
        at = int(rng.integers(len(content)))
        if number % 4 == 0:
            del content[at:]
        elif number % 4 == 1:
            content += b"more"
        else:
            content[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
        with pytest.raises(
            CacheError, match=r"the index .* is damaged, [\w.]+: .*; every byte must be as written; del"
        ):
            SampleStore(store.folder)
        if number in (0, 7):
            found = cached(data)[0].reader.packed
            for index, one in enumerate(sound):
                other = found.read(index, frozenset({"boxes"}))
                assert (one.image == other.image).all() and (one.boxes.xyxy == other.boxes.xyxy).all()
            found.folder.rename(store.folder)
        else:
            shutil.rmtree(store.folder)
            cached(data)[0].reader.packed.folder.rename(store.folder)


def nyuv2(folder: Path):
    """Data of drawn files in NYUv2's prepared layout."""
    write_nyuv2.write_prepared(folder / "data", write_nyuv2.drawn_frames(4))
    spec = {"type": "nyuv2", "root": str(folder / "data")}
    return Data(train=[spec], val=[spec], size=(16, 24), cache=folder / "cache")


def test_a_changed_data_set_is_named_and_written_anew(tmp_path, capsys):
    data = nyuv2(tmp_path)
    fields = {"boxes", "segmentation", "depth_m"}
    before = cached(data, fields)[0]
    file = Path(before.file(2))
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(file)
    after = cached(data, fields)[0]
    what = "nyuv2 is no longer what it was made from: files of 1 of 4 images, or of their labels, changed, first of "
    assert squeezed(f"{what}{file}") in squeezed(told(capsys)) and not before.reader.packed.folder.exists()
    assert not after.reader.packed.read(2, frozenset()).image.any()


def squeezed(text: str) -> str:
    """Without the spaces at which a terminal breaks lines."""
    return "".join(text.split())


def test_a_changed_label_is_named_and_written_anew(tmp_path, capsys):
    data = nyuv2(tmp_path)
    fields = {"boxes", "segmentation", "depth_m"}
    image = Path(cached(data, fields)[0].file(3))
    label = tmp_path / "data" / "seg13" / "train" / f"{image.stem}.png"
    Image.fromarray(np.ones((24, 32), np.uint8)).save(label)
    assert (cached(data, fields)[0].reader.packed.read(3, frozenset(fields)).segmentation == 0).all()
    assert squeezed(f"of their labels, changed, first of {image}") in squeezed(told(capsys))

    before = label.stat()
    Image.fromarray(np.full((24, 32), 2, np.uint8)).save(label)
    content = label.read_bytes().ljust(before.st_size, b"\0")  # what no date and no size tells
    assert len(content) == before.st_size
    label.write_bytes(content)
    os.utime(label, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (cached(data, fields)[0].reader.packed.read(3, frozenset(fields)).segmentation == 1).all()
    assert squeezed(f"sample 3 ({image}) reads otherwise now") in squeezed(told(capsys))


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_every_reader_knows_the_files_that_make_a_sample(name: str, tmp_path):
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    source = NamedDataset(name, layout.open(tmp_path))
    known = {Path(str(source.file(layout.index))), *source.label_files(layout.index)}
    not_read = {"coco": {"stuff"}, "nyuv2_mat": {"names", "coarse"}}.get(name, set())  # or only for names of classes
    others = {"list", *not_read}
    assert {tmp_path / file for what, file in layout.files.items() if what not in others} <= known


def test_a_label_of_the_same_length_and_an_older_date_than_its_image_is_seen(tmp_path):
    data = nyuv2(tmp_path)
    fields = {"depth_m"}
    source = cached(data, fields)[0]
    label = next(file for file in source.reader.reader.label_files(1) if "depth" in str(file))
    os.utime(label, ns=(0, label.stat().st_mtime_ns // 2))
    assert cached(data, fields)[0].reader.packed.folder != source.reader.packed.folder


def test_images_that_cannot_be_read_are_told_not_kept_and_left_out_as_without_a_cache(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bad_files, "FIRST_PAUSE_S", 0.01)
    data = nyuv2(tmp_path).model_copy(update={"bad_files": BadFiles(limit=0.3)})
    sources, tasks = open_datasets(data.train), {"depth": Depth()}
    damaged = Path(sources[0].file(2))
    damaged.write_bytes(damaged.read_bytes()[:-50])

    def opened(limit: float):
        return with_cache(
            sources, data.train, data.cache, {"depth_m"}, data.size, 1.0, 0, BadFiles(limit=limit, retries=1)
        )

    with pytest.raises(UnreadableSample, match=damaged.name):
        opened(0.2)  # of four images that is none
    other = Path(sources[0].file(0))
    whole = other.read_bytes()
    other.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=rf"2 of 4 images.*{damaged.name}.*limit 0.3 allows 1; mend"):
        opened(0.3)
    other.write_bytes(whole)
    assert not list(data.cache.glob("*/index"))

    kept = opened(0.3)
    assert squeezed(f"1 images of {kept[0].name} cannot be read and are not in the cache") in squeezed(told(capsys))
    assert opened(0.3)[0].reader.packed.folder == kept[0].reader.packed.folder, "and found again"
    spaces = resolve_spaces(tasks, sources)

    def epoch(sources):
        return list(scene_run.epoch(train_loader(data, tasks, spaces, sources, 2, 0, leave_out_bad_files=True)))

    for one, two in zip(epoch(sources), epoch(kept), strict=True):
        assert torch.equal(one.image, two.image) and torch.equal(one.labelled["depth"], two.labelled["depth"])
        assert one.bad_files == two.bad_files
    assert [bad.index for batch in epoch(kept) for bad in batch.bad_files] == [2]


def test_an_edited_annotation_file_is_named(tmp_path, capsys):
    data, fields = nyuv2(tmp_path), {"boxes"}
    source = cached(data, fields)[0]
    annotations = next(file for file in source.reader.reader.label_files(0) if file.suffix == ".json")
    annotations.write_text(annotations.read_text() + " ")
    cached(data, fields)
    assert squeezed("files of 4 of 4 images, or of their labels, changed") in squeezed(told(capsys))


def test_a_disk_that_is_too_small_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ValueError, match=r"takes about 0.0 GB, but .* has 0.0 GB free; .* choose another data.cache"):
        cached(scenes(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()] and not list(tmp_path.glob(".*"))


def test_what_a_stopped_writer_left_is_removed_and_written_anew(tmp_path, monkeypatch):
    data = scenes(tmp_path)
    whole = data_cache._Packing.__getitem__
    monkeypatch.setattr(data_cache._Packing, "__getitem__", lambda self, i: whole(self, i) if i != 3 else exit(1))
    with pytest.raises(SystemExit):
        cached(data)
    assert not [path for path in tmp_path.glob("scenes*") if path.is_dir()]
    monkeypatch.undo()
    left = tmp_path / f".{next(tmp_path.glob('*.lock')).stem}-killed"  # a process that is killed removes nothing
    left.mkdir()
    assert len(cached(data)[0]) == 5 and not left.exists()


def test_of_several_that_start_at_once_one_writes_and_the_others_wait(tmp_path, capsys):
    data, start = scenes(tmp_path), threading.Barrier(3)

    def open_one(_) -> Path:
        start.wait()
        return cached(data)[0].reader.packed.folder

    with ThreadPoolExecutor(3) as pool:  # the lock belongs to the opened file: threads exclude each other as processes
        found = set(pool.map(open_one, range(3)))
    assert len(found) == 1 and len(list(tmp_path.glob("*/samples.bin"))) == 1
    assert capsys.readouterr().out.count("another process writes the cache of scenes") == 2


def test_a_lock_ends_with_the_process_that_held_it(tmp_path):
    hold = "import sys, visionmtl.io.index as f; held = f.locked(f.Path(sys.argv[1])); held.__enter__()"
    command = [sys.executable, "-c", f"{hold}; print('held', flush=True); input()", str(tmp_path / "a.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        waits = []
        with locked(tmp_path / "a.lock", lambda: (waits.append(1), process.kill())):
            assert waits == [1]


def test_a_run_computes_the_same_from_the_cache_when_it_is_written_and_when_it_is_found(tmp_path):
    rows = []
    for number, cache in enumerate((None, tmp_path / "cache", tmp_path / "cache")):
        train(scene_run.run(tmp_path / str(number), names=("segmentation",), data={"cache": cache and str(cache)}))
        rows.append(scene_run.rows(tmp_path / str(number)))
    assert rows[0] == rows[1] == rows[2] != []
