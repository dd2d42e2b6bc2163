"""The multi-task network: encoder and pyramid (the trunk), one decoder per task."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import Self

from visionmtl.config.registry import EachOnce, Spec
from visionmtl.config.suggest import did_you_mean
from visionmtl.modeling.decoders.base import Decoder, DenseMap
from visionmtl.modeling.encoder import Encoder
from visionmtl.modeling.faster import quicken
from visionmtl.modeling.heads.base import Head
from visionmtl.modeling.pyramids.base import Pyramid
from visionmtl.modeling.pyramids.fpn import FPN
from visionmtl.modeling.sharing.base import Parts, Sharing, Trunk
from visionmtl.modeling.sharing.hard import Hard
from visionmtl.ops.color import normalise
from visionmtl.ops.ranks import Counts
from visionmtl.ops.soft_losses import distance_preservation
from visionmtl.structures import LabelSpace, Maps
from visionmtl.tasks.base import Raw, SoftLoss, Task

SOFT = "soft_"
"""With this begin the names of loss parts against teachers."""
FEATURES = "shared maps"
"""Where a teacher's shared maps stand among soft targets; no task can be called so."""


class DeepSupervision(Spec, frozen=True):
    """Auxiliary predictions of dense tasks from coarse maps, which labels teach, too (arXiv:1409.5185).

    Each is the task's last layer on a shared map, under the task's own loss. Predictions and exports do not have them.
    """

    levels: Annotated[tuple[int, ...], EachOnce] = Field((3, 4), min_length=1)
    """Of the pyramid, stride 2**level."""
    weight: float = Field(0.4, gt=0)
    """Factor on their losses."""


class Model(Spec, frozen=True):
    """Settings of everything before the decoders; those belong to their tasks."""

    encoder: Encoder
    pyramid: Pyramid = FPN()
    sharing: Sharing = Hard()
    deep_supervision: DeepSupervision | None = None
    freeze: tuple[str, ...] = ()
    """Parts that do not learn: names of modules or parameters of the network, such as `trunk.encoder.body.layer1` or
    `decoders.depth`, or patterns such as `trunk.encoder.*.bn?.*`. Frozen modules stay in evaluation mode."""

    def without_weights(self) -> Self:
        """The same with random weights in the encoder, for where no pretrained ones need be read or fetched."""
        encoder = self.encoder.model_copy(update={"pretrained": False, "checkpoint": None})
        return self.model_copy(update={"encoder": encoder})


