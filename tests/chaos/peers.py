"""Tries five faults on visionmtl and on other projects that can be imported, and prints what each did as a table.

python tests/chaos/peers.py                    whatever is installed
python tests/chaos/peers.py timm ultralytics   these

The faults: SIGKILL while a checkpoint is written over another, a checkpoint cut short and one with a flipped bit, a
checkpoint with a pickle payload, an image damaged in epoch 3 of 4, and a full disk. Each project is used as its
documentation says, and with its default settings. A full disk is a tmpfs, which only root can mount.
"""

import contextlib
import io
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from _filler import FILLER

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("YOLO_VERBOSE", "false")
HERE = Path(__file__).resolve().parent
KILLS = 40
NUM_IMAGES = 8


class Payload:
    """Creates a file when it is unpickled by a reader that runs what it reads."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.touched),)


def write_images(folder: Path) -> list[Path]:
    """JPEGs in two folders of classes."""
    import numpy as np
    from PIL import Image

    files = []
    for number in range(NUM_IMAGES):
        file = folder / ("cat", "dog")[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 64)).save(file)
        files.append(file)
    return files


def damage_image(file: Path) -> None:
    """Half of it stays."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


class Project:
    """How one project saves, resumes and trains. Each instance has a folder of its own."""

    packages: tuple[str, ...]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def file(self) -> Path:
        """The checkpoint that is written over and over."""
        raise NotImplementedError

    def save(self, step: int) -> None:
        """Write the state of a step over the one before."""
        raise NotImplementedError

    def resume(self) -> str:
        """Go on as documented after a crash; what was found."""
        raise NotImplementedError

    def train(self, images: list[Path], damage: Callable[[int], None]) -> str:
        """Four epochs over the images; `damage(epoch)` is called when one begins, counted from 1."""
        raise NotImplementedError


class TorchProject(Project):
    """What is the same where the user brings a network of torch."""

    def __init__(self, folder: Path) -> None:
        import torch

        super().__init__(folder)
        self.net = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4)))
        self.optimizer = torch.optim.AdamW(self.net.parameters())
        self.net(torch.zeros(1, 1024)).sum().backward()
        self.optimizer.step()

    def mark(self, step: int) -> None:
        """All weights are the number of the step, so that any mixture is seen."""
        import torch

        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.fill_(step)

    def marked(self) -> str:
        values = {float(value) for parameter in self.net.parameters() for value in (parameter.min(), parameter.max())}
        return f"step {values.pop():g}" if len(values) == 1 else f"WEIGHTS OF NO STEP, {sorted(values)}"


class Timm(TorchProject):
    packages = ("timm",)

    def __init__(self, folder: Path) -> None:
        from timm.utils import CheckpointSaver

        super().__init__(folder)
        self.saver = CheckpointSaver(self.net, self.optimizer, checkpoint_dir=str(folder), max_history=2)

    @property
    def file(self) -> Path:
        return self.folder / "last.pth.tar"

    def save(self, step: int) -> None:
        self.mark(step)
        self.saver.save_checkpoint(step, float(step))

    def resume(self) -> str:
        from timm.models import resume_checkpoint

        resume_checkpoint(self.net, str(self.file), self.optimizer, log_info=False)
        return self.marked()

    def train(self, images: list[Path], damage: Callable[[int], None]) -> str:
        import torch
        from timm.data import create_dataset, create_loader

        dataset = create_dataset("", root=str(images[0].parents[1]))
        loader = create_loader(dataset, (3, 32, 32), 4, is_training=True, num_workers=0, device=torch.device("cpu"))
        seen = 0
        for epoch in range(1, 5):
            damage(epoch)
            seen += sum(len(target) for _, target in loader)
        return f"{seen} images in 4 epochs"


class Fvcore(TorchProject):
    packages = ("fvcore", "iopath")

    def __init__(self, folder: Path) -> None:
        from fvcore.common.checkpoint import Checkpointer

        super().__init__(folder)
        self.checkpointer = Checkpointer(self.net, str(folder), optimizer=self.optimizer)

    @property
    def file(self) -> Path:
        return max(self.folder.glob("model_*.pth"))

    def save(self, step: int) -> None:
        self.mark(step)
        self.checkpointer.save(f"model_{step:07d}", iteration=step)  # the name that detectron2 gives

    def resume(self) -> str:
        found = self.checkpointer.resume_or_load("", resume=True)
        return self.marked() if found else "NO CHECKPOINT FOUND, a start from nothing without a word"


