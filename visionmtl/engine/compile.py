"""Compiling the losses: one graph for each shape, and a line for the log about each that is made."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from visionmtl.network import LossNet
from visionmtl.run import Train
from visionmtl.transfer.distillation import Teachers

MANY_SHAPES = 64
"""Graphs of one function before torch gives up; its own 8 is little for tasks times padded numbers of boxes."""


def compile_losses(
    loss_net: LossNet, settings: Train, device: torch.device, backend: Any = "inductor", keeps_graph: bool = False
) -> None:
    """Compile `loss_net` where it stands, as `settings.compile` says, at its first call with each shape.

    Whatever cannot be part of the one graph is an error, not a slow piece in between. Shapes are constants: a batch
    padded to another number of boxes is another graph (`Graphs` reports it), and there are as few as paddings.
    keeps_graph: whether one graph is run backward several times, so that it may not give its buffers away.
    """
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
    if settings.compile == "cuda_graph":
        if device.type != "cuda":
            raise ValueError(
                f"train.compile is 'cuda_graph' and the device {device}; only CUDA devices record such graphs; "
                "set train.compile=true, or choose another device"
            )
        if keeps_graph:
            raise ValueError(
                "train.compile is 'cuda_graph' and this balancing method runs one graph backward several times, whose "
                "memory a replay takes back; allowed are balance.level maps with balance.heads raw, and methods that "
                "see losses only; choose one, or set train.compile=true"
            )
        if settings.accumulate > 1:
            raise ValueError(
                f"train.compile is 'cuda_graph' and train.accumulate {settings.accumulate}; a replayed graph writes "
                "over the gradients of the batch before, so 1 is allowed; set train.compile=true, or raise batch_size"
            )
        options["mode"] = "reduce-overhead"
    torch._dynamo.config.recompile_limit = max(MANY_SHAPES, torch._dynamo.config.recompile_limit)

    def one_graph(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(function, **options)

        def within_memory(*arguments: Any) -> Any:
            # where forward and backward are divided, which is at the first call with each shape
            with torch._functorch.config.patch(
                activation_memory_budget=settings.activation_memory, donated_buffer=not keeps_graph
            ):
                return compiled(*arguments)

        return within_memory

    loss_net.compile_with(one_graph)


def compile_teachers(teachers: Teachers, settings: Train, backend: Any = "inductor") -> None:
    """Compile teachers where they stand, all of them into one graph beside that of the losses."""
    mode = "reduce-overhead" if settings.compile == "cuda_graph" else None
    compiled = torch.compile(teachers.forward, fullgraph=True, dynamic=False, backend=backend, mode=mode)
    teachers.forward = compiled  # type: ignore[method-assign]


class Graphs:
    """Notices new graphs and tells what they cost, and why they were needed."""

    def __init__(self) -> None:
        self._before = _so_far()
        self._shapes: dict[str, str] = {}
        self.count = 0

    def report(self, targets: Mapping[str, Mapping[str, Tensor]]) -> str | None:
        """A line when graphs were made since the last call, for a step on these targets. Waits for nothing."""
        now, old = _so_far(), self._shapes
        made, seconds = now[0] - self._before[0], now[1] - self._before[1]
        shapes = {
            f"{task}/{name}": "x".join(map(str, values.shape))
            for task, of_task in targets.items()
            for name, values in of_task.items()
        }
        self._before, self._shapes = now, shapes
        if not made:
            return None
        self.count += made
        if not old:
            return (
                f"compiled  {_graphs(made)} in {seconds:.1f} s, kept in {_cache()} for the next start; what that saves "
                "in a step: tools/benchmark.py step --modes eager compiled"
            )
        why = "though no shape changed; TORCH_LOGS=recompiles names the reason"
        if changed := [name for name, shape in shapes.items() if old[name] != shape]:
            why = f"because {changed[0]} is {shapes[changed[0]]} instead of {old[changed[0]]}"
        return f"compiled  {_graphs(made)} more in {seconds:.1f} s, {why}; {_graphs(self.count)} now"


def _graphs(count: int) -> str:
    return f"{count} graph{'s' * (count != 1)}"


def _so_far() -> tuple[int, float]:
    """Graphs made by this process, and the seconds they took, backwards included."""
    from torch._dynamo.utils import calculate_time_spent, counters

    return counters["stats"]["unique_graphs"], calculate_time_spent()["total_wall_time"]


def _cache() -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()
