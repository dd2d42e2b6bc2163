"""The network as one graph of tensors: preprocessing and decoding inside or outside, any subset of tasks."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visionmtl.engine.environment import package_version
from visionmtl.network import MultiTaskNet
from visionmtl.run import Run
from visionmtl.tasks.base import Raw, Task

Preprocessing = Literal["inside", "outside"]
FORMAT = 1
IMAGE, CONTENT = INPUTS = ("image", "content_size")
Description = dict[str, Any]
"""Plain data that travels in an exported file: input, outputs, tasks with their classes, see `describe`."""


class ExportNet(nn.Module):
    """Images in, tensors out in a fixed order: what torch.export traces."""

    def __init__(self, net: MultiTaskNet, size: tuple[int, int], preprocessing: Preprocessing, decoded: bool) -> None:
        """size: (H, W) of the input; decoded: in user units by `Task.decode_in_graph`, else as decoders give it."""
        super().__init__()
        self.net = net
        self.size = size
        self.preprocessing = preprocessing
        self.decoded = decoded
        self.zoom = depth_zoom(size, net.size) if decoded else 1.0

    def forward(self, image: Tensor, content_size: Tensor | None = None) -> tuple[Tensor, ...]:
        """image: uint8 [B, H, W, C] with preprocessing inside, else float32 [B, C, H, W], normalised; C = 3: RGB.

        content_size: int64 [B, 2], the (H, W) that the image takes of the input, at the top left; where it is decoded
        """
        if self.preprocessing == "inside":
            raw = self.net(image.permute(0, 3, 1, 2))
        else:
            raw = self.net.decode(self.net.trunk(image))
        if not self.decoded:
            return tuple(tensor for name in self.net.tasks for tensor in raw_tensors(name, raw[name]).values())
        assert content_size is not None
        decoded = {
            name: task.decode_in_graph(raw[name], self.size, content_size, self.zoom)
            for name, task in self.net.tasks.items()
        }
        return tuple(decoded[name][key] for name, task in self.net.tasks.items() for key in task.decoded_outputs)


def depth_zoom(size: tuple[int, int], trained: tuple[int, int]) -> float:
    """How much larger everything looks at this input size than in training, the same for every image.

    Raises ValueError where that depends on the image.
    """
    if size[0] * trained[1] != size[1] * trained[0]:
        raise ValueError(
            f"the input is {size[0]}x{size[1]} and the network was trained at {trained[0]}x{trained[1]}, in other "
            "proportions, so that the scale of depth differs from image to image; decoded outputs need the same "
            "proportions; correct data.eval_size, or export raw outputs (--outputs raw)"
        )
    return size[0] / trained[0]


def raw_tensors(task: str, raw: Raw) -> dict[str, Tensor]:
    """The tensors of a raw output by name: `depth`, or `detection_logits`, `detection_distances`, ..."""
    if isinstance(raw, Tensor):
        return {task: raw}
    items = raw.items() if isinstance(raw, dict) else enumerate(raw)
    return {f"{task}_{key}": value for key, value in items if isinstance(value, Tensor)}


def raw_structure(task: str, raw: Raw) -> Any:
    """The raw output as plain data, with names in place of tensors; `restore_raw` undoes it."""
    if isinstance(raw, Tensor):
        return {"tensor": task}
    named = {name: {"tensor": name} for name in raw_tensors(task, raw)}
    if isinstance(raw, dict):
        return {"dict": {key: named.get(f"{task}_{key}", {"plain": value}) for key, value in raw.items()}}
    return {"tuple": [named.get(f"{task}_{key}", {"plain": value}) for key, value in enumerate(raw)]}


def restore_raw(structure: Any, tensors: dict[str, Tensor]) -> Raw:
    """A task's raw output from the tensors of a file."""
    ((kind, value),) = structure.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: restore_raw(inner, tensors) for key, inner in value.items()}
    if kind == "tuple":
        return tuple(restore_raw(inner, tensors) for inner in value)
    return [tuple(row) for row in value] if isinstance(value, list) else value  # JSON has lists alone


