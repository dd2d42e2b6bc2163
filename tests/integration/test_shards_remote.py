"""Shards behind a real web server: the same batches, each shard fetched once, and nothing lost when it is killed."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import scene_run
import torch
from pydantic import TypeAdapter
from torch._utils import ExceptionWrapper

from visionmtl.data.label_spaces import resolve_spaces
from visionmtl.data.loader import Data, train_loader, val_loader
from visionmtl.data.shard_writer import write_shards
from visionmtl.data.transforms.augment import Augment
from visionmtl.datasets import Dataset, NamedDataset, open_datasets
from visionmtl.datasets.shards import Shards, ShardsReader
from visionmtl.engine.options import TrainOptions
from visionmtl.engine.trainer import train
from visionmtl.io import remote
from visionmtl.io.remote import RemoteFolder, StoreError
from visionmtl.run import Run
from visionmtl.structures import Batch
from visionmtl.tasks.depth import Depth
from visionmtl.tasks.detection import Detection

pytest.importorskip("aiohttp", reason="needs the extra shards")

TASKS = {"detection": Detection(), "depth": Depth()}
SCENES = {"type": "scenes", "num_images": 16, "size": [48, 64], "labels": ["boxes", "depth_m"]}
SHARD_BYTES = 60_000  # 2 or 3 scenes


class Server:
    """`python -m http.server` of a folder, which can be killed and started again on its port."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log, self.port = folder, log, processes.free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-S", "-m", "http.server", str(self.port), "--bind", "127.0.0.1", "--directory"]
        with self.log.open("a") as log:
            self._process = subprocess.Popen([*command, str(self.folder)], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            with processes.socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert time.monotonic() < deadline and self._process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def fetched(self, ending: str = "tar") -> list[str]:
        """The files asked for, in their order."""
        return re.findall(rf'"GET /(\S+\.{ending}) ', self.log.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("shards")
    spec = TypeAdapter(Dataset).validate_python(SCENES)
    write_shards(NamedDataset("scenes", spec.build()), spec, target, SHARD_BYTES, workers=0)
    return target


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[Server]:
    running = Server(folder, tmp_path / "server.log")
    yield running
    running.kill()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setenv("VISIONMTL_CACHE", str(tmp_path / "cache"))


def data_of(root: str | Path, **settings: object) -> Data:
    spec = {"type": "shards", "root": str(root), "window": 2, **settings}
    augment = Augment(zoom=(0.8, 1.2), flip=0.5)
    return Data.model_validate(
        {"train": [spec], "val": [spec], "size": (64, 64), "augment": augment.model_dump(), "workers": 0}
    )


def loader_of(data: Data, rank: int = 0, world: int = 1, batch_size: int = 4):
    sources = open_datasets(data.train)
    spaces = resolve_spaces(TASKS, sources)
    return train_loader(data, TASKS, spaces, sources, batch_size, 0, rank, world)


def batches(data: Data, start: int = 0, **ranks: int) -> list[Batch]:
    return list(scene_run.epoch(loader_of(data, **ranks), 1, start))


def assert_equal(ones: list[Batch], others: list[Batch]) -> None:
    assert len(ones) == len(others) > 0
    for one, other in zip(ones, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def shards_of(folder: Path) -> int:
    return len(list(folder.glob("*.tar")))


def test_batches_are_those_of_the_folder_and_each_shard_is_fetched_once(folder: Path, server: Server, tmp_path: Path):
    total = sum(file.stat().st_size for file in folder.glob("*.tar"))
    largest = max(file.stat().st_size for file in folder.glob("*.tar"))
    limit = 5 * largest + 20_000
    assert limit < total and shards_of(folder) >= 6, "so that shards must make room for others"

    data = data_of(server.url, cache_gb=limit / 1e9)
    assert_equal(batches(data), batches(data_of(folder)))

    assert sorted(server.fetched()) == sorted(file.name for file in folder.glob("*.tar"))
    kept = [file.stat().st_size for file in next((tmp_path / "cache" / "shards").iterdir()).rglob("*.tar")]
    assert 0 < sum(kept) <= limit
    sources = open_datasets(data.val)
    spaces = resolve_spaces(TASKS, sources)
    evaluated = [one.image_id for batch in val_loader(data, TASKS, spaces, sources, 4) for one in batch.samples]
    assert evaluated == [sources[0].read(index).image_id for index in range(16)]
    reader = Shards(root=server.url, window=2).build()
    assert reader.notes[-1].startswith("fetched into") and reader.file(0) == f"{server.url}/000000.tar#000000000"


def test_a_server_that_comes_back_in_time_is_only_a_pause(folder: Path, server: Server):
    loader = loader_of(data_of(server.url, retries=12))
    passing = scene_run.epoch(loader, 1)
    before = [next(passing)]
    server.kill()
    threading.Timer(0.5, server.start).start()

    assert_equal([*before, *passing], batches(data_of(folder)))


def test_a_dead_server_ends_the_run_with_its_name_and_a_resume_loses_nothing(folder: Path, server: Server):
    data = data_of(server.url, retries=1, cache_gb=300_000 / 1e9)
    loader, done = loader_of(data, batch_size=2), []
    passing = scene_run.epoch(loader, 1)
    done.append(next(passing))
    server.kill()
    with pytest.raises(StoreError) as error:
        done.extend(passing)  # keeps those before the error
    told = str(error.value)
    assert re.match(rf"{server.url}/0000\d\d\.(tar|json) cannot be fetched: .*\(attempt 2 of 2\); a server", told), told
    assert "--resume" in told and "Traceback" not in told and len(told.splitlines()) == 1

    with pytest.raises(StoreError, match=re.escape(told) + "$"):  # as DataLoader hands it on
        ExceptionWrapper((StoreError, error.value, error.tb), "in DataLoader worker process 0").reraise()

    server.start()
    rest = list(scene_run.epoch(loader_of(data, batch_size=2), 1, start=len(done)))

    assert not (done + rest)[0].bad_files
    assert_equal(done + rest, batches(data_of(folder), batch_size=2))


def test_a_training_that_a_dead_server_ends_goes_on_bit_for_bit(
    folder: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(name: str, root: str, **settings: object) -> Run:
        spec = {"type": "shards", "root": root, "window": 2, **settings}
        return scene_run.run(
            tmp_path / name, ("detection", "depth"), data={"train": [spec]}, train={"checkpoint_every": 1}
        )

    download, fetched = RemoteFolder._download, []

    def dies(self, name, new, max_bytes):
        if name.endswith(".tar"):
            fetched.append(name)
            if len(fetched) == 6:
                server.kill()
        download(self, name, new, max_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "_download", dies)
        with pytest.raises(StoreError, match=r"cannot be fetched: .* with --resume"):
            train(run("cut", server.url, retries=0))
    steps = scene_run.last_state(tmp_path / "cut")["step"]
    server.start()
    train(run("cut", server.url, retries=0), TrainOptions(resume="auto"))
    train(run("whole", str(folder)))

    whole = scene_run.last_state(tmp_path / "whole")
    assert 1 <= steps < whole["step"] == 8
    assert scene_run.differences(scene_run.last_state(tmp_path / "cut"), whole) == []


def test_what_has_another_checksum_is_fetched_once_more_and_then_refused(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch
):
    download, spoilt = RemoteFolder._download, []

    def cut(self, name, new, max_bytes):
        download(self, name, new, max_bytes)
        if name.endswith(".tar") and len(spoilt) < times:
            spoilt.append(name)
            os.truncate(new, new.stat().st_size - 100)

    monkeypatch.setattr(RemoteFolder, "_download", cut)
    times, reader = 1, Shards(root=server.url).build()
    assert reader.read(0).image_id == Shards(root=str(folder)).build().read(0).image_id and len(spoilt) == 1

    # what lies in the cache is damaged: fetched anew
    cached = reader._file(0, "tar")
    content = bytearray(cached.read_bytes())
    content[700] ^= 1
    cached.write_bytes(content)
    reader.read(0)
    assert cached.read_bytes() == (folder / "000000.tar").read_bytes()

    times = 100
    with pytest.raises(
        StoreError, match=r"00000\d\.tar has [\d,]+ bytes and SHA-256 \w+\.\.\., attempt 2 of 2; its index"
    ):
        reader.read(4)
    assert not list(cached.parent.glob("*.writing*")), "nothing unfinished is left"


def test_data_sets_share_a_cache_and_each_keeps_its_index(folder: Path, tmp_path: Path):
    for part in ("train", "val"):
        shutil.copytree(folder, tmp_path / "both" / part)
    plain = json.loads((folder / "index.json").read_text())
    (tmp_path / "both/val/index.json").write_text(json.dumps(plain | {"notes": ["of val"]}))
    cache = tmp_path / "shared"
    cache.mkdir()
    (cache / "index.json").write_text("mine")
    server = Server(tmp_path / "both", tmp_path / "both.log")
    largest = max(file.stat().st_size for file in folder.iterdir())

    def reader(part: str) -> ShardsReader:
        return Shards(root=f"{server.url}/{part}", cache=cache, cache_gb=5 * largest / 1e9, window=2).build()

    try:
        first, other = reader("train"), reader("val")
        assert first.notes[0] != other.notes[0] == "of val"
        before = [one.label_files(0)[0].stat().st_mtime_ns for one in (first, other)]
        for index in range(len(first)):  # evicts shards
            first.read(index)
        again = [one.label_files(0)[0].stat().st_mtime_ns for one in (reader("train"), reader("val"))]
        assert before == again, "data.cache would be made anew"
        assert (cache / "index.json").read_text() == "mine"

        (tmp_path / "both/val/index.json").write_text("{}")
        with pytest.raises(ValueError, match=re.escape(f"{server.url}/val/index.json has no field 'format'")):
            reader("val")
    finally:
        server.kill()


def test_what_cannot_work_is_told_at_the_start(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(StoreError, match=r"/elsewhere/index\.json cannot be fetched: .*\(attempt 1 of 7\)"):
        Shards(root=f"{server.url}/elsewhere").build()
    with pytest.raises(ValueError, match="so many must fit; raise cache_gb, or lower window"):
        Shards(root=server.url, cache_gb=1e-4).build()
    for root, said in (("foo://zz", "Protocol not known: foo"), ("http://[bad/x", "Invalid IPv6 URL")):
        with pytest.raises(StoreError, match=re.escape(f"{root}/index.json cannot be opened: {said}; a URL of a kind")):
            Shards(root=root).build()
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(
        ValueError, match=r"is opened by fsspec, which lacks a package: .*; pip install 'visionmtl\[shards\]'"
    ):
        Shards(root=server.url).build()


def test_another_kind_of_store_is_read_through_fsspec(folder: Path):
    import fsspec

    store = fsspec.filesystem("memory")
    for file in folder.iterdir():
        store.pipe_file(f"/bucket/train/{file.name}", file.read_bytes())
    assert_equal(batches(data_of("memory://bucket/train")), batches(data_of(folder)))


def _rank(groups, url: str, output: str) -> None:
    rank = int(os.environ["RANK"])
    torch.save(
        [list(one.tensors()) for one in batches(data_of(url), rank=rank, world=2, batch_size=2)], f"{output}{rank}"
    )


@pytest.mark.slow
def test_two_processes_share_a_cache_and_their_batches_are_those_of_one(folder: Path, server: Server, tmp_path: Path):
    processes.run(2, _rank, server.url, str(tmp_path / "rank"), num_groups=0)

    parts = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    for one, halves in zip(batches(data_of(folder)), zip(*parts, strict=True), strict=True):
        assert torch.equal(one.image, torch.cat([half[0] for half in halves]))
    assert len(server.fetched()) == len(set(server.fetched())) == shards_of(folder)
