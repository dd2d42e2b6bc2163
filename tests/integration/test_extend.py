"""A new task, data set, decoder or pyramid is one file of one's own and one line in a config."""

import os
import subprocess
import sys
from pathlib import Path

import project
import pytest
from contract import check_spec, found

from visionmtl import run as config
from visionmtl.balance.base import Balance
from visionmtl.cli import main
from visionmtl.config.loader import SHIPPED
from visionmtl.config.registry import Configurable
from visionmtl.modeling.decoders.base import Decoder
from visionmtl.modeling.heads.base import Head
from visionmtl.modeling.pyramids.base import Pyramid
from visionmtl.modeling.sharing.base import Sharing
from visionmtl.tasks.base import Task

KINDS = (Task, Head, Balance, Sharing, Decoder, Pyramid)
FILES = {
    "my_task.py": '''
"""Where classes meet: one logit for every pixel, learnt from the class map."""
from typing import ClassVar, Literal
import numpy as np, torch
from torch import nn
from torch.nn import functional as F
from visionmtl.ops.losses import mean_over_labelled, to_original
from visionmtl.tasks.base import Task

def borders(classes):
    return np.pad((classes[:, 1:] != classes[:, :-1]).astype(np.float32), ((0, 0), (0, 1)))

class Meter:
    metrics: ClassVar = {"error": "min"}
    def __init__(self): self.errors = []
    def update(self, prediction, sample):
        self.errors.append(float(abs(prediction - borders(sample.segmentation)).mean()))
    def state(self): return self.errors
    def merge(self, state): self.errors = self.errors + state
    def compute(self): return {"error": float(np.mean(self.errors)), "protocol": "mean"}

class Borders(Task, frozen=True):
    type: Literal["my_task.Borders"] = "my_task.Borders"
    field: ClassVar = "segmentation"
    meter_type: ClassVar = Meter
    primary_metric: ClassVar = "error"
    level: int = 2

    @property
    def levels(self): return (self.level,)

    def build(self, channels, space):
        return _Out(channels, self.level)

    def collate(self, samples, size):
        wanted = torch.full((len(samples), *size), -1.0)
        for i, sample in enumerate(samples):
            if sample is not None:
                height, width = sample.segmentation.shape
                wanted[i, :height, :width] = torch.from_numpy(borders(sample.segmentation))
        return {"wanted": wanted}

    def count(self, targets, size):
        return {"pixels": (targets["wanted"] >= 0).sum().float()}

    def loss(self, raw, targets, labelled, totals):
        counts = (targets["wanted"] >= 0) & labelled[:, None, None]
        wanted = torch.where(counts, targets["wanted"], 0.0)
        logits = F.interpolate(raw.float(), wanted.shape[1:], mode="bilinear")[:, 0]
        of_pixel = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return {"border": mean_over_labelled(of_pixel, counts, totals["pixels"])}

    def predict(self, raw, metas, size):
        full = [to_original(raw[i : i + 1].float(), size, f.content_size, f.size) for i, f in enumerate(metas)]
        return [one[0, 0].sigmoid().cpu().numpy() for one in full]

    def truth(self, sample): return None if sample.segmentation is None else borders(sample.segmentation)
    def draw(self, image, prediction, space, min_score):
        return (prediction * 255).astype(np.uint8)[..., None].repeat(3, axis=2)

class _Out(nn.Module):
    def __init__(self, channels, level):
        super().__init__()
        self.out, self.level = nn.Conv2d(channels, 1, 1), level
    def forward(self, maps): return self.out(maps[self.level])
''',
    "my_data.py": '''
"""Upright stripes of two classes, nearer on the left."""
from typing import Literal
import numpy as np
from visionmtl.datasets import Dataset
from visionmtl.structures import LabelSpace, Sample

class Stripes(Dataset, frozen=True):
    type: Literal["my_data.Stripes"] = "my_data.Stripes"
    width_px: int = 12
    def build(self): return Reader(self.width_px)

class Reader:
    provides = {"segmentation": LabelSpace("stripes", ("dark", "light"), ((0, 0, 0), (255, 255, 255))), "depth_m": None}
    def __init__(self, width_px): self.width_px = width_px
    def __len__(self): return 4
    def read(self, index):
        classes = np.tile((np.arange(96) + index) // self.width_px % 2, (64, 1)).astype(np.uint8)
        depth_m = np.tile(np.linspace(1, 4, 96, dtype=np.float32), (64, 1))
        image = (classes * 200)[..., None].repeat(3, axis=2)
        return Sample(image=image, image_id=f"{index}", segmentation=classes, depth_m=depth_m)
''',
    "my_parts.py": '''
"""A decoder that reads one level, and a pyramid without top-down path."""
from typing import Literal
from torch import nn
from torch.nn import functional as F
from visionmtl.modeling.decoders.base import Decoder, DenseMap
from visionmtl.modeling.pyramids.base import Pyramid, PyramidMaps

class Finest(Decoder, frozen=True):
    type: Literal["my_parts.Finest"] = "my_parts.Finest"
    levels: tuple[int, ...] = (2,)
    def build(self, in_channels): return _Finest(in_channels, self.channels)

class _Finest(DenseMap):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.out_channels, self.body = c_out, nn.Conv2d(c_in, c_out, 3, padding=1)
    def forward(self, maps): return F.relu(self.body(maps[2]))

class Lateral(Pyramid, frozen=True):
    type: Literal["my_parts.Lateral"] = "my_parts.Lateral"
    def build(self, channels, levels): return _Lateral({level: channels[level] for level in levels}, self.channels)

class _Lateral(PyramidMaps):
    def __init__(self, channels, width):
        super().__init__()
        self.out_channels = width
        self.each = nn.ModuleDict({str(level): nn.Conv2d(c, width, 1) for level, c in channels.items()})
    def forward(self, maps): return {int(level): one(maps[int(level)]) for level, one in self.each.items()}
''',
    "mine.yaml": """
model: {encoder: {name: test_resnet}, pyramid: {type: my_parts.Lateral, channels: 16}}
tasks:
  depth: {type: depth, decoder: {type: my_parts.Finest, channels: 16}}
  borders: {type: my_task.Borders}
data: {train: [{type: my_data.Stripes}], val: [{type: my_data.Stripes, width_px: 9}], size: [64, 96], workers: 0}
train: {epochs: 1, batch_size: 2, precision: fp32}
""",
}