@dataclass(frozen=True)
class Graph:
    """What a format writes."""

    module: ExportNet
    inputs: dict[str, Tensor]
    """Examples by name, in the order of the arguments."""
    outputs: tuple[str, ...]
    """Names, in the order of what the module returns."""
    batch: int | None
    """Images at once; None: any number."""
    description: Description

    def program(self) -> torch.export.ExportedProgram:
        """The traced graph, whose batch axis is free where `batch` is None."""
        shapes = None
        if self.batch is None:
            batch = torch.export.Dim("batch", min=1, max=1024)
            shapes = tuple({0: batch} for _ in self.inputs)
        with torch.no_grad():
            return torch.export.export(self.module, tuple(self.inputs.values()), dynamic_shapes=shapes, strict=False)


def make_graph(
    net: MultiTaskNet,
    run: Run,
    *,
    batch: int | None = 1,
    decoded: bool = True,
    preprocessing: Preprocessing = "inside",
) -> Graph:
    """The graph of all tasks of a network on the CPU, in float32 and evaluation mode. batch: None = any number."""
    size = run.data.input_size
    module = ExportNet(net.float().cpu().eval(), size, preprocessing, decoded).eval()
    count = batch or 2  # torch.export would take an axis of length 1 for a constant
    inside = preprocessing == "inside"
    image = (
        torch.zeros(count, *size, net.in_chans, dtype=torch.uint8)
        if inside
        else torch.zeros(count, net.in_chans, *size)
    )
    inputs = {IMAGE: image}
    if decoded:
        inputs[CONTENT] = torch.tensor([size] * count)
    with torch.no_grad():
        raw = net(torch.zeros(1, net.in_chans, *size, dtype=torch.uint8))
    if decoded:
        names = {name: [f"{name}_{key}" for key in task.decoded_outputs] for name, task in net.tasks.items()}
    else:
        names = {name: list(raw_tensors(name, raw[name])) for name in net.tasks}
    outputs = tuple(name for of_task in names.values() for name in of_task)
    description = describe(net, run, batch, decoded, preprocessing, raw)
    return Graph(module, inputs, outputs, batch, description)


def describe(
    net: MultiTaskNet,
    run: Run,
    batch: int | None,
    decoded: bool,
    preprocessing: Preprocessing,
    raw: dict[str, Raw],
) -> Description:
    """What a file's user must know, as plain data: how to make the input, what each output is, classes, ranges."""
    size = run.data.input_size
    inside = preprocessing == "inside"
    image = {
        "size": list(size),
        "trained_size": list(net.size),
        "batch": batch,
        "layout": "NHWC" if inside else "NCHW",
        "dtype": "uint8" if inside else "float32",
        "channels": net.in_chans,
        "colour": "RGB" if net.in_chans == 3 else "as training read it",
        "resize": "keep proportions so that the image just fits into size, bilinear, antialiased where it shrinks; put "
        "it at the top left; pad with 0 (before normalisation)",
        "preprocessing": preprocessing,
        # of values 0..255
        "mean": net.mean.flatten().tolist(),
        "std": net.std.flatten().tolist(),
    }
    return {
        "format": FORMAT,
        "visionmtl": package_version("visionmtl"),
        "inputs": {
            IMAGE: image,
            **({CONTENT: "int64 [B, 2]: (H, W) that the resized image takes of the input"} if decoded else {}),
        },
        "decoded": decoded,
        "tasks": {name: _describe_task(name, task, net, decoded, raw[name]) for name, task in net.tasks.items()},
    }


def _describe_task(name: str, task: Task, net: MultiTaskNet, decoded: bool, raw: Raw) -> Description:
    space = net.spaces[name]
    if decoded:
        outputs = {f"{name}_{key}": text for key, text in task.decoded_outputs.items()}
    else:
        outputs = {
            key: f"{str(x.dtype).removeprefix('torch.')} [B, {', '.join(map(str, x.shape[1:]))}]"
            for key, x in raw_tensors(name, raw).items()
        }
    return {
        "outputs": outputs,
        **({} if decoded else {"raw": raw_structure(name, raw)}),
        "settings": task.model_dump(mode="json"),
        "space": space and space.plain(),
    }
