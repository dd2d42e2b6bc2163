"""Everything that moves during a run, and one step of it: weights, optimiser, averages, counters."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionmtl import distributed
from visionmtl.balance.base import Step
from visionmtl.compiled import Graphs, compile_losses
from visionmtl.config import Run
from visionmtl.distributed import Ranks
from visionmtl.model import LossNet, MultiTaskNet, to_device
from visionmtl.ops.colour import apply_matrices
from visionmtl.optim import Ema, build_optimizer
from visionmtl.types import Batch
from visionmtl.weights import load_strictly

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class RunState:
    """Everything that moves during a run."""

    def __init__(self, run: Run, net: MultiTaskNet, ranks: Ranks) -> None:
        self.run, self.net, self.ranks = run, net, ranks
        if run.train.channels_last:
            net.to(memory_format=torch.channels_last)
        weights = {name: task.weight for name, task in run.tasks.items()}
        self.balancer = run.balance.build(weights).to(ranks.device)
        self.optimizer = build_optimizer(run.optim, net, self.balancer)
        self.ema = Ema(net, run.optim.ema_decay) if run.optim.ema_decay else None
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=run.train.precision == "fp16")
        self.step = 0
        self.best = -math.inf

        loss_net = LossNet(net, self.balancer.needs_cut)
        self.graphs = Graphs() if run.train.compile else None
        self.news: list[str] = []  # lines for the log; whoever logs takes them out
        if run.train.compile:
            compile_losses(loss_net, run.train, ranks.device)
        self.loss_net = distributed.replicate(loss_net, ranks)

    def advance(self, micro_batches: list[Batch]) -> tuple[dict[str, dict[str, Tensor]], Mapping[str, Tensor], Tensor]:
        """One optimiser step. Returns the last micro-batch's loss parts, task weights and the gradient norm."""
        settings, device = self.run.train, self.ranks.device
        self.net.train()
        torch.manual_seed(self._seed())
        scale = self.scaler.scale(torch.ones((), device=device)) / settings.accumulate
        for i, batch in enumerate(micro_batches):
            batch = to_device(batch, device)
            image = batch.image if batch.colour is None else apply_matrices(batch.image, batch.colour)
            if settings.channels_last:
                image = image.contiguous(memory_format=torch.channels_last)
            if settings.compile == "cuda_graph":
                torch.compiler.cudagraph_mark_step_begin()
            with self._synchronised(last=i == len(micro_batches) - 1):
                with torch.autocast(device.type, DTYPES[settings.precision], enabled=settings.precision != "fp32"):
                    parts, shared, leaves = self.loss_net(image, batch.targets, batch.labelled)
                losses = {task: torch.stack(list(of_task.values())).sum() for task, of_task in parts.items()}
                weights = self.balancer.backward(Step(losses, shared, leaves, scale))
            if self.graphs and (line := self.graphs.news(batch.targets)):
                self.news.append(line)

        distributed.average_gradients(self.balancer.parameters())
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.run.optim.clip_norm or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update()
        self.step += 1
        return parts, weights, norm

    def _seed(self) -> int:
        """Dropout and drop path depend on run, rank and step alone, so that there is no random state to keep."""
        entropy = (self.run.seed, self.ranks.rank, self.step)
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])

    def _synchronised(self, last: bool) -> Any:
        """Ranks exchange gradients in the last of accumulated backwards only."""
        no_sync = getattr(self.loss_net, "no_sync", None)
        return torch.enable_grad() if last or no_sync is None else no_sync()

    def plain(self, epochs_done: int) -> dict[str, Any]:
        """The state as tensors and plain data."""
        return {
            "run": self.run.model_dump(mode="json"),
            "spaces": {name: space and space.plain() for name, space in self.net.spaces.items()},
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "balancer": self.balancer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "epoch": epochs_done,
            "best": self.best,
        }

    def restore(self, state: Mapping[str, Any], path: Path) -> None:
        """Undo `plain`."""
        load_strictly(self.net, state["net"], path)
        if self.ema:
            if not state["ema"]:
                raise ValueError(f"{path} holds no weight average, but optim.ema_decay is set; resume needs the same")
            self.ema.load_state_dict(state["ema"])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)  # rates and decay come from this start's config, moments from the checkpoint
        self.balancer.load_state_dict(state["balancer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best = state["step"], state["best"]
