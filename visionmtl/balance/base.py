"""The balancing contract: given one step's losses, and the graph behind them, fill every gradient."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from visionmtl.balance.conflict import ConflictTrace
from visionmtl.config.registry import Configurable, EachOnce
from visionmtl.ops.ranks import num_ranks, sum_over_ranks


@dataclass(frozen=True, slots=True)
class Step:
    """What a balancer may look at. Where the graph is cut, `shared` and `leaves` hold the same values."""

    losses: Mapping[str, Tensor]  # by task: float32 scalar, divided by the labelled items of the whole optimiser step
    shared: Sequence[Tensor]  # the trunk's output, attached to its graph; empty when the balancer needs no cut
    leaves: Sequence[Tensor]  # what the decoders read; empty likewise
    scale: Tensor | float = 1.0  # fp16 loss scale; multiplies every gradient
    labelled: Mapping[str, Tensor] | None = None  # by task: bool scalar, whether the step has a label; None: all have
    share: float = 1.0  # 1 / number of micro-batches; the losses are divided already
    last: bool = True  # whether it is the last micro-batch of its optimiser step: then methods update their state
    shared_parameters: Sequence[nn.Parameter] = ()  # what more than one task's loss reaches
    joins_tasks: bool = False
    """Whether losses of two tasks pass through one module behind the cut (PAD-Net, MMoE, one dense decoder): backward
    then needs retain_graph."""
    levels: Sequence[int] = ()  # of `shared`, where the graph is cut
    parameters: Sequence[nn.Parameter] = ()  # all that the losses reach; looked at by `rescales_decoder_gradients`
    label_shares: Mapping[str, Tensor] | None = None
    """By task, which part of the step's labelled images this micro-batch has; None: `share` of each. A loss divided by
    it estimates that of the whole step."""


class Balancer(nn.Module):
    """The state of a method, if it has any; saved in checkpoints, its parameters are trained."""

    needs_cut: bool = False
    """True when the method wants each task's gradient on the shared maps."""
    needs_parameters: bool = False
    """True when it wants each task's gradient on the shared parameters: one backward a task through everything.
    DistributedDataParallel averages one backward only, so whoever calls `backward` averages all gradients afterwards.
    """
    rescales_decoder_gradients: bool = False
    """True when decoders' gradients are multiplied by the task weights, which are known only after those gradients
    exist. Gradients of earlier micro-batches are set aside meanwhile. DistributedDataParallel would average too early,
    so whoever calls `backward` averages all gradients after the last one.
    """

    def backward(self, step: Step) -> Mapping[str, Tensor]:
        """Add to `.grad` of every parameter of trunk, decoders and the balancer itself.

        Gradients lie in memory as their parameters do: torch's fused optimisers do not look, and would shuffle others.
        Returns the weight given to each task (float scalars, detached), for the log. No host waits.
        """
        raise NotImplementedError

    def diagnostics(self) -> Mapping[str, Tensor]:
        """What the method knows of the tasks' gradients in the last steps: float [T, T] on the device, by name."""
        return {}


class Balance(Configurable, package="visionmtl.balance"):
    """Frozen settings of one balancing method."""

    @abstractmethod
    def build(self, weights: Mapping[str, float]) -> Balancer:
        """weights: each task's configured weight, in the order of the config."""

    def without_shared_maps(self) -> Self:
        """The method for a network in which no map is shared by all tasks; ValueError where it needs one."""
        return self

    def check_levels(self, levels: Sequence[int]) -> None:
        """Raise ValueError where settings name levels that the shared maps do not have."""


class _State:
    """Undoes what a method did to its buffers where that must not last: in all but the last micro-batch of a step,
    and in a step whose values are not finite, which the optimiser skips."""

    def __init__(self, method: nn.Module) -> None:
        self._before = [(buffer, buffer.clone()) for buffer in method.buffers()]

    def settle(self, keep: Tensor | bool) -> None:
        """keep: bool scalar, whether the changes stay."""
        for buffer, before in self._before:
            buffer.copy_(before if keep is False else torch.where(torch.as_tensor(keep), buffer, before))


def _own_weights(weights: Mapping[str, float]) -> nn.Buffer:
    """[T] configured weights; not saved, since they come from the config."""
    return nn.Buffer(torch.tensor(list(weights.values()), dtype=torch.float64), persistent=False)