class Lightning(TorchProject):
    packages = ("lightning",)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.module, self.trainer = self._fit(1)

    def _fit(self, epochs: int, loader: Any = None, damage: Callable[[int], None] = lambda epoch: None, **resume: Any):
        import lightning
        import torch

        net = self.net

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = net
                self.seen = 0

            def on_train_epoch_start(self) -> None:
                damage(self.current_epoch + 1)

            def training_step(self, batch: Any, _: int) -> Any:
                self.seen += len(batch[0])
                return self.net(batch[0].flatten(1)[:, :1024]).mean()

            def configure_optimizers(self) -> Any:
                return torch.optim.AdamW(self.net.parameters())

        trainer = lightning.Trainer(
            max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
            enable_model_summary=False, default_root_dir=self.folder,
        )  # fmt: skip
        module = Module()
        data = torch.utils.data.TensorDataset(torch.zeros(2, 1024))
        trainer.fit(module, loader or torch.utils.data.DataLoader(data, 2), **resume)
        return module, trainer

    @property
    def file(self) -> Path:
        return self.folder / "last.ckpt"

    def save(self, step: int) -> None:
        self.mark(step)
        self.trainer.save_checkpoint(self.file)

    def resume(self) -> str:
        self._fit(1, ckpt_path=str(self.file))
        return self.marked()

    def train(self, images: list[Path], damage: Callable[[int], None]) -> str:
        import torch
        from torchvision import datasets, transforms

        change = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
        dataset = datasets.ImageFolder(str(images[0].parents[1]), change)
        module, _ = self._fit(4, torch.utils.data.DataLoader(dataset, 4), damage)
        return f"{module.seen} images in 4 epochs"