class MultiTaskNet(nn.Module):
    """uint8 or float images of 0..255 in, [B, in_chans, H, W], raw outputs of every task out."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, spec: Model, tasks: Mapping[str, Task], spaces: Mapping[str, LabelSpace | None], size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.tasks = dict(tasks)
        self.spaces = dict(spaces)
        self.size = size
        self.frozen_modules: tuple[str, ...] = ()
        parts = _parts(spec, tasks, spaces, size)
        self.trunk = spec.sharing.build(parts)
        encoder: Any = self.encoder
        # dense decoders double maps; what is coarser than level 5 and for detection alone may be rounded up
        coarsest = max(min(5, parts.all_levels[-1]), *(decoder.levels[-1] for decoder in parts.dense.values()), 0)
        self.size_multiple = max(int(encoder.size_multiple), 2**coarsest)
        self._encoder_name = spec.encoder.name
        self._check_multiple(size, "data.size")
        self.encoder_origin: str = encoder.origin
        self.in_chans = spec.encoder.in_chans
        """Channels of the images."""
        self.register_buffer("mean", torch.tensor(encoder.mean).view(1, -1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(encoder.std).view(1, -1, 1, 1) * 255, persistent=False)
        self.decoders = nn.ModuleDict({name: self.trunk.decoder(name, parts) for name in tasks})
        self.auxiliary = nn.ModuleDict()
        self.initial_weight: float = self.trunk.initial_weight
        """Factor on losses of initial and of auxiliary predictions."""
        if spec.deep_supervision:
            self._check_supervision(spec.deep_supervision, spec.sharing.type, parts)
            self.initial_weight = spec.deep_supervision.weight
            for name in parts.dense:
                self.auxiliary[name] = parts.last_layers(name, spec.deep_supervision.levels, self.trunk.out_channels)

        quicken(self)
        if spec.freeze:
            self._freeze(spec.freeze)

    def _check_supervision(self, supervision: DeepSupervision, sharing: str, parts: Parts) -> None:
        trunk = type(self.trunk)
        if trunk.split_with_initial is not Trunk.split_with_initial or trunk.decoder is not Trunk.decoder:
            raise ValueError(
                f"model.deep_supervision is set, but sharing {sharing!r} has predictions or decoders of its own on the "
                "shared maps; hard and other sharings that hand out whole pyramids are allowed; remove one of the two"
            )
        for name, decoder in parts.dense.items():
            if missing := set(supervision.levels) - set(decoder.levels):
                raise ValueError(
                    f"model.deep_supervision.levels names {sorted(missing)}, which the decoder of task {name!r} does "
                    f"not read; it reads {list(decoder.levels)}; correct the levels"
                )
        if not parts.dense:
            raise ValueError(
                f"model.deep_supervision would have no effect: none of {', '.join(parts.levels)} has a dense decoder; "
                "segmentation, depth and normals have; remove it"
            )

    def _freeze(self, patterns: Sequence[str]) -> None:
        """Stop what these names mean from learning. Raises ValueError for one that means nothing, or all."""
        for pattern in patterns:
            matched = [
                parameter
                for name, parameter in self.named_parameters()
                if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
            ]
            if not matched:
                known = [name for name, _ in self.named_modules() if name]
                raise ValueError(
                    f"model.freeze names {pattern!r}{did_you_mean(pattern, known)}, which matches no parameter; "
                    f"allowed are names of modules and parameters such as {', '.join(known[1:4])}, and patterns with * "
                    "and ?; correct it"
                )
            for parameter in matched:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(
                f"model.freeze {', '.join(patterns)} matches every parameter, so nothing would learn; some must; name "
                "fewer"
            )
        self.freeze_modules()

    def freeze_modules(self) -> None:
        """Let modules stay in evaluation mode from now on, all of whose parameters are frozen, with what is in them."""
        self.frozen_modules = tuple(_frozen_modules(self, ""))
        self.train(self.training)

    def train(self, mode: bool = True) -> "MultiTaskNet":
        """As of any module; what `freeze_modules` found stays in evaluation mode."""
        super().train(mode)
        for name in self.frozen_modules:
            self.get_submodule(name).eval()
        return self

    def _check_multiple(self, size: tuple[int, int], setting: str) -> None:
        multiple = self.size_multiple
        if size[0] % multiple or size[1] % multiple:
            up = [-(-side // multiple) * multiple for side in size]
            raise ValueError(
                f"{setting} is {size[0]}x{size[1]} px, but the network on encoder {self._encoder_name!r} needs "
                f"multiples of {multiple}; choose {up[0]}x{up[1]}"
            )

    def check_size(self, size: tuple[int, int], setting: str) -> None:
        """Raises ValueError when inputs of `size` = (H, W) cannot be evaluated; `setting` is where it comes from."""
        self._check_multiple(size, setting)
        self.encoder.check_size(*size)  # type: ignore[operator]

    @property
    def encoder(self) -> nn.Module:
        """The encoder inside the trunk, the first of several."""
        return self.trunk.encoders()[0]

    def encoders(self) -> list[nn.Module]:
        """Every encoder inside the trunk, for parameter groups."""
        return self.trunk.encoders()

    def shared(self, image: Tensor, color: Tensor | None = None) -> Any:
        """uint8 or float [B, in_chans, H, W] of 0..255 -> the shared maps. color: float32 [B, 3, 4], of RGB alone.

        As `Trunk.forward` gives them: by level, or by task and level where no maps are shared.
        """
        return self.trunk(normalise(image, self.mean, self.std, color))

    def decode(self, shared: Any, tasks: Sequence[str] | None = None) -> dict[str, Raw]:
        """Shared maps -> raw output by task; tasks: the decoders that run, None = all."""
        of_task = self.trunk.split(shared)
        names = [name for name in self.decoders if tasks is None or name in tasks]
        return {name: self.decoders[name](of_task[name]) for name in names}

    def forward(self, image: Tensor, tasks: Sequence[str] | None = None) -> dict[str, Raw]:
        """uint8 or float [B, in_chans, H, W] of 0..255, sides multiples of `size_multiple` -> raw output by task.

        tasks: the decoders that run; None = all. `keep` also leaves out what the trunk computes for the others.
        """
        return self.decode(self.shared(image), tasks)

    def with_initial(self, image: Tensor) -> tuple[dict[str, Raw], Mapping[str, Sequence[Raw]]]:
        """As `forward`, and the initial predictions: all that a training step takes losses of."""
        of_task, initial = self.split_with_initial(self.shared(image))
        return {name: decoder(of_task[name]) for name, decoder in self.decoders.items()}, initial

    def split_with_initial(self, shared: Any) -> tuple[Mapping[str, Maps], Mapping[str, Sequence[Raw]]]:
        """What each task's module reads, and raw initial or auxiliary predictions by task, which only losses need."""
        of_task, initial = self.trunk.split_with_initial(shared)
        if not self.auxiliary:
            return of_task, initial
        return of_task, {
            name: [layer(of_task[name]) for layer in layers.children()] for name, layers in self.auxiliary.items()
        }

    def keep(self, tasks: Sequence[str]) -> None:
        """Leave out what serves none of `tasks`, so that the other tasks cost nothing; for predictions."""
        for name in [name for name in self.tasks if name not in tasks]:
            del self.tasks[name], self.decoders[name]
        self.auxiliary.clear()
        self.trunk.keep(tasks)