def _losses_of_step(values: Tensor, step: Step, tasks: Sequence[str]) -> Tensor:
    """[T] the losses of the whole step, as those of this micro-batch tell them. values: of all ranks."""
    share = torch.full_like(values, step.share)
    if step.label_shares is not None:
        of_labels = torch.stack([step.label_shares[task] for task in tasks]).to(values)
        share = torch.where(of_labels > 0, of_labels, share)
    return values / share


def _flags(step: Step, tasks: Sequence[str], device: torch.device) -> Tensor:
    """bool [T], whether the step has a label of each task on any rank."""
    if step.labelled is None:
        return torch.ones(len(tasks), dtype=torch.bool, device=device)
    return torch.stack([step.labelled[task] for task in tasks])


# ---- weights from losses ----


class LossRule(nn.Module):
    """A loss weighting as arithmetic on the device; buffers are its state.

    losses: float64 [T], of all ranks, as for a whole optimiser step; present: bool [T], False where the loss is 0
    because nobody labelled the task. What comes out for absent tasks is not used.
    """

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        """The weights, float64 [T]; the state stays."""
        raise NotImplementedError

    def update(self, losses: Tensor, present: Tensor) -> None:
        """Take note of an optimiser step: its losses, summed over the micro-batches."""


class LossWeighting(Balance):
    """Settings common to the methods that see the values of the losses only: one backward of their weighted sum.

    A task's configured weight multiplies what the method gives it.
    """

    @abstractmethod
    def rule(self, tasks: Sequence[str]) -> LossRule:
        """The method."""

    def build(self, weights: Mapping[str, float]) -> Balancer:
        return _Weighted(weights, self.rule(list(weights)))


class _Weighted(Balancer):
    def __init__(self, weights: Mapping[str, float], rule: LossRule) -> None:
        super().__init__()
        self.tasks = list(weights)
        self.own = _own_weights(weights)
        self.rule = rule
        self.sums = nn.Buffer(torch.zeros(len(weights), dtype=torch.float64), persistent=False)
        """Losses of the micro-batches so far."""
        self.latest = nn.Buffer(torch.zeros(len(weights), dtype=torch.float64))
        """The last loss of each task, for micro-batches that lack its labels; 0: not seen yet."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}latest", torch.zeros_like(self.latest))  # older checkpoints have none
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def backward(self, step: Step) -> Mapping[str, Tensor]:
        losses = torch.stack([step.losses[task] for task in self.tasks])
        values = sum_over_ranks(losses.double()) / num_ranks()
        labelled = _flags(step, self.tasks, values.device)
        present = labelled & (values != 0)  # NaN is present
        latest = torch.where(present, _losses_of_step(values, step, self.tasks), self.latest)
        # a weight depends on what the step teaches, of which this micro-batch may have a part
        known = present if step.share == 1 else labelled & (latest != 0)
        weights = torch.where(present, self.own * self.rule(latest, known), 0.0)
        ((losses * weights.to(losses.dtype)).sum() * step.scale).backward()
        self.sums.add_(values)
        if step.share < 1:
            self.latest.copy_(torch.where(latest.isfinite(), latest, self.latest))
        if step.last:
            state = _State(self.rule)
            self.rule.update(self.sums, labelled & (self.sums != 0))
            state.settle(self.sums.isfinite().all())
            self.sums.zero_()
        return dict(zip(self.tasks, weights.float().unbind(), strict=True))


# ---- weights from inner products of gradients ----


@dataclass(frozen=True, slots=True)
class TaskGradients:
    """What a Gramian method sees of the tasks' gradients, over all ranks."""

    gramian: Tensor  # float64 [T, T], their inner products, positive semidefinite; rows of absent tasks are 0
    present: Tensor  # bool [T]: False for a task without a label in this step, or whose gradient is zero
    losses: Tensor  # float64 [T], weighted as in the config, as for a whole optimiser step
    labelled: Tensor  # bool [T], whether the step has a label of the task, perhaps in another micro-batch
    so_far: "TaskGradients | None" = None
    """Of all micro-batches up to this one, which states learn from; None: this one is the whole step."""


