"""Decoding after the loader in whole runs: through workers, pinned memory and the feed, in training, and on a GPU."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils.data._utils.pin_memory import pin_memory
from write_jpegs import write_jpegs

from visionmtl import run as config
from visionmtl.cli import main
from visionmtl.data.label_spaces import resolve_spaces
from visionmtl.data.loader import TrainLoader
from visionmtl.data.prefetch import Prefetcher
from visionmtl.datasets import open_datasets
from visionmtl.engine.throughput import WARMUP_STEPS, Advice
from visionmtl.network import to_device
from visionmtl.run import Run
from visionmtl.structures import Batch

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities")  # of torchvision

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def run(folder: Path, decode: str = "device", **options: Any) -> Run:
    """A tiny run of three tasks on eight drawn JPEGs. options: of `write_jpeg`."""
    spec = write_jpegs(folder / "data", **options)
    augment = {"zoom": (0.7, 2.0), "flip": 0.5, "contrast": 0.4, "brightness": 0.2}
    data = {"train": [spec], "val": [spec], "decode": decode, "augment": augment}
    return tiny.run(folder / decode, data=data)


def batches(of: Run, workers: int = 0) -> list[Batch]:
    """Those of the first epoch."""
    data, sources = of.data.model_copy(update={"workers": workers}), open_datasets(of.data.train)
    spaces = resolve_spaces(of.tasks, sources)
    return list(TrainLoader(data, of.tasks, spaces, sources, of.train.batch_size, of.seed).epoch(0))


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    of = run(tmp_path)
    for one, other in zip(batches(of), batches(of, workers=1), strict=True):
        assert torch.equal(one.encoded.content, other.encoded.content) and one.encoded.views == other.encoded.views
        one, other = to_device(one, CPU), to_device(other, CPU)
        assert torch.equal(one.image, other.image) and torch.equal(one.colour, other.colour)


def test_the_loader_pins_the_bytes(tmp_path, monkeypatch):
    batch = batches(run(tmp_path))[0]
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.data_ptr()) or tensor.clone())
    content = pin_memory({"encoded": batch.encoded, "colour": batch.colour})

    assert pinned == [batch.encoded.content.data_ptr(), batch.colour.data_ptr()]
    assert torch.equal(content["encoded"].content, batch.encoded.content)
    assert content["encoded"].views == batch.encoded.views and content["encoded"].size == batch.encoded.size


def test_the_feed_hands_on_what_is_decoded_in_the_step(tmp_path):
    of = run(tmp_path)
    state, feed = tiny.state(of), Prefetcher(CPU)
    for group in feed.groups(batches(of), 2):
        assert all(batch.encoded is not None for batch in group)
        losses, _, norm = state.advance(group)
        feed.ahead()
        assert norm.isfinite() and all(part.isfinite() for parts in losses.values() for part in parts.values())
    assert state.step == 2


def test_a_training_learns_what_it_learns_with_workers_that_decode(tmp_path):
    rows = {}
    for decode in ("workers", "device"):
        of = run(tmp_path, decode)
        (tmp_path / f"{decode}.yaml").write_text(config.dump(of))
        assert main(["train", str(tmp_path / f"{decode}.yaml"), "--device", "cpu"]) == 0
        rows[decode] = tiny.rows(tmp_path / decode)

    assert [row["step"] for row in rows["device"]] == [1, 2, 3, 4]
    assert "NaN" not in json.dumps(rows["device"]) and "Infinity" not in json.dumps(rows["device"])
    first, other = (rows[decode][0]["losses"] for decode in ("device", "workers"))
    for task, parts in other.items():
        # images differ by less than half of 255 levels, i.e. 0.2 %; a network of random weights adds to that
        assert first[task] == pytest.approx(parts, rel=0.02)


def test_advice_to_a_run_that_waits_names_no_setting_that_needs_pixels(tmp_path):
    for decode, expected in (("workers", True), ("device", False)):
        advice = Advice(run(tmp_path, decode).data, workers=1, cores=2, processes=1)
        advice.line(0.0, WARMUP_STEPS)
        line = advice.line(0.9, 1)
        assert ("data.cache" in line) == ("augment.zoom" in line) == expected


def test_a_few_images_can_be_overfitted(tmp_path):
    (tmp_path / "run.yaml").write_text(config.dump(run(tmp_path)))
    few = ["--overfit", "2", "--device", "cpu", "--max-steps", "2"]
    assert main(["train", str(tmp_path / "run.yaml"), *few, "--output", str(tmp_path / "few")]) == 0


@on_a_gpu
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 0, "progressive": True}, {"mode": "L"}])
def test_on_a_gpu_images_are_those_of_the_cpu(tmp_path, options):
    """Colours of every pixel are stored here: decoders may interpolate them differently where they are not."""
    for batch in batches(run(tmp_path, **options)):
        one, other = to_device(batch, CUDA), to_device(batch, CPU)
        assert one.image.is_cuda and (one.image.cpu().int() - other.image.int()).abs().float().mean() < 1
        torch.testing.assert_close(one.colour.cpu(), other.colour, rtol=1e-4, atol=1)


@on_a_gpu
def test_on_a_gpu_each_step_sees_its_own_batch_however_late_it_runs(tmp_path):
    """Steps are far behind the decoding, whose memory must not be written again before it is read."""
    given = [replace(batch, encoded=batch.encoded.pin_memory()) for batch in batches(run(tmp_path, subsampling=0))]
    expected = [to_device(batch, CPU).image.float().mean() for batch in given]
    feed, means, busy = Prefetcher(CUDA), [], torch.rand(4096, 4096, device=CUDA)
    for (one,) in feed.groups(itertools.islice(itertools.cycle(given), 24)):
        for _ in range(3):
            busy = busy @ busy / 4096
        means.append(one.image.float().mean())
        del one
        feed.ahead()
    assert torch.stack(means).tolist() == pytest.approx([float(value) for value in expected] * 6, abs=1)


@on_a_gpu
def test_on_a_gpu_a_damaged_photograph_is_named(tmp_path):
    batch = batches(run(tmp_path))[0]
    batch.encoded.content[2 : batch.encoded.views[0].num_bytes - 2] = 0
    with pytest.raises(ValueError, match=r"\d.jpg cannot be decoded on cuda:0: "):
        to_device(batch, CUDA)