class _LastLayer(Decoder):
    """No decoder at all: the map of one level as it is, for the task's last layer."""

    def build(self, in_channels: int) -> DenseMap:
        """See the base; the map has the stride of its level."""
        return _OneMap(self.levels[0], in_channels)


class _OneMap(DenseMap):
    def __init__(self, level: int, channels: int) -> None:
        super().__init__()
        self.level = level
        self.out_channels = channels

    def forward(self, maps: Maps) -> Tensor:
        return maps[self.level]


def _parts(
    spec: Model, tasks: Mapping[str, Task], spaces: Mapping[str, LabelSpace | None], size: tuple[int, int]
) -> Parts:
    def last_layers(name: str, levels: tuple[int, ...], channels: int) -> nn.ModuleList:
        task = tasks[name]
        reduced = [_reduced(task, some) for some in ([levels] if _fields(task, Head) else zip(levels))]
        return nn.ModuleList(one.build(channels, spaces[name]) for one in reduced if one is not task)

    return Parts(
        encoder=partial(spec.encoder.build, size),
        pyramid=spec.pyramid.build,
        decoder=lambda name, channels: tasks[name].build(channels, spaces[name]),
        last_layers=last_layers,
        levels={name: task.levels for name, task in tasks.items()},
        dense={name: decoder for name, task in tasks.items() for decoder in _fields(task, Decoder).values()},
        size=size,
        in_chans=spec.encoder.in_chans,
    )


def _fields(task: Task, kind: type[Any]) -> dict[str, Any]:
    """The task's settings of a kind, by field."""
    return {name: value for name in type(task).model_fields if isinstance(value := getattr(task, name), kind)}


def _reduced(task: Task, levels: tuple[int, ...]) -> Task:
    """The same task with its last layer alone on maps of `levels`; itself where it has neither decoder nor head."""
    changes: dict[str, Any] = {name: _LastLayer(levels=levels) for name in _fields(task, Decoder)}
    for name, head in _fields(task, Head).items():
        changes[name] = head.model_copy(update={"levels": levels, "num_convs": 0, "channels": 0})
    return task.model_copy(update=changes) if changes else task


def _frozen_modules(module: nn.Module, prefix: str) -> Iterator[str]:
    """Names of the outermost modules with parameters, none of which is trained."""
    for name, child in module.named_children():
        trained = [parameter.requires_grad for parameter in child.parameters()]
        if trained and not any(trained):
            yield prefix + name
        elif trained:
            yield from _frozen_modules(child, f"{prefix}{name}.")


def build_model(
    spec: Model, tasks: Mapping[str, Task], spaces: Mapping[str, LabelSpace | None], size: tuple[int, int]
) -> MultiTaskNet:
    """The network for padded inputs of `size` = (H, W). Raises ValueError when size and encoder do not fit."""
    return MultiTaskNet(spec, tasks, spaces, size)