def _seen(inner: Tensor, losses: Tensor, labelled: Tensor) -> TaskGradients:
    present = labelled & (inner.diagonal() != 0)  # NaN is present
    return TaskGradients(torch.where(present & present[:, None], inner, 0.0), present, losses, labelled)


Weighting = Callable[[TaskGradients], Tensor]
"""-> weights, float64 [T]; what comes out for absent tasks is not used. A module, if it has state."""


class GramianBalance(Balance):
    """Settings common to the methods that see only inner products of the tasks' gradients."""

    heads: Literal["raw", "weighted"] = "raw"
    """Whether a decoder learns from its own loss as it is, or times the weight the method gave its task."""
    level: Literal["maps", "parameters"] = "maps"
    """Where gradients are compared: on the shared maps, for the price of one backward of everything, or on the shared
    parameters, as most papers do, for the price of one such backward a task."""
    levels: Annotated[tuple[int, ...] | None, EachOnce] = Field(None, min_length=1)
    """With `level: maps`: the pyramid levels that are looked at; None: all."""
    loss_scale: Literal["none", "log", "initial"] = "none"
    """What a loss is divided by before: nothing, itself (the gradient of its logarithm), or its value in the first
    step that had it."""
    smoothing: float | None = Field(None, gt=0, lt=1)
    """Each step uses this much of the weights of the step before (CR-MOGM: Zhou et al. 2022, "On the Convergence of
    Stochastic Multi-Objective Gradient Manipulation and Beyond", NeurIPS, alg. 1)."""

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        if self.levels is not None and self.level == "parameters":
            raise ValueError(
                f"levels is {self.levels}, but level is 'parameters', where no map is looked at; remove levels, or set "
                "level: maps"
            )
        return self

    @abstractmethod
    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """The method."""

    def build(self, weights: Mapping[str, float]) -> Balancer:
        return _Gramian(weights, self, self.weighting(list(weights)))

    def without_shared_maps(self) -> Self:
        """On the parameters."""
        if self.levels is not None:
            raise ValueError(
                f"balance.levels is {self.levels}, but in this way of sharing no map is shared by all tasks; their "
                "gradients are compared on the shared parameters; remove balance.levels"
            )
        return self.model_copy(update={"level": "parameters"})

    def check_levels(self, levels: Sequence[int]) -> None:
        if missing := set(self.levels or ()) - set(levels):
            raise ValueError(
                f"balance.levels has {sorted(missing)}, but the shared maps are of levels {list(levels)}; name some of "
                "these, or remove balance.levels"
            )


