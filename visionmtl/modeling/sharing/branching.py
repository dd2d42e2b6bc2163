"""Branching: the tasks share the network up to a point, and from there on each has its own."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from visionmtl.modeling.decoders.base import OUT_LEVEL, Decoder
from visionmtl.modeling.encoder import FINEST_READ
from visionmtl.modeling.sharing.base import Parts, PyramidTrunk, Sharing, Trunk
from visionmtl.structures import Maps


class Branching(Sharing, frozen=True):
    """Where the tasks part: inside the encoder, before the pyramid, or behind one dense decoder.

    Vandenhende et al. 2020, arXiv:1904.02920, branch inside the encoder, at points that they search; here it is a
    setting. One decoder for all dense tasks is what hard sharing of a whole encoder-decoder means in Kendall et al.
    2018, arXiv:1705.07115.
    """

    type: Literal["branching"] = "branching"
    at: int | Literal["pyramid", "decoder"] = "decoder"
    """An encoder level, 2 to 4 in most: stages up to the map of stride 2**level are shared, later ones and the pyramid
    are each task's own. "pyramid": the encoder is shared. "decoder": encoder and pyramid are shared, and the body of
    one dense decoder, which runs once; each dense task has its last layer, other tasks all of their own module."""
    decoder: Decoder | None = None
    """The shared dense decoder; unset: that of the dense tasks, which must then be the same."""

    def model_post_init(self, context: object) -> None:
        """Only a shared decoder has settings."""
        super().model_post_init(context)
        if self.decoder is not None and self.at != "decoder":
            raise ValueError(
                f"sharing branching has a decoder, but at: {self.at}, so it would have no effect; it belongs to "
                "at: decoder; remove it, or change at"
            )

    def build(self, parts: Parts) -> Trunk:
        """See the base."""
        if self.at == "decoder":
            return _SharedDecoder(parts, self._decoder_of(parts))
        return _OwnPyramids(parts) if self.at == "pyramid" else _OwnStages(parts, self.at)

    def _decoder_of(self, parts: Parts) -> Decoder:
        if not parts.dense:
            raise ValueError(
                f"sharing branching shares a dense decoder, but none of the tasks {', '.join(parts.levels)} has one; "
                "at least one must; set model.sharing.at to pyramid or to an encoder level, or choose hard"
            )
        first, *others = parts.dense.values()
        if self.decoder is None and any(other != first for other in others):
            raise ValueError(
                f"the decoders of {', '.join(parts.dense)} differ, and sharing branching needs one for all of them; "
                "set model.sharing.decoder, or give the tasks the same decoder"
            )
        return self.decoder or first


class _SharedDecoder(PyramidTrunk):
    def __init__(self, parts: Parts, decoder: Decoder) -> None:
        own_levels = dict(parts.levels) | dict.fromkeys(parts.dense, decoder.levels)
        super().__init__(parts, tuple(sorted({level for levels in own_levels.values() for level in levels})))
        self.levels = own_levels
        self.dense = decoder.build(self.out_channels)
        self.dense_tasks = tuple(parts.dense)
        self.joins_tasks = len(self.dense_tasks) > 1

    def split(self, shared: Maps) -> dict[str, Maps]:
        of_task = super().split(shared)
        dense = [task for task in self.levels if task in self.dense_tasks]
        if dense:
            decoded = self.dense(shared)
            of_task |= {task: {OUT_LEVEL: decoded} for task in dense}
        return of_task

    def decoder(self, task: str, parts: Parts) -> nn.Module:
        """A dense task's is its last layer."""
        if task not in self.dense_tasks:
            return super().decoder(task, parts)
        return parts.last_layers(task, (OUT_LEVEL,), self.dense.out_channels)[0]


class _OwnPyramids(Trunk):
    of_each_task = ("pyramid",)

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.encoder = encoder = parts.encoder(parts.all_levels[-1])
        self.read = tuple(level for level in encoder.channels if level >= FINEST_READ)
        self.pyramid = nn.ModuleDict(
            {task: parts.pyramid(encoder.channels, levels) for task, levels in parts.levels.items()}
        )
        self.out_channels = next(iter(self.pyramid.values())).out_channels  # type: ignore[assignment]

    def forward(self, image: Tensor) -> Maps:
        maps = self.encoder(image)
        return {level: maps[level] for level in self.read}

    def split(self, shared: Maps) -> Mapping[str, Maps]:
        return {task: pyramid(shared) for task, pyramid in self.pyramid.items()}


class _OwnStages(Trunk):
    of_each_task = ("branches", "pyramid")

    def __init__(self, parts: Parts, at: int) -> None:
        super().__init__(parts)
        self.encoder = shared = parts.encoder(parts.all_levels[-1])
        stages: tuple[int, ...] = shared.split_stages("sharing branching")
        if at not in stages[:-1]:
            raise ValueError(
                f"sharing branching parts at encoder level {at}, but the stages of {shared.name} end at levels "
                f"{stages}; allowed are {', '.join(map(str, stages[:-1]))}, pyramid and decoder; correct "
                "model.sharing.at"
            )
        self.shared_stages = tuple(level for level in stages if level <= at)
        self.own_stages = {
            task: tuple(level for level in stages if at < level <= levels[-1]) for task, levels in parts.levels.items()
        }
        shared.drop_stages([level for level in stages if level > at])
        branches: dict[str, Any] = {
            task: parts.encoder(parts.all_levels[-1]) for task, own in self.own_stages.items() if own
        }
        for task, branch in branches.items():
            branch.split_stages("sharing branching")
            branch.drop_stages([level for level in stages if level not in self.own_stages[task]])
        self.branches = nn.ModuleDict(branches)
        self.pyramid = nn.ModuleDict(
            {task: parts.pyramid(shared.channels, levels) for task, levels in parts.levels.items()}
        )
        self.out_channels = next(iter(self.pyramid.values())).out_channels  # type: ignore[assignment]

    def encoders(self) -> list[nn.Module]:
        """The shared part and the tasks' own."""
        return [self.encoder, *self.branches.values()]

    def forward(self, image: Tensor) -> Maps:
        shared: Any = self.encoder
        shared.check_size(*image.shape[-2:])
        return _run(shared, self.shared_stages, image)

    def split(self, shared: Maps) -> Mapping[str, Maps]:
        own = {
            task: _run(branch, self.own_stages[task], shared[self.shared_stages[-1]])
            for task, branch in self.branches.items()
        }
        return {task: pyramid(shared | own.get(task, {})) for task, pyramid in self.pyramid.items()}


def _run(encoder: Any, stages: tuple[int, ...], x: Tensor) -> Maps:
    maps: Maps = {}
    for level in stages:
        maps[level] = x = encoder.run_stage(level, x)
    return maps
