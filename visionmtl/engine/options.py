"""What one start of a run is asked for, and which steps follow from it."""

from dataclasses import dataclass

from visionmtl.run import Train

PROFILE_WARMUP = 2  # steps before a trace, so that it shows a warmed loop


@dataclass(frozen=True)
class Options:
    """How this start differs from a plain one; none of it changes what a whole run computes."""

    resume: str | None = None  # "auto" = this run's last checkpoint if there is one; or a path
    init_from: str | None = None  # weights to start from, nothing else
    overfit: int | None = None  # learn the first N images of each data set only, and evaluate on them
    limit_train_batches: int | None = None  # per epoch
    limit_val_batches: int | None = None
    max_time_s: float | None = None  # stop with a checkpoint
    max_steps: int | None = None  # stop with a checkpoint
    profile: int | None = None  # write a trace of so many steps, and stop
    dry_run: bool = False  # one step, one validation batch, nothing written
    device: str = "auto"


@dataclass(frozen=True)
class Plan:
    """How far a start goes, in optimiser steps of the whole run."""

    steps_per_epoch: int
    total_steps: int
    last_step: int  # of this start
    eval_every: int  # steps

    def evaluates(self, step: int) -> bool:
        """Whether the run is evaluated after this step."""
        return step > 0 and (step >= self.total_steps or step % self.eval_every == 0)


def plan_steps(settings: Train, options: Options, done: int, steps_per_epoch: int) -> Plan:
    """The steps of a start after `done` earlier ones. Raises ValueError when they are too few for a trace."""
    total_steps = done + 1 if options.dry_run else settings.epochs * steps_per_epoch
    last_step = min(total_steps, options.max_steps or total_steps)
    if options.profile:
        needed = PROFILE_WARMUP + options.profile
        if last_step - done < needed:
            raise ValueError(
                f"--profile {options.profile} needs {needed} steps, {PROFILE_WARMUP} of them to warm up, and this "
                f"start has {max(last_step - done, 0)}; lower --profile, or raise train.epochs or --max-steps"
            )
        last_step = done + needed
    return Plan(steps_per_epoch, total_steps, last_step, settings.eval_every_epochs * steps_per_epoch)