class _Gramian(Balancer):
    """On maps: T backwards through the decoders, one through the trunk. On parameters: T through everything.

    The gradients on the shared maps stand for those on the trunk's parameters (the feature-level bound of Sener and
    Koltun 2018, arXiv:1810.04650, sec. 3.3). Over ranks the maps of all images concatenate, so the Gramian of the
    whole batch is the sum of the ranks' Gramians, up to the factor by which losses of more ranks are larger.
    Gradients on parameters are averaged over the ranks before they are compared.
    """

    def __init__(self, weights: Mapping[str, float], spec: GramianBalance, weighting: Weighting) -> None:
        super().__init__()
        self.tasks = list(weights)
        self.own = _own_weights(weights)
        self.weighting = weighting
        self.needs_cut, self.needs_parameters = spec.level == "maps", spec.level == "parameters"
        self.rescales_decoder_gradients, self.loss_scale = spec.heads == "weighted", spec.loss_scale
        self.levels, self.smoothing = spec.levels, spec.smoothing
        self.conflict = ConflictTrace(len(weights))
        shape = len(weights)
        self.inner_sums = nn.Buffer(torch.zeros(shape, shape, dtype=torch.float64), persistent=False)
        self.loss_sums = nn.Buffer(torch.zeros(shape, dtype=torch.float64), persistent=False)
        """Inner products and losses of the micro-batches so far. Gradients on maps are of other images in each, so that
        their inner products add up; of gradients on parameters the products between micro-batches are left out."""
        if self.loss_scale == "initial":
            self.initial = nn.Buffer(torch.zeros(shape, dtype=torch.float64))
            """The first loss of each task; 0: not seen yet."""
        if self.smoothing is not None:
            self.smoothed = nn.Buffer(torch.full((shape,), torch.nan, dtype=torch.float64))
            """The weights of the step before; NaN: the task was never seen."""

    def backward(self, step: Step) -> Mapping[str, Tensor]:
        state = _State(self)
        raw = [step.losses[task] for task in self.tasks]
        own_values = sum_over_ranks(torch.stack(raw).double()) / num_ranks()
        values = _losses_of_step(own_values, step, self.tasks)
        factors = self.own / self._divisors(values)
        losses = [loss * factor * step.scale for loss, factor in zip(raw, factors.float().unbind(), strict=True)]
        inputs = list(step.leaves if self.needs_cut else step.shared_parameters)
        if not inputs:  # nothing is shared, so there is nothing to compare
            torch.stack(losses).sum().backward()
            return dict(zip(self.tasks, factors.float().unbind(), strict=True))
        of_inputs = {id(x) for x in inputs}
        others = [p for p in step.parameters if id(p) not in of_inputs] if self.rescales_decoder_gradients else []
        before = _take([*inputs, *others])
        gradients, of_others = self._gradients(losses, inputs, others, step.joins_tasks)
        for x, gradient in zip((*inputs, *others), before, strict=True):
            x.grad = gradient

        if self.needs_cut:
            looked_at = self._looked_at(step)
            of_levels = sum_over_ranks(_inner_products(gradients, inputs, looked_at))
            inner = of_levels.sum(dim=0)
            if step.levels:
                self.conflict.update(inner, of_levels, [step.levels[k] for k in looked_at])
            else:
                self.conflict.update(inner)
        else:
            rows = sum_over_ranks(_rows(gradients, inputs))
            inner = (rows @ rows.T).double()
            self.conflict.update(inner)
        inner = inner / (num_ranks() * step.scale) ** 2
        seen = _seen(inner, factors * values, labelled := _flags(step, self.tasks, values.device))
        if step.share < 1:
            sums = self.inner_sums + inner, self.loss_sums + factors * own_values
            seen = replace(seen, so_far=_seen(*sums, labelled))
        weights = self._weights(inner, seen)
        state.settle(weights.isfinite().all() if step.last else False)
        if step.share < 1:
            for kept, total in zip((self.inner_sums, self.loss_sums), sums, strict=True):
                kept.copy_(torch.zeros_like(kept) if step.last else total)

        for weight, of_task in zip(weights.float().unbind(), of_others, strict=True):
            learnt = [(p, gradient) for p, gradient in zip(others, of_task, strict=True) if gradient is not None]
            weighted = torch._foreach_mul([gradient for _, gradient in learnt], weight) if learnt else ()
            for (parameter, _), gradient in zip(learnt, weighted, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        if self.needs_cut:
            backward_from_maps(step.shared, _combine(gradients, inputs, weights))
        else:
            _add(rows / num_ranks(), inputs, weights)
        return dict(zip(self.tasks, (factors * weights).float().unbind(), strict=True))

    def diagnostics(self) -> Mapping[str, Tensor]:
        """See `ConflictTrace`."""
        return self.conflict.read()

    def _divisors(self, values: Tensor) -> Tensor | float:
        if self.loss_scale == "none":
            return 1.0
        if self.loss_scale == "initial":
            self.initial.copy_(torch.where(self.initial == 0, values, self.initial))
            values = self.initial
        return torch.where(values == 0, 1.0, values)

    def _weights(self, inner: Tensor, seen: TaskGradients) -> Tensor:
        present = seen.present
        # a value that is not finite makes every weight NaN, so that the gradient's norm shows it and the step is
        # skipped
        weights = torch.where(present, self.weighting(seen), 0.0) + 0 * inner.sum()
        if self.smoothing is not None:
            before = torch.where(self.smoothed.isnan(), weights, self.smoothed)
            mixed = self.smoothing * before + (1 - self.smoothing) * weights
            self.smoothed.copy_(torch.where(present, mixed, self.smoothed))
            weights = torch.where(present, mixed, 0.0)
        return weights

    def _gradients(
        self, losses: Sequence[Tensor], inputs: list[Tensor], others: list[nn.Parameter], joined: bool
    ) -> tuple[list[list[Tensor | None]], list[list[Tensor | None]]]:
        """[T] lists of each loss's gradients on the inputs, and on the others. Raw heads get theirs on the way."""
        of_inputs, of_others = [], []
        for number, loss in enumerate(losses):
            more = number < len(losses) - 1
            loss.backward(retain_graph=more and (joined or self.needs_parameters))
            of_inputs.append(_take(inputs))
            of_others.append(_take(others))
        return of_inputs, of_others

    def _looked_at(self, step: Step) -> list[int]:
        """The positions of the maps in question."""
        if self.levels is None:
            return list(range(len(step.leaves)))
        return [step.levels.index(level) for level in self.levels]


def backward_from_maps(shared: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Carry on the gradients on shared maps, but for those of frozen parts. Raises ValueError where all are frozen."""
    pairs = [(x, gradient) for x, gradient in zip(shared, gradients, strict=True) if x.requires_grad]
    if not pairs:
        raise ValueError(
            "the balancing method compares gradients on the shared maps, and all that makes these is frozen, so it "
            "would have no effect; set balance=fixed, or freeze less"
        )
    torch.autograd.backward([x for x, _ in pairs], [gradient for _, gradient in pairs])


def _take(of: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, which are then gone from the tensors."""
    gradients = [x.grad for x in of]
    for x in of:
        x.grad = None
    return gradients


def _inner_products(gradients: list[list[Tensor | None]], leaves: list[Tensor], looked_at: list[int]) -> Tensor:
    """float64 [K, T, T], by map. A map is copied only if it has less than 32 bits or lies otherwise than its leaf."""
    flat = [[_flat(of_task[k], leaves[k]) for k in looked_at] for of_task in gradients]
    zero = torch.zeros((), device=leaves[0].device)
    entries = []
    for i, a in enumerate(flat):
        for b in flat[: i + 1]:
            dots = [zero if x is None or y is None else torch.dot(x, y) for x, y in zip(a, b, strict=True)]
            entries.append(torch.stack(dots))
    low = [[entries[max(i, j) * (max(i, j) + 1) // 2 + min(i, j)] for j in range(len(flat))] for i in range(len(flat))]
    products = torch.stack([entry for row in low for entry in row])  # [T * T, K]
    return products.double().view(len(flat), len(flat), -1).permute(2, 0, 1)


def _flat(gradient: Tensor | None, leaf: Tensor) -> Tensor | None:
    """float32 [N], in the order in which the leaf lies in memory."""
    if gradient is None:
        return None
    return gradient.permute(memory_order(leaf)).reshape(-1).float()


def memory_order(map_: Tensor) -> list[int]:
    """The axes as they lie in memory: those of a map in channels_last are batch, rows, columns, channels."""
    channels_last = map_.dim() == 4 and not map_.is_contiguous() and map_.stride(1) == 1
    return [0, 2, 3, 1] if channels_last else list(range(map_.dim()))


def _combine(gradients: list[list[Tensor | None]], leaves: list[Tensor], weights: Tensor) -> list[Tensor]:
    """The weighted sum on each map."""
    sums = []
    for k, leaf in enumerate(leaves):
        total: Tensor | None = None
        # weights of Nash-MTL and FairGrad grow beyond what float16 holds as gradients shrink; their products do not
        wide = torch.float32 if leaf.dtype == torch.float16 else leaf.dtype
        for weight, of_task in zip(weights.to(wide).unbind(), gradients, strict=True):
            if (gradient := of_task[k]) is not None:
                gradient = gradient.to(wide)
                total = gradient * weight if total is None else total.addcmul_(gradient, weight)
        sums.append(torch.zeros_like(leaf) if total is None else total.to(leaf.dtype))
    return sums


def _rows(gradients: list[list[Tensor | None]], parameters: list[Tensor]) -> Tensor:
    """float32 [T, P]: each task's gradient on all parameters in a row."""
    return torch.stack(
        [
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(of, parameters, strict=True)]
            )
            for of in gradients
        ]
    )


def _add(rows: Tensor, parameters: list[Tensor], weights: Tensor) -> None:
    """Add the weighted sum of the rows to the parameters' gradients."""
    pieces = (weights.to(rows.dtype) @ rows).split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        gradient = torch.empty_like(parameter).copy_(piece.view_as(parameter))  # keeps the memory order
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
