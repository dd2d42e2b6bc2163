"""Everything that moves during a run, and one step of it: weights, optimiser, averages, counters."""

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from visionmtl.balance.base import Step
from visionmtl.engine import distributed
from visionmtl.engine.checkpoint import check_continues
from visionmtl.engine.compile import Graphs, compile_losses
from visionmtl.engine.distributed import Ranks
from visionmtl.engine.fsdp import check_shard, gathered, shard, spread, spread_moments
from visionmtl.engine.optim import Ema, build_optimizer, skip_if_not_finite
from visionmtl.modeling.sync_batchnorm import synchronise
from visionmtl.modeling.unused_parameters import check_evaluates, freeze_unused_parameters
from visionmtl.modeling.weights import load_strictly
from visionmtl.network import LossNet, MultiTaskNet, to_device
from visionmtl.run import Run
from visionmtl.structures import Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class RunState:
    """Everything that moves during a run."""

    def __init__(self, run: Run, net: MultiTaskNet, ranks: Ranks) -> None:
        self.run, self.net, self.ranks = run, net, ranks
        self.sharded = run.train.distributed.shard and ranks.world > 1
        if run.train.channels_last and not self.sharded:  # what is spread lies in a row; the images turn all the same
            net.to(memory_format=torch.channels_last)
        synchronise(net.train(), run.train.sync_batchnorm, ranks.device.type == "cuda" and not run.train.compile)
        unread = freeze_unused_parameters(net, run.data.size, ranks.device, run.train.batch_size)
        if run.data.input_size != run.data.size:
            check_evaluates(net, run.data.input_size, ranks.device)
        weights = {name: task.weight for name, task in run.tasks.items()}
        self.balancer = run.balance.build(weights).to(ranks.device)
        if run.train.distributed.shard:
            check_shard(run.train, self.balancer)
        loss_net = LossNet(net, self.balancer.needs_cut)
        twin = None
        if self.sharded:
            self._whole = copy.deepcopy(net).cpu()
            if run.optim.ema_decay:
                twin = copy.deepcopy(net)
                shard(LossNet(twin, cut=False), ranks.device, ranks.world)
            shard(loss_net, ranks.device, ranks.world)
        self.optimizer = build_optimizer(run.optim, net, self.balancer)
        self.ema = Ema(net, run.optim.ema_decay, twin) if run.optim.ema_decay else None
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=run.train.precision == "fp16")
        self.step = 0
        self.best = -math.inf
        self.num_spoilt = torch.zeros((), device=ranks.device)
        """Steps of this start whose gradient was not finite; read by the loop when it logs."""

        self.graphs = Graphs() if run.train.compile else None
        self.news: list[str] = []  # lines for the log; whoever logs takes them out
        if unread:
            self.news.append(f"frozen    {len(unread)} parameters that no output depends on, from {unread[0]} on")
        if run.train.compile:
            compile_losses(loss_net, run.train, ranks.device)
        self.loss_net: nn.Module = loss_net
        if not self.sharded:
            self.loss_net = distributed.replicate(loss_net, ranks, run.train, self.balancer.needs_cut)

    def advance(self, micro_batches: list[Batch]) -> tuple[dict[str, dict[str, Tensor]], Mapping[str, Tensor], Tensor]:
        """One optimiser step. Returns the last micro-batch's loss parts, task weights and the gradient norm.

        A gradient that is not finite leaves the weights as they are: under fp16 the loss scale is lowered, otherwise
        the step counts in `num_spoilt`.
        """
        settings, device = self.run.train, self.ranks.device
        self.net.train()
        torch.manual_seed(self._seed())
        lies = torch.channels_last if settings.channels_last else torch.contiguous_format
        scale = self.scaler.scale(torch.ones((), device=device)) / settings.accumulate
        for i, batch in enumerate(micro_batches):
            batch = to_device(batch, device)
            image = batch.image.contiguous(memory_format=lies)  # the loader's lie channels last
            if settings.compile == "cuda_graph":
                torch.compiler.cudagraph_mark_step_begin()
            with self._synchronised(last=i == len(micro_batches) - 1):
                with torch.autocast(device.type, DTYPES[settings.precision], enabled=settings.precision != "fp32"):
                    parts, shared, leaves = self.loss_net(image, batch.targets, batch.labelled, batch.colour)
                losses = {task: torch.stack(list(of_task.values())).sum() for task, of_task in parts.items()}
                weights = self.balancer.backward(Step(losses, shared, leaves, scale))
            if self.graphs and (line := self.graphs.news(batch.targets)):
                self.news.append(line)

        distributed.average_gradients(self.balancer.parameters())
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.run.optim.clip_norm or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not self.scaler.is_enabled():  # the scaler does the same
            self.num_spoilt += skip_if_not_finite(self.optimizer, norm)
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
        if isinstance(self.loss_net, FSDPModule):
            self.loss_net.set_requires_gradient_sync(last)
        no_sync = getattr(self.loss_net, "no_sync", None)
        return torch.enable_grad() if last or no_sync is None else no_sync()

    def judged(self) -> MultiTaskNet:
        """The network to evaluate: averaged weights where there are any, whole, with the first rank's statistics."""
        net = self.ema.module if self.ema else self.net
        distributed.share_statistics(net)
        if not self.sharded:
            return net
        whole = copy.deepcopy(self._whole)  # with all weights, no rank waits for another while it predicts
        whole.load_state_dict(gathered(net.state_dict()))
        return whole.to(self.ranks.device)

    def hand_to_first(self, epochs_done: int, write: Callable[[dict[str, Any]], None]) -> None:
        """Let the first rank write the state; the others help to gather it where it is spread over them."""
        if self.ranks.first or self.sharded:
            plain = self.plain(epochs_done)
            if self.ranks.first:
                write(plain)

    def plain(self, epochs_done: int) -> dict[str, Any]:
        """The state as tensors and plain data, the same whether it is sharded or not.

        All ranks must call it when it is (`sharded`).
        """
        plain = {
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
        return {key: gathered(value) for key, value in plain.items()} if self.sharded else plain

    def restore(self, state: Mapping[str, Any], path: Path) -> None:
        """Undo `plain`."""
        load_strictly(self.net, spread(state["net"], self.net), path)
        check_continues(state, self.plain(0), path)
        if self.ema:
            self.ema.load_state_dict({**state["ema"], "module": spread(state["ema"]["module"], self.ema.module)})
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(spread_moments(state["optimizer"], self.optimizer))
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)  # rates and decay come from this start's config, moments from the checkpoint
        self.balancer.load_state_dict(state["balancer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best = state["step"], state["best"]
