"""What becomes of a step whose loss, gradient or statistics are not finite: it is undone on the device, and counted."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionmtl.ops.ranks import own_share, sum_over_ranks
from visionmtl.run import NotFinitePolicy

SCALE_SEARCH = 24
"""fp16: steps in a row in which the loss scale may be halved; 2^16, where it begins, is below 0.01 then."""


class NotFinite(FloatingPointError):
    """A loss, a gradient or a weight became infinite or not a number: what a setting can cure."""


class Restorable:
    """Tensors that are written in place, and a copy of them to go back to. Nothing waits for the device.

    The tensors are looked up once: create it when they lie where they stay. Groups of one type are copied together.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() and _is_dense(tensor):  # expanded tensors cannot be written in place, and never change
                by_type.setdefault(tensor.dtype, []).append(_in_memory_order(tensor.detach()))
        self._tensors = list(by_type.values())
        self._copies = [torch.cat(group) for group in self._tensors]
        self._pieces = [
            list(copy.split([tensor.numel() for tensor in group]))
            for copy, group in zip(self._copies, self._tensors, strict=True)
        ]

    def take(self) -> None:
        """Remember the present values."""
        for group, copy in zip(self._tensors, self._copies, strict=True):
            torch.cat(group, out=copy)

    def restore(self, undo: Tensor) -> None:
        """Write the remembered values back where `undo`, a bool scalar, is true."""
        for group, copy, pieces in zip(self._tensors, self._copies, self._pieces, strict=True):
            # selected, not multiplied: NaN times 0 is NaN
            copy.copy_(torch.where(undo, copy, torch.cat(group)))
            torch._foreach_copy_(group, pieces)

    def became_not_finite(self) -> list[Tensor]:
        """bool scalars, whether a value that was finite no longer is; -inf in a mask stays what it was."""
        return [
            (copy.isfinite() & ~torch.cat(group).isfinite()).any()
            for group, copy in zip(self._tensors, self._copies, strict=True)
            if copy.is_floating_point()
        ]


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements lie side by side, in whatever order of the axes."""
    span = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return span == tensor.numel()


def _in_memory_order(tensor: Tensor) -> Tensor:
    """[N], the elements of a dense tensor as they lie, in the same memory."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


@dataclass(frozen=True)
class Tally:
    """What happened since the run began, and since the last reading, as numbers of the host."""

    skipped: int  # steps of the run that were undone
    for_loss: int  # of them, those in which a loss or a statistic was not finite, which no loss scale cures
    longest: int  # most in a row
    first_step: int | None  # the number of the first since the last reading
    first_losses: tuple[str, ...]  # which loss parts were not finite in it, as task/part; none: the gradient was


