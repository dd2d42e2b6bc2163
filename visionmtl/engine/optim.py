"""How parameters move: groups with their own learning rate, the schedule over steps, and the moving average."""

import bisect
import copy
import math
import re
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from visionmtl.balance.base import memory_order
from visionmtl.ops.ranks import own_share
from visionmtl.run import Optim

Net = TypeVar("Net", bound=nn.Module)


def lr_factor(spec: Optim, step: int, total_steps: int, steps_per_epoch: int = 1) -> float:
    """The multiple of every group's learning rate for optimiser step `step` = 0 ... total_steps - 1.

    Warm-up is linear, (step + 1) / warmup steps, and the schedule runs over the steps that remain, so that the last
    step of cosine and poly has exactly `min_lr_factor`. Milestones are fractions of the whole run.
    """
    warmup = num_warmup_steps(spec, steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(total_steps - 1 - warmup, 1), 1.0)

    if spec.schedule == "constant":
        return 1.0
    if spec.schedule == "step":
        passed = bisect.bisect_right(milestone_steps(spec, total_steps), step)
        return (spec.gamma or 0.1) ** passed
    curve = (1 + math.cos(math.pi * done)) / 2 if spec.schedule == "cosine" else (1 - done) ** (spec.power or 0.9)
    lowest = spec.min_lr_factor or 0.0
    return lowest + (1 - lowest) * curve


def milestone_steps(spec: Optim, total_steps: int) -> list[int]:
    """The steps from which on `schedule: step` lowers the rate once more."""
    return [round(fraction * total_steps) for fraction in spec.milestones or (2 / 3, 11 / 12)]


def num_warmup_steps(spec: Optim, steps_per_epoch: int) -> int:
    """Optimiser steps of the warm-up; 0 without one."""
    if spec.warmup_epochs:
        return max(1, round(spec.warmup_epochs * steps_per_epoch))
    return spec.warmup_steps or 0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give each group its own base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def build_optimizer(spec: Optim, net: nn.Module, balancer: nn.Module | None = None) -> torch.optim.Optimizer:
    """The optimiser over everything trainable in `net` and `balancer`, fused into one kernel a step.

    net: all of its `encoders()` count as encoder.
    """
    groups = parameter_groups(spec, net, balancer)
    if spec.name == "sgd":
        momentum = 0.9 if spec.momentum is None else spec.momentum
        nesterov = momentum > 0 if spec.nesterov is None else spec.nesterov
        whole = all(own_share(parameter) is parameter for group in groups for parameter in group["params"])
        # torch's fused SGD knows no sharded tensors (2.15: "does not have a sharding strategy"); None lets it choose
        optimizer = torch.optim.SGD(groups, lr=spec.lr, momentum=momentum, nesterov=nesterov, fused=whole or None)
        if momentum:
            # torch (2.15) makes fused ones by empty_like in the first step, which leaves them so if that step is
            # skipped; a first step from zeros gives the same numbers
            for group in groups:
                for parameter in group["params"]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    return _AdamW(groups, lr=spec.lr, betas=spec.betas or (0.9, 0.999), fused=True)


class _AdamW(torch.optim.AdamW):
    """torch's, which on a CPU is shown weights of convolutions in channels_last as they lie in memory.

    There torch (2.15) copies every gradient that is not contiguous, a fiftieth of a step of ResNet-50, does not read
    the copy, and takes gradient and moments for arranged like the weight, whatever they are.
    """

    def _init_group(
        self, group: dict[str, Any], weights: list[Tensor], gradients: list[Tensor], *moments: list[Tensor]
    ) -> bool:
        found: bool = super()._init_group(group, weights, gradients, *moments)
        for at, weight in enumerate(weights):
            if weight.device.type == "cpu" and weight.dim() == 4 and not weight.is_contiguous():
                order = memory_order(weight)
                weights[at], gradients[at] = weight.permute(order), gradients[at].permute(order).contiguous()
                for tensors in moments:
                    if tensors and tensors[at].dim() == 4:  # else the number of steps
                        tensors[at] = tensors[at].permute(order)
        return found


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take the moments of a checkpoint; learning rates and decay stay those of `optimizer`.

    Fused kernels read moments in the memory order of their weight, which another run may have stored otherwise.
    """
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    for weight, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                moments[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def clip_next_step(optimizer: torch.optim.Optimizer, largest: float) -> Tensor:
    """Let the next step see gradients whose L2 norm, all together, is `largest` at most. Returns the norm before.

    What `torch.nn.utils.clip_grad_norm_` does; fused optimisers divide as they read, which saves a pass over memory.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = _norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if not optimizer.defaults["fused"]:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    elif largest < math.inf:
        scale = ((norm + 1e-6) / largest).clamp(min=1)
        optimizer.grad_scale = scale.to(torch.float32)  # type: ignore[attr-defined]  # whatever the weights are
    return norm