class Ultralytics(Project):
    packages = ("ultralytics",)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images = write_images(folder / "data" / "images")
        for image in self.images:
            label = Path(str(image).replace("/images/", "/labels/")).with_suffix(".txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("0 0.5 0.5 0.5 0.5\n")
        self.trainer: Any = None

    def _train(self, damage: Callable[[int], None] = lambda epoch: None, epochs: int = 4) -> Any:
        from ultralytics import YOLO

        config = self.folder / "data.yaml"
        config.write_text(f"path: {self.folder / 'data'}\ntrain: images\nval: images\nnames: [thing]\n")
        model = YOLO("yolo11n.yaml")
        model.add_callback("on_train_epoch_start", lambda trainer: damage(trainer.epoch + 1))
        model.train(
            data=str(config), epochs=epochs, imgsz=64, batch=4, workers=0, device="cpu", project=str(self.folder),
            name="run", exist_ok=True, val=False, plots=False, verbose=False, amp=False,
        )  # fmt: skip
        return model.trainer

    @property
    def file(self) -> Path:
        return self.folder / "run" / "weights" / "last.pt"

    def save(self, step: int) -> None:
        if self.trainer is None:  # after its last epoch a file is stripped: one of the middle is wanted
            self.trainer = self._train(epochs=1)
            self.trainer.epochs = 4
        self.trainer.epoch = step
        self.trainer.save_model()

    def resume(self) -> str:
        from ultralytics import YOLO

        if not self.file.exists():
            raise FileNotFoundError(self.file)
        return f"step {YOLO(str(self.file)).ckpt['epoch']}"

    def train(self, images: list[Path], damage: Callable[[int], None]) -> str:
        for source, target in zip(images, self.images, strict=True):
            os.replace(source, target)
            source.symlink_to(target)
        self._train(damage)
        return "4 epochs to their end"


class Visionmtl(Project):
    packages = ("visionmtl",)

    def __init__(self, folder: Path) -> None:
        sys.path[:0] = [str(HERE.parent / "fixtures"), str(HERE.parents[1])]
        super().__init__(folder)
        self.state: dict[str, Any] = {}

    def run(self, **data: Any) -> Any:
        import scene_run
        from write_folder import FolderData

        if not (self.folder / "data").exists():
            self.files = FolderData(self.folder / "data")
        known = {"train": [self.files.settings("train")], "val": [self.files.settings("val")], "workers": 0}
        return scene_run.run(
            self.folder / "run", ["segmentation", "depth"],
            model={"encoder": {"name": "resnet10t"}}, data={**known, **data}, train={"epochs": 4, "loggers": []},
        )  # fmt: skip

    @property
    def file(self) -> Path:
        return self.folder / "run" / "checkpoints" / "last.pt"

    def save(self, step: int) -> None:
        import scene_run

        from visionmtl.engine import checkpoint
        from visionmtl.engine.options import TrainOptions
        from visionmtl.engine.trainer import train

        if not self.state:
            train(self.run(), TrainOptions(max_steps=1))
            self.state = {"run": checkpoint.load(self.file)["run"], **scene_run.last_state(self.folder / "run")}
        self.state["step"] = step
        checkpoint.save_step(self.folder / "run", self.state, keep=1)

    def resume(self) -> str:
        from visionmtl.engine.options import TrainOptions
        from visionmtl.engine.trainer import train

        train(self.run(), TrainOptions(resume="auto", max_steps=1))
        lines = (self.folder / "run" / "train.log").read_text().splitlines()
        loud = [line[21:] for line in lines if "THE RUN GOES ON FROM" in line]
        return f"step {[line for line in lines if 'is left to train: step' in line][-1].split()[8]}" + (
            f", and says: {loud[-1]}" if loud else ""
        )

    def train(self, images: list[Path], damage: Callable[[int], None]) -> str:
        from visionmtl.engine.options import TrainOptions
        from visionmtl.engine.trainer import train

        run = self.run()
        first = self.files.root / "images" / "train" / "0.png"
        damaged = images[0]
        shutil.copy(first, damaged)
        first.unlink()
        first.symlink_to(damaged)
        for epoch in range(1, 5):
            damage(epoch)
            train(run, TrainOptions(resume="auto", max_steps=2 * epoch))
        return "4 epochs to their end"


PROJECTS = {"visionmtl": Visionmtl, "lightning": Lightning, "timm": Timm, "detectron2 (fvcore)": Fvcore,
            "ultralytics": Ultralytics}  # fmt: skip


def said(work: Callable[[], str]) -> str:
    """What a call gives, or its error."""
    log = logging.StreamHandler(stream := io.StringIO())
    logging.getLogger().addHandler(log)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = work()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever another project raises is what is looked for
        result = f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
    finally:
        logging.getLogger().removeHandler(log)
    warned = [line for line in stream.getvalue().splitlines() if "kipped" in line or "corrupt" in line]
    return result + (f" [{len(warned)} warnings: {warned[0][:160]}]" if warned else "")


def kill_while_saving(project: Project) -> str:
    """A fork saves step after step and is killed; then the project resumes."""
    outcomes: dict[str, int] = {}
    moments, last = random.Random(0), ""
    project.save(1)
    place = project.file.parent
    started = time.monotonic()
    project.save(2)
    duration = time.monotonic() - started
    for _ in range(KILLS):
        if not last.startswith("step"):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        project.save(1)
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for step in range(2, 1000):
                    os.write(tell, b".")
                    project.save(step)
            finally:
                os._exit(1)
        os.close(tell)
        os.read(told, 1)
        time.sleep(duration * moments.uniform(0, 3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        begun = 1 + len(os.read(told, 10_000))
        os.close(told)
        last = said(project.resume)
        kind = "resumed at the step before or the one being written"
        if last not in (f"step {begun}", f"step {begun + 1}"):
            kind = last[:110]
        outcomes[kind] = outcomes.get(kind, 0) + 1
    return "; ".join(f"{count} of {KILLS}: {outcome}" for outcome, count in outcomes.items())


def damaged(project: Project) -> str:
    """Cut short in three places, and one bit flipped in twenty."""
    project.save(1)
    project.save(2)
    file, kept = project.file, Path(tempfile.mkdtemp()) / "kept"
    shutil.copytree(file.parent, kept)
    whole = file.read_bytes()

    def outcome_of(content: bytes) -> str:
        file.unlink()  # others may be the same file under another name
        file.write_bytes(content)
        outcome = said(project.resume)
        shutil.rmtree(file.parent)
        shutil.copytree(kept, file.parent)
        return outcome

    found = [f"cut at {share:.1%}: {outcome_of(whole[: int(len(whole) * share)])}" for share in (0.5, 0.9, 0.999)]
    outcomes: dict[str, int] = {}
    for number in range(20):
        flipped = bytearray(whole)
        flipped[random.Random(number).randrange(len(whole))] ^= 1 << number % 8
        outcome = outcome_of(bytes(flipped))
        outcome = "OPENED WITHOUT A WORD" if outcome == "step 2" or outcome.startswith("WEIGHTS") else outcome[:60]
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    shutil.rmtree(kept.parent)
    flips = "; ".join(f"{count} of 20: {outcome}" for outcome, count in outcomes.items())
    return " | ".join([*found, f"one bit flipped: {flips}"])


def payload(project: Project) -> str:
    """A valid checkpoint with one more value, which runs when it is unpickled."""
    import torch

    project.save(1)
    file, touched = project.file, project.folder / "touched"
    content = torch.load(file, map_location="cpu", weights_only=False)
    for other in file.parent.iterdir():
        if other.suffix in (".pt", ".pth", ".previous"):
            other.unlink()
    torch.save({**content, "more": Payload(touched)}, file)
    outcome = said(project.resume)
    return f"{'CODE WAS RUN' if touched.exists() else 'not run'}; {outcome}"


def bad_image(project: Project) -> str:
    """One of the images is cut in half when epoch 3 of 4 begins."""
    images = write_images(project.folder / "pictures")

    def damage(epoch: int) -> None:
        if epoch == 3:
            damage_image(images[0])

    return said(lambda: project.train(images, damage))


def full_disk(project: Project) -> str:
    """The disk is full at the second save, and another process takes whatever becomes free."""
    project.save(1)
    size, filler = project.file.stat().st_size, project.folder / "filler"
    filling = subprocess.Popen([sys.executable, "-c", FILLER, filler], stdout=subprocess.PIPE)
    assert filling.stdout is not None
    filling.stdout.readline()
    outcome = said(lambda: str(project.save(2)))
    filling.kill()
    filling.wait()
    used = shutil.disk_usage(project.folder).used - filler.stat().st_blocks * 512
    filler.unlink()
    return f"{outcome} | {used / size:.2f} checkpoints lie on the disk | then: {said(project.resume)}"


FAULTS: dict[str, Callable[[Project], str]] = {
    "kill during save": kill_while_saving, "damaged checkpoint": damaged, "pickle payload": payload,
    "corrupt image in epoch 3": bad_image, "disk full": full_disk,
}  # fmt: skip


def attempt(name: str, fault: str) -> None:
    """In a process of its own, so that nothing of one attempt stays."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-peer-"))
    mounted = fault == "disk full"
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", folder], check=True)
    os.chdir(folder)
    try:
        project = PROJECTS[name](folder)
        if fault == "corrupt image in epoch 3" and type(project).train is Project.train:
            print("reads no images")
        else:
            print("\n" + FAULTS[fault](project))
    finally:
        os.chdir("/")
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def main(names: list[str]) -> int:
    """Print the table."""
    if names[:1] == ["--one"]:
        attempt(names[1], names[2])
        return 0
    for name, project in PROJECTS.items():
        if names and not any(name.startswith(one) for one in names):
            continue
        versions = []
        for package in project.packages:
            try:
                versions.append(f"{package} {metadata.version(package)}")
            except metadata.PackageNotFoundError:
                versions.append(package)
        print(f"\n## {name} ({', '.join(versions)})")
        for fault in FAULTS:
            command = [sys.executable, str(Path(__file__).resolve()), "--one", name, fault]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = done.stdout.strip().splitlines() if done.returncode == 0 else done.stderr.splitlines()
            print(f"- {fault}: {lines[-1] if lines else 'nothing'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
