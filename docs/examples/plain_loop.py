"""Our network, losses and balancing method in a training loop of your own: plain_loop.py [CONFIG [a.b=c ...]]"""

import sys

import torch

from visionmtl import build_model
from visionmtl.balance.base import Step
from visionmtl.data.loader import train_loader
from visionmtl.datasets import open_datasets
from visionmtl.network import LossNet
from visionmtl.ops.ranks import step_totals
from visionmtl.run import load


def main(config: str = "quickstart.yaml", *overrides: str, num_steps: int = 100) -> list[float]:
    """Returns the sum of the losses at each step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run, history = load(config, overrides), []
    net, datasets = build_model(run).to(device), open_datasets(run.data.train)
    loader = train_loader(run.data, run.tasks, net.spaces, datasets, run.train.batch_size, run.seed)
    balancer = run.balance.build({name: task.weight for name, task in run.tasks.items()}).to(device)
    loss_net = LossNet(net, cut=balancer.needs_cut)  # images and targets in, loss parts of each task out
    optimizer = torch.optim.AdamW([*net.parameters(), *balancer.parameters()], lr=1e-3)
    for step in range(num_steps):
        if step % len(loader) == 0:
            loader.batch_sampler.set_epoch(step // len(loader))
            batches = iter(loader)
        batch = next(batches).to(device)
        totals = step_totals([batch.counts])  # how many labelled items each loss is divided by
        parts, shared, leaves = loss_net(batch.image, batch.targets, batch.labelled, totals, batch.color)
        losses = {task: sum(of_task.values()) for task, of_task in parts.items()}
        labelled = {task: images.any() for task, images in batch.labelled.items()}
        optimizer.zero_grad()
        balancer.backward(Step(losses, shared, leaves, labelled=labelled))  # fills every .grad
        optimizer.step()
        values = {task: float(loss.detach()) for task, loss in losses.items()}
        print(f"step {step:4}  " + "  ".join(f"{task} {value:.3f}" for task, value in values.items()))
        history.append(sum(values.values()))
    return history


if __name__ == "__main__":
    main(*sys.argv[1:])
