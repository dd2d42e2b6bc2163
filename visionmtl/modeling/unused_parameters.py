"""The forward pass at the start of a run: what cannot be trained is refused, what would never learn is frozen."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visionmtl.ops.ranks import num_ranks


def freeze_unused_parameters(
    net: nn.Module,
    size: tuple[int, int],
    device: torch.device,
    batch_size: int = 2,
    forward: Callable[[Tensor], Any] | None = None,
) -> list[str]:
    """Stop what no output of a training step depends on from being trained; returns the names.

    It would never learn, and processes would wait for its gradients. Some encoders compute more than is read: of
    HRNet's maps the coarse ones, when tasks read the fine ones. Found by looking along the graph of one forward pass
    of black images of `size` = (H, W), two of them or one where `batch_size` is 1; random numbers, statistics and
    gradients stay as they are. forward: image -> all that a step takes losses of; None: the net's own.

    Raises ValueError where the encoder fails at this size, or a normalisation has only one value to normalise.
    """
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    was_training = net.training
    image = torch.zeros(min(batch_size, 2), getattr(net, "in_chans", 3), *size, dtype=torch.uint8, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        with _explained(net.train(), size):
            outputs = (forward or net)(image)
        read = parameters_behind(outputs)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    net.train(was_training)

    unused = [name for name, p in net.named_parameters() if p.requires_grad and id(p) not in read]
    for name in unused:
        net.get_parameter(name).requires_grad_(False)
    return unused


def check_evaluates(net: nn.Module, size: tuple[int, int], device: torch.device) -> None:
    """Raise ValueError where the net's encoder cannot take an image of `size` = (H, W) in evaluation."""
    was_training = net.training
    with torch.no_grad(), _explained(net.eval(), size):
        net(torch.zeros(1, getattr(net, "in_chans", 3), *size, dtype=torch.uint8, device=device))
    net.train(was_training)


@contextmanager
def _explained(net: nn.Module, size: tuple[int, int]) -> Iterator[None]:
    """Errors of a forward pass that a setting can cure become ValueErrors that name it."""
    encoder = getattr(net, "encoder", None)
    inside = False

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    hooks = []
    if encoder is not None:
        hooks = [encoder.register_forward_pre_hook(enter), encoder.register_forward_hook(leave)]
    hooks += [m.register_forward_pre_hook(_check_values(name)) for name, m in net.named_modules() if _learns(m)]
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # how timm's models and torch's operators refuse a shape
        if not inside:
            raise
        raise ValueError(
            f"encoder {getattr(encoder, 'name', '')} fails at {size[0]}x{size[1]} px: "
            f"{str(error) or 'an assertion of timm fails'}; allowed are sizes that this model takes, for some only its "
            "own or square ones; change data.size, or choose another model.encoder.name"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _learns(module: nn.Module) -> bool:
    """Whether it normalises by the statistics of what it sees."""
    return isinstance(module, _BatchNorm | nn.GroupNorm) and module.training


def _check_values(name: str) -> Any:
    """A forward pre-hook that raises ValueError where `name` would normalise a single value, which leaves 0."""

    def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if isinstance(module, nn.GroupNorm):
            few, kind = x.numel() == x.shape[0] * module.num_groups, "group"
        else:
            shared = num_ranks() if "Sync" in type(module).__name__ else 1
            few, kind = x.numel() * shared == x.shape[1], "channel"
        if few:
            raise ValueError(
                f"{name} has one value a {kind} to normalise: its map is 1x1 px, from one image a process; two or more "
                "are needed; set train.batch_size to at least 2, or choose norm: group (with groups of 2 channels or "
                "more), or a larger data.size"
            )

    return check


def parameters_behind(outputs: Any) -> set[int]:
    """Ids of the parameters that nested outputs were computed from."""
    return {id(parameter) for parameter in _leaves(outputs)}


def _leaves(outputs: Any) -> Iterator[Tensor]:
    waiting = [tensor.grad_fn for tensor in _tensors(outputs)]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [before for before, _ in node.next_functions]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