def run(folder: Path, *arguments: str) -> str:
    """The output of a Python process that finds the folder's files, as a user would start it."""
    paths = os.pathsep.join([str(folder), str(project.ROOT), str(project.ROOT / "tests/fixtures")])
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | {"PYTHONPATH": paths}, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_four_kinds_of_extension_train_and_come_back_from_their_checkpoint(tmp_path: Path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text.lstrip(), encoding="utf-8")

    tool = str(project.ROOT / "tools" / "train.py")
    trained = run(tmp_path, tool, "mine.yaml", "--device", "cpu", "--output", "out")
    assert "borders" in trained and "depth" in trained

    again = "from visionmtl.engine.checkpoint import open_model; print(open_model('out/checkpoints/last.pt').run)"
    read = run(tmp_path, "-c", again)
    assert all(name in read for name in ("my_task.Borders", "my_parts.Lateral", "my_parts.Finest", "my_data.Stripes"))


def test_an_extension_that_cannot_be_found_is_named_with_what_to_do(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(FILES["mine.yaml"], encoding="utf-8")
    with pytest.raises(config.ConfigError, match=r"my_task\.Borders.*put its folder on PYTHONPATH"):
        config.load(tmp_path / "mine.yaml")


def test_normals_join_the_quick_start_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = f"base: {SHIPPED / 'quickstart.yaml'}\ntasks: {{normals: {{type: normals}}}}\n"
    (tmp_path / "four.yaml").write_text(text, encoding="utf-8")
    small = ["data.train.0.num_images=2", "data.val.0.num_images=2", "train.batch_size=2", "data.workers=0"]
    small += ["optim.warmup_steps=1"]
    assert main(["train", str(tmp_path / "four.yaml"), *small, "--dry-run", "--device", "cpu"]) == 0
    assert "within_11_25" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("base", "member"),
    [pytest.param(kind, *case.values, id=f"{kind.__name__} {case.id}") for kind in KINDS for case in found(kind)],
)
def test_settings_are_frozen_strict_and_come_back_from_their_dump(base: type[Configurable], member: type[Configurable]):
    check_spec(member(), base)