class FiniteGuard(nn.Module):
    """Undoes steps that are not finite, on all ranks together, and counts them. Nothing waits for the device.

    A step is not finite where the norm of its gradient, a loss part of any rank or micro-batch, or a running
    statistic of any rank is not. Then weights and moments stay (see `optim.skip_next_step`), buffers of the network, of
    the balancing method and of the curriculum go back to what they were, and the weight average sees only those.
    """

    def __init__(self, policy: NotFinitePolicy, device: torch.device, fp16: bool) -> None:
        super().__init__()
        self.policy, self.fp16 = policy, fp16
        self.counts = nn.Buffer(torch.zeros(4, dtype=torch.int64, device=device))
        """Steps undone, those of them for a loss, those in a row until now, most in a row."""
        self.first_step = nn.Buffer(torch.full((), -1, dtype=torch.int64, device=device), persistent=False)
        self._first_parts: Tensor | None = None  # bool [P + 1], loss parts and statistics, of that step
        self._names: tuple[str, ...] = ()
        self._statistics: Restorable | None = None
        self._state: Restorable | None = None
        self._told = 0

    def begin(self, net: nn.Module, methods: Sequence[nn.Module], unguarded: Iterable[Tensor] = ()) -> None:
        """Before a step: remember what it must not spoil.

        methods: whose buffers are restored; unguarded: what else is, since its optimiser cannot skip a step
        """
        if self._statistics is None or self._state is None:
            self._statistics = Restorable(net.buffers())
            self._state = Restorable([*(b for one in methods for b in one.buffers()), *map(own_share, unguarded)])
        self._statistics.take()
        self._state.take()

    @torch.no_grad()
    def must_undo(self, step: int, norm: Tensor, losses: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """bool scalar, the same on all ranks: whether the step must be undone.

        step: its number, from 1; norm: of all ranks' gradients; losses: this rank's, by task and part
        """
        assert self._statistics is not None
        values = torch.stack([value for parts in losses.values() for value in parts.values()])
        statistics = self._statistics.became_not_finite()
        flags = torch.cat([~values.isfinite(), *(flag[None] for flag in statistics)]).float()
        parts = sum_over_ranks(flags) > 0
        for_loss = parts.any()
        undo = for_loss | ~norm.isfinite()

        skipped, of_loss, in_a_row, longest = self.counts.unbind()
        in_a_row = (in_a_row + 1) * undo
        counts = [skipped + undo, of_loss + for_loss, in_a_row, torch.maximum(longest, in_a_row)]
        self.counts.copy_(torch.stack(counts))
        is_first = undo & (self.first_step < 0)
        self.first_step.copy_(torch.where(is_first, step, self.first_step))
        of_losses = [f"{task}/{part}" for task, of_task in losses.items() for part in of_task]
        names = (*of_losses, *("running statistics" for _ in statistics))
        if self._first_parts is None:
            self._first_parts = torch.zeros_like(parts)
        elif names != self._names:  # a loss began or ended
            before = dict(zip(self._names, self._first_parts, strict=True))
            self._first_parts = torch.stack([before.get(name, torch.zeros_like(for_loss)) for name in names])
        self._names = names
        self._first_parts.copy_(torch.where(is_first, parts, self._first_parts))
        return undo

    def restore_where(self, undo: Tensor) -> None:
        """After the optimiser: put back what the step has spoilt, where it must be undone."""
        assert self._statistics is not None and self._state is not None
        self._statistics.restore(undo)
        self._state.restore(undo)

    def read(self) -> Tally:
        """The counts; waits for the device."""
        skipped, for_loss, _, longest = self.counts.tolist()
        first = int(self.first_step)
        losses: tuple[str, ...] = ()
        if first >= 0 and self._first_parts is not None:
            flags = self._first_parts.tolist()
            losses = tuple(dict.fromkeys(name for name, flag in zip(self._names, flags, strict=True) if flag))
        return Tally(skipped, for_loss, longest, first if first >= 0 else None, losses)

    def skipped(self) -> int | None:
        """Steps of the run that were undone, as of the last `check`; None where the first one ends the run."""
        return self._told if self.fp16 or self.policy.policy == "skip" else None

    def resume(self, state: Mapping[str, Tensor]) -> None:
        """Go on counting from `state_dict`."""
        self.load_state_dict(state)
        self._told = int(self.counts[0])

    def check(self, step: int, losses: Mapping[str, Mapping[str, float]]) -> str | None:
        """Raise NotFinite where the policy says so, at a step whose losses were read; else a line on new skips.

        Waits for the device. losses: by task and part, of the last step
        """
        tally = self.read()
        policy = self.policy
        bad = [f"{t}/{p} {v}" for t, parts in losses.items() for p, v in parts.items() if v - v != 0]
        if policy.policy != "skip" and bad:
            since = f" (step {tally.first_step} was the first)" if tally.first_step not in (None, step) else ""
            raise NotFinite(
                f"losses are not finite at step {step}: {', '.join(bad)}{since}; finite ones are needed; lower "
                f"optim.lr, set optim.clip_norm, or look at the labels with tools/visualize.py --mode data; {_CAPTURE}"
            )
        row_limit = max(policy.max_in_a_row or 0, SCALE_SEARCH) if self.fp16 else policy.longest_row
        if policy.policy != "skip" and (tally.for_loss if self.fp16 else tally.skipped):
            what = f"of {', '.join(tally.first_losses)}" if tally.first_losses else "alone, with finite losses"
            raise NotFinite(
                f"the gradient was not finite in {tally.skipped} step(s) up to step {step}, which left the weights as "
                f"they were; the first was step {tally.first_step}: that {what}; finite ones are needed; lower "
                f"optim.lr, or look at the labels with tools/visualize.py --mode data; {_CAPTURE}"
            )
        if tally.longest > row_limit:
            remedy = (
                "set train.precision=bf16" if self.fp16 else "lower optim.lr, or raise train.not_finite.max_in_a_row"
            )
            raise NotFinite(
                f"{tally.longest} steps in a row, up to step {step}, had losses or gradients that are not finite and "
                f"were skipped; {row_limit} are allowed; {remedy}; {_CAPTURE}"
            )
        counted = tally.for_loss if self.fp16 else tally.skipped
        if policy.policy == "skip" and counted > max(row_limit, policy.largest_share * step):
            raise NotFinite(
                f"{counted} of {step} steps had losses or gradients that are not finite and were skipped; allowed are "
                f"{policy.largest_share:.2%} of all (train.not_finite.max_share); lower optim.lr, look at the labels "
                f"with tools/visualize.py --mode data, or raise the limit; {_CAPTURE}"
            )
        new, self._told = tally.skipped - self._told, tally.skipped
        if not new or tally.first_step is None:
            return None
        self.first_step.fill_(-1)
        cause = ", ".join(tally.first_losses) or (
            "the gradient, so the loss scale fell" if self.fp16 else "the gradient"
        )
        return (
            f"skipped   {new} step(s) up to step {step}, {tally.skipped} in all: something was not finite; first in "
            f"step {tally.first_step}: {cause}"
        )


_CAPTURE = "train.not_finite.policy=capture keeps the first such step, for `visionmtl replay` to show where it begins"


@torch.no_grad()
def largest_weight(tensors: Iterable[Tensor]) -> Tensor:
    """The largest absolute value of float tensors, of this rank's share of each; NaN where one of them has a NaN."""
    own = [own_share(tensor.detach()) for tensor in tensors if tensor.is_floating_point()]
    norms = torch._foreach_norm([tensor for tensor in own if tensor.numel()], torch.inf)
    return torch.stack([norm.float() for norm in norms]).amax()


def check_weights(step: int, named: Mapping[str, Tensor], any_rank: bool) -> None:
    """Raise NotFinite where the update of a step, of a finite gradient, made weights that are not finite.

    named: the weights by name, for the message; any_rank: whether another rank has found such weights
    """
    bad = [name for name, tensor in named.items() if not bool(own_share(tensor.detach()).isfinite().all())]
    if bad or any_rank:
        shown = f"{len(bad)} tensors, the first {bad[0]}, hold" if bad else "those of another process hold"
        raise NotFinite(
            f"after step {step} weights are not finite, though losses and gradients were: {shown} such values; finite "
            "ones are needed, and nothing is saved; lower optim.lr (or optim.weight_decay: their product belongs far "
            f"below 1), set optim.clip_norm, and go on from the last checkpoint with --resume; {_CAPTURE}"
        )
