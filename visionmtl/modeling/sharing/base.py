"""The sharing contract: how tasks share encoder, pyramid and decoders."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionmtl.config.registry import Configurable
from visionmtl.modeling.decoders.base import Decoder
from visionmtl.modeling.pyramids.base import PyramidMaps
from visionmtl.modeling.unused_parameters import parameters_behind
from visionmtl.structures import Maps


@dataclass(frozen=True)
class Parts:
    """What a trunk is built from: makers of new modules, and what each task reads."""

    encoder: Callable[[int], Any]
    """Coarsest level that is read -> a new encoder with its weights (pretrained ones too): image -> Maps."""
    pyramid: Callable[[Mapping[int, int], tuple[int, ...]], PyramidMaps]
    """Channels by level of the encoder, levels wanted -> a new pyramid: Maps -> Maps."""
    decoder: Callable[[str, int], nn.Module]
    """Task, channels of the maps it reads -> its module: Maps -> raw."""
    last_layers: Callable[[str, tuple[int, ...], int], nn.ModuleList]
    """Task, levels, channels -> modules of the task's last layer alone: Maps -> raw.

    One for each level where the task has a dense decoder, one over all levels where it has a detection head, none
    where it has neither.
    """
    levels: Mapping[str, tuple[int, ...]]
    """What each task reads, finest first, by task."""
    dense: Mapping[str, Decoder]
    """Settings of the dense decoders, by task, of the tasks that have one."""
    size: tuple[int, int]
    """(H, W) of the input."""
    in_chans: int
    """Channels of the input."""

    @property
    def all_levels(self) -> tuple[int, ...]:
        """The levels that any task reads, finest first."""
        return tuple(sorted({level for of_task in self.levels.values() for level in of_task}))


class Trunk(nn.Module):
    """Everything before the tasks' own modules, cut where the shared representation lies."""

    encoder: Any
    """The encoder, or a ModuleDict of one for each task."""
    out_channels: int
    """Channels of the maps that `split` hands out, unless `decoder` says otherwise."""
    shared_maps: bool = True
    """False: no single set of maps is shared; `forward` then gives the maps of each task, which `split` hands on."""
    joins_tasks: bool = False
    """True: losses of two tasks pass through one module behind the shared maps (PAD-Net, MMoE, one dense decoder)."""
    splits_by_modules: bool = True
    """False: `split` only chooses among the shared maps."""
    initial_weight: float = 1.0
    """Factor of the losses of initial predictions."""
    of_each_task: tuple[str, ...] = ()
    """Names of ModuleDicts by task whose modules run for no other task; their parameters may be those of others."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.levels = dict(parts.levels)
        self.size, self.in_chans = parts.size, parts.in_chans

    def forward(self, image: Tensor) -> Any:
        """Normalised float [B, in_chans, H, W] -> the shared maps, on which gradients of tasks are compared.

        Maps; where `shared_maps` is False, Maps by task.
        """
        raise NotImplementedError

    def split(self, shared: Any) -> Mapping[str, Maps]:
        """What `forward` gave -> what each task's module reads, by task name."""
        return self.split_with_initial(shared)[0]

    def split_with_initial(self, shared: Any) -> tuple[Mapping[str, Maps], Mapping[str, Sequence[Any]]]:
        """As `split`, and the raw initial predictions of tasks that have them; only losses need these."""
        return self.split(shared), {}

    def decoder(self, task: str, parts: Parts) -> nn.Module:
        """The task's own module, which reads what `split` hands out."""
        return parts.decoder(task, self.out_channels)

    def encoders(self) -> list[nn.Module]:
        """Every encoder inside, whole or in part."""
        return list(self.encoder.values()) if isinstance(self.encoder, nn.ModuleDict) else [self.encoder]

    def shared_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that the losses of two tasks or more reach; none where nothing is shared.

        Found along the graph of one forward pass of a black image; nothing else changes.
        """
        with self._of_black_image() as shared:
            maps, initial = self.split_with_initial(shared)
            reached = [parameters_behind((maps[task], initial.get(task, ()))) for task in maps]
        return [p for p in self.parameters() if sum(id(p) in of_task for of_task in reached) > 1]

    def learning_maps(self) -> dict[int, bool]:
        """By level of the shared maps, where `shared_maps`, whether anything that makes the map is trainable."""
        with self._of_black_image() as shared:
            return {level: map_.requires_grad for level, map_ in shared.items()}

    @contextmanager
    def _of_black_image(self) -> Iterator[Any]:
        """What `forward` gives for one black image, with its graph, in evaluation mode; nothing else changes."""
        modes = [(module, module.training) for module in self.modules()]
        image = torch.zeros(1, self.in_chans, *self.size, device=next(self.parameters()).device)
        try:
            with torch.enable_grad():
                yield self.eval()(image)
        finally:
            for module, mode in modes:
                module.training = mode

    def keep(self, tasks: Sequence[str]) -> None:
        """Leave out what serves none of `tasks`; the others can no longer be predicted."""
        self.levels = {task: levels for task, levels in self.levels.items() if task in tasks}
        for name in self.of_each_task:
            modules: nn.ModuleDict = getattr(self, name)
            for task in [task for task in modules if task not in tasks]:
                del modules[task]
        if isinstance(pyramid := getattr(self, "pyramid", None), PyramidMaps):
            pyramid.keep(self.read_levels())

    def read_levels(self) -> set[int]:
        """The shared maps that are read."""
        return {level for levels in self.levels.values() for level in levels}


class PyramidTrunk(Trunk):
    """One encoder and one pyramid for all tasks, whose maps are what is shared."""

    def __init__(self, parts: Parts, levels: tuple[int, ...] | None = None) -> None:
        """levels: of the pyramid; None: those that the tasks read."""
        super().__init__(parts)
        levels = levels or parts.all_levels
        encoder = parts.encoder(levels[-1])
        self.encoder = encoder
        self.pyramid = parts.pyramid(encoder.channels, levels)
        self.out_channels = self.pyramid.out_channels

    def forward(self, image: Tensor) -> Maps:
        maps: Maps = self.pyramid(self.encoder(image))
        return maps

    def split(self, shared: Maps) -> dict[str, Maps]:
        """The levels that each task reads."""
        return {task: {level: shared[level] for level in levels} for task, levels in self.levels.items()}


class Sharing(Configurable, package="visionmtl.modeling.sharing"):
    """Frozen settings of one way of sharing."""

    @abstractmethod
    def build(self, parts: Parts) -> Trunk:
        """Raises ValueError where encoder or tasks do not fit."""