class LossNet(nn.Module):
    """The network together with its losses: what a training step runs forward, what is compiled or distributed."""

    def __init__(
        self,
        net: MultiTaskNet,
        cut: bool,
        soft_losses: Mapping[str, SoftLoss] | None = None,
        learning: Sequence[str] | None = None,
        feature_weight: float = 1.0,
    ) -> None:
        """soft_losses: of the tasks that learn from teachers; learning: the tasks that have a loss, None: all.

        feature_weight: of the part that keeps distances between features, where teachers give theirs
        """
        super().__init__()
        self.net = net
        self.cut = cut
        self.soft_losses = dict(soft_losses or {})
        self.tasks = {name: task for name, task in net.tasks.items() if learning is None or name in learning}
        self.feature_weight = feature_weight
        self.levels: tuple[int, ...] = ()
        """Of the shared maps of the last forward pass, where the graph is cut."""

    def forward(
        self,
        image: Tensor,
        targets: Mapping[str, Mapping[str, Tensor]],
        labelled: Mapping[str, Tensor],
        totals: Mapping[str, Mapping[str, Tensor]] | None,
        color: Tensor | None = None,
        soft: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> Any:
        """Loss parts by task; where the graph is cut, also the shared maps and their detached copies.

        image, targets, labelled, color: as in a `Batch`; totals: see `ops.ranks.step_totals`; soft: what teachers say,
        by task, see `tasks.base.Task.distill`. Returns (dict of dicts of scalars, list, list). Without totals: only the
        counts of `counts`.
        """
        if totals is None:  # through forward, where FSDP gathers the weights
            return self.counts(image, targets, labelled, color)
        shared = self.shared(image, color)
        leaves = {k: m.detach().requires_grad_() for k, m in shared.items()} if self.cut else shared
        maps, initial = self.split(leaves)
        soft = soft or {}
        parts = {
            name: self.of_task(
                name, maps[name], targets[name], labelled[name], totals[name], initial.get(name, ()), soft.get(name)
            )
            for name in self.tasks
        }
        if features := soft.get(FEATURES):
            first = next(iter(self.tasks))
            with torch.autocast(image.device.type, enabled=False):
                loss = distance_preservation(leaves, features, totals[first]["soft_pairs"])
            parts[first] = parts[first] | {f"{SOFT}features": self.feature_weight * loss}
        if not self.cut:  # maps handed out would make the compiler add a gradient of zeros to each
            return parts, [], []
        self.levels = tuple(shared)
        return parts, list(shared.values()), list(leaves.values())

    def counts(
        self,
        image: Tensor,
        targets: Mapping[str, Mapping[str, Tensor]],
        labelled: Mapping[str, Tensor],
        color: Tensor | None,
    ) -> Counts:
        """What tasks count of their predictions, see `tasks.base.Task.count_predictions`; other decoders do not run."""
        maps, initial = self.net.split_with_initial(self.net.shared(image, color))
        counts: Counts = {}
        for name, task in self.tasks.items():
            if not task.counts_predictions:
                continue
            raw = self.net.decoders[name](maps[name])
            with torch.autocast(image.device.type, enabled=False):
                counts[name] = task.count_predictions(raw, dict(targets[name]), labelled[name])
                for number, prediction in enumerate(initial.get(name, ())):
                    of_initial = task.count_predictions(prediction, dict(targets[name]), labelled[name])
                    counts[name] |= {f"initial_{number}_{key}": count for key, count in of_initial.items()}
        return counts

    def shared(self, image: Tensor, color: Tensor | None) -> Any:
        """The part before the cut."""
        return self.net.shared(image, color)

    def split(self, shared: Any) -> tuple[Mapping[str, Maps], Mapping[str, Sequence[Raw]]]:
        """What lies between the cut and the tasks' own modules."""
        return self.net.split_with_initial(shared)

    def of_task(
        self,
        name: str,
        maps: Maps,
        targets: Mapping[str, Tensor],
        labelled: Tensor,
        totals: Mapping[str, Tensor],
        initial: Sequence[Raw] = (),
        soft: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """One task behind the cut: what its decoder reads -> its loss parts.

        Those of its initial and auxiliary predictions are added up as `initial_<part>`, which labels alone teach; those
        against teachers are called `soft_<part>`.
        """
        raw, task = self.net.decoders[name](maps), self.net.tasks[name]
        loss = task.loss
        with torch.autocast(labelled.device.type, enabled=False):  # losses in float32
            parts = loss(raw, dict(targets), labelled, dict(totals))
            for number, prediction in enumerate(initial):
                for part, value in loss(prediction, dict(targets), labelled, _of_initial(totals, number)).items():
                    weighted = self.net.initial_weight * value
                    key = f"initial_{part}"
                    parts[key] = parts[key] + weighted if key in parts else weighted
            if soft is not None:
                settings = self.soft_losses[name]
                taught = task.distill(raw, dict(soft), dict(totals), settings)
                parts = parts | {SOFT + part: settings.weight * value for part, value in taught.items()}
        return parts

    def compile_with(self, one_graph: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace what can be one graph by `one_graph` of it: everything, or the trunk and each task, where cut."""
        if self.cut:  # each task's backward runs on its own, and the copies at the cut must be leaves
            self.shared = one_graph(self.shared)  # type: ignore[method-assign]
            if self.net.trunk.splits_by_modules or self.net.auxiliary:
                self.split = one_graph(self.split)  # type: ignore[method-assign]
            self.of_task = one_graph(self.of_task)  # type: ignore[method-assign]
        else:
            self.forward = one_graph(self.forward)  # type: ignore[method-assign]


def _of_initial(totals: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The totals for an initial prediction: where predictions are counted, its own (see `LossNet.counts`)."""
    prefix = f"initial_{number}_"
    own = {key.removeprefix(prefix): value for key, value in totals.items() if key.startswith(prefix)}
    return {**totals, **own}
