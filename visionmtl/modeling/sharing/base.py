"""The sharing contract: how tasks share the encoder and pyramid."""

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from visionmtl.config.registry import Configurable
from visionmtl.structures import Maps


class Trunk(nn.Module):
    """Everything before the decoders, cut where the shared representation lies."""

    out_channels: int
    """Channels of every map that `split` hands out."""
    shared_maps: bool = True
    """False: there are no maps that all tasks read, so their gradients are compared on the shared parameters."""
    joins_tasks: bool = False
    """True: tasks share a graph behind the shared maps, which the backward of one must leave to the next."""

    def forward(self, image: Tensor) -> Maps:
        """Normalised float [B, 3, H, W] -> the shared maps, on which gradients of tasks are compared."""
        raise NotImplementedError

    def split(self, shared: Maps) -> Mapping[str, Maps]:
        """Shared maps -> what each task's decoder reads, by task name."""
        raise NotImplementedError

    def shared_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that more than one task's loss reaches."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


class Sharing(Configurable, package="visionmtl.modeling.sharing"):
    """Frozen settings of one way of sharing."""

    @abstractmethod
    def build(self, encoder: nn.Module, pyramid: nn.Module, levels: Mapping[str, tuple[int, ...]]) -> Trunk:
        """encoder: image -> Maps; pyramid: Maps -> Maps with `out_channels`; levels: what each task reads."""