def _norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm of all of them together."""
    if all(own_share(one) is one and one.device.type == "cpu" and one.dtype == torch.float32 for one in gradients):
        # a product with itself runs at the speed of memory, twice that of torch's vector_norm (2.15)
        flat = [one.permute(memory_order(one)).reshape(-1) for one in gradients]
        return torch.stack([one.dot(one) for one in flat]).sum().sqrt() if flat else torch.zeros(())
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # DTensor


def skip_next_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Let the optimiser's next step change nothing, neither weights nor moments, if `skip`, a bool scalar, is true.

    The host waits for nothing: fused optimisers look at `found_inf` on the device, as they do for torch's GradScaler.
    SGD over DTensors is not fused, and has no such switch: see `unguarded`.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]


def unguarded(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights and moments that `skip_next_step` cannot keep as they are."""
    if optimizer.defaults["fused"]:
        return []
    moments = [value for of_one in optimizer.state.values() for value in of_one.values() if isinstance(value, Tensor)]
    return [*(parameter for group in optimizer.param_groups for parameter in group["params"]), *moments]


def parameter_groups(spec: Optim, net: nn.Module, balancer: nn.Module | None = None) -> list[dict[str, Any]]:
    """Parameters by (learning rate, weight decay), in the net's order; `base_lr` is what `set_lr` multiplies.

    Without decay are the balancer's parameters, what a module lists in `no_decay_names`, and what has one axis or
    none: biases, norms, scales, and gains such as NFNet's [C, 1, 1, 1] (not a `weight`, which may be a kernel).
    """
    factors = _encoder_factors(spec, net)
    exempt = {id(p) for module in net.modules() for p in _exempt(module)}
    if balancer is not None:
        exempt |= {id(p) for p in balancer.parameters()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in (*net.named_parameters(), *(balancer.named_parameters() if balancer is not None else ())):
        if not parameter.requires_grad:
            continue
        num_axes = parameter.ndim if name.endswith("weight") else sum(length > 1 for length in parameter.shape)
        base_lr = spec.lr * factors.get(id(parameter), 1.0)
        decay = spec.weight_decay if num_axes > 1 and id(parameter) not in exempt else 0.0
        fresh = {"params": [], "lr": base_lr, "base_lr": base_lr, "weight_decay": decay}
        groups.setdefault((base_lr, decay), fresh)["params"].append(parameter)
    if not groups:
        raise ValueError("nothing is trainable: every parameter is frozen; leave some part of the net unfrozen")
    return list(groups.values())


def _exempt(module: nn.Module) -> Iterator[nn.Parameter]:
    if names := getattr(module, "no_decay_names", ()):
        yield from (parameter for name, parameter in module.named_parameters() if name in names)


def _encoder_factors(spec: Optim, net: nn.Module) -> dict[int, float]:
    """Learning rate multiple of each encoder parameter, by id.

    A layer is a numbered block, or what stands between blocks (stem, a stage's downsampling); layers are counted in
    the order in which timm declares them, which is the order of computation. The last layer has encoder_lr_factor,
    each one before it `layer_decay` times that of its successor.
    """
    encoders: list[nn.Module] = net.encoders() if hasattr(net, "encoders") else []  # type: ignore[operator]
    if not encoders:
        if spec.layer_decay is not None or spec.encoder_lr_factor != 1:
            raise ValueError(
                f"{type(net).__name__} has no `encoders`, so encoder_lr_factor and layer_decay do nothing; "
                "remove them from optim"
            )
        return {}
    factors: dict[int, float] = {}
    below_top_of_trained: set[int] = set()
    for encoder in encoders:
        by_layer = layers(encoder)
        if spec.layer_decay is not None and len(by_layer) < 2:
            raise ValueError(
                f"layer_decay is {spec.layer_decay}, but the encoder has {len(by_layer)} layer, so it does nothing; "
                "two or more are needed; remove optim.layer_decay"
            )
        for below_top, layer in enumerate(reversed(by_layer.values())):
            factor = spec.encoder_lr_factor * (spec.layer_decay or 1.0) ** below_top
            factors.update((id(parameter), factor) for parameter in layer)
            if any(parameter.requires_grad for parameter in layer):
                below_top_of_trained.add(below_top)
    if spec.encoder_lr_factor != 1 and not below_top_of_trained:
        raise ValueError(
            f"optim.encoder_lr_factor is {spec.encoder_lr_factor:g}, but the whole encoder is frozen, so it would have "
            "no effect; set it to 1, or freeze less of the encoder"
        )
    if spec.layer_decay is not None and not any(below_top_of_trained):
        raise ValueError(
            f"optim.layer_decay is {spec.layer_decay:g}, but the encoder is frozen, or all of it below its last layer, "
            "so it would have no effect; set it to null, or freeze less of the encoder"
        )
    return factors


_ADDED = {"parametrizations", "adapter"}
"""Under which names LoRA and adapters stand in the layer that they change."""


def layers(encoder: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The encoder's parameters by layer, first layer first, by a rule that holds for every timm family.

    timm's `group_matcher` is missing in some families and stops at whole stages in others (GCViT, DPN), so names
    decide: a layer is the path to the second numbered module ("blocks.2.1", "layer3.0", "s4.b7") or to the only one
    ("model.blocks.11"), leaf modules ("conv1") not counted. What precedes the first such path is the stem; what closes
    a stage or the encoder (a final norm) belongs to the layer before it. Where nothing is numbered but leaf modules
    (VGG's one sequence), each convolution begins a layer. timm declares parameters in the order of computation.
    """
    by_layer: dict[str, list[nn.Parameter]] = {}
    current = "stem"
    for name, parameter in encoder.named_parameters():
        parts = name.split(".")[:-1]
        for added in _ADDED & set(parts):
            parts = parts[: parts.index(added)]
        inner = [child for key, child in encoder.get_submodule(".".join(parts)).named_children() if key not in _ADDED]
        if not any(True for child in inner for _ in child.parameters()):
            parts = parts[:-1]
        numbered = [at for at, part in enumerate(parts) if re.search(r"\d", part)]
        layer = ".".join(parts[: numbered[:2][-1] + 1]) if numbered else current
        if not current.startswith(f"{layer}."):  # what closes a stage belongs to its last block
            current = layer
        by_layer.setdefault(current, []).append(parameter)
    if len(by_layer) == 1:
        by_layer = {}
        for name, parameter in encoder.named_parameters():
            if parameter.ndim > 1 or not by_layer:
                current = name.rpartition(".")[0]
            by_layer.setdefault(current, []).append(parameter)
    return by_layer


class Ema(Generic[Net]):
    """A moving average of a module's weights, kept on its device and in evaluation mode.

    The decay of step n = 0, 1 ... warms up as min(decay, (1 + n) / (10 + n)): the random start is soon forgotten.
    every: the steps that are taken at once, with the decay of the last of them to the power of their number. The
    average is a pass over all weights, and its lag of `every` steps is nothing beside the 1 / (1 - decay) it spans.
    Buffers of floats (BatchNorm statistics) are averaged too, buffers of integers copied.
    Create it when the module is on its device and in its memory format: the tensors are looked up once.
    copied: a copy of the module to keep the average in, where `deepcopy` cannot make one (FSDP).
    """

    def __init__(self, module: Net, decay: float, every: int = 1, copied: Net | None = None) -> None:
        self.module = (copied or copy.deepcopy(module)).eval().requires_grad_(False)
        self.decay, self.every = decay, every
        self.updates = self._taken = 0
        averaged, sources = self._pairs(module)
        # -inf in attention masks would turn into NaN (inf - inf); looked at once, here, because looking waits
        blends = [theirs.is_floating_point() and bool(theirs.isfinite().all()) for theirs in sources]
        self._blended = [(a, b) for a, b, blend in zip(averaged, sources, blends, strict=True) if blend]
        self._copied = [(a, b) for a, b, blend in zip(averaged, sources, blends, strict=True) if not blend]

    def _pairs(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        ours = [*self.module.parameters(), *self.module.buffers()]
        theirs = [*module.parameters(), *module.buffers()]
        return [own_share(tensor.detach()) for tensor in ours], [own_share(tensor.detach()) for tensor in theirs]

    @torch.no_grad()
    def update(self, now: bool = False) -> None:
        """Count a step, and after `every` of them, or `now`, move towards the module's present weights.

        Counts on the CPU; nothing waits for the device.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if self.updates % self.every and not now:
            return
        decay **= self.updates - self._taken
        self._taken = self.updates
        for pairs, operation in ((self._blended, "lerp"), (self._copied, "copy")):
            if pairs:
                ours, theirs = (list(tensors) for tensors in zip(*pairs, strict=True))
                if operation == "lerp":
                    torch._foreach_lerp_(ours, theirs, 1 - decay)
                else:
                    torch._foreach_copy_(ours, theirs)

    def state_dict(self) -> dict[str, Any]:
        """Weights, the number of steps, and how many of them the weights have taken."""
        return {"module": self.module.state_dict(), **self.counts()}

    def counts(self) -> dict[str, int]:
        """The state but the weights."""
        return {"updates": self.updates, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo `state_dict`, strictly."""
        self.module.load_state_dict(state["module"])
        self.load_counts(state)

    def load_counts(self, state: dict[str, Any]) -> None:
        """Undo `counts`; older files took each step."""
        self.updates = int(state["updates"])
        self._taken = int(state.get("taken", self.updates))
