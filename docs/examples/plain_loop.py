"""Our network, losses and balancing method in a training loop of your own, with a plain optimiser.

python docs/examples/plain_loop.py [CONFIG [a.b=c ...]]       the default is configs/quickstart.yaml
"""

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
    run = load(config, overrides)
    net = build_model(run).to(device)
    loader = train_loader(
        run.data, run.tasks, net.spaces, open_datasets(run.data.train), run.train.batch_size, run.seed
    )
    balancer = run.balance.build({name: task.weight for name, task in run.tasks.items()}).to(device)
    loss_net = LossNet(net, cut=balancer.needs_cut)  # images and targets in, loss parts of each task out
    optimizer = torch.optim.AdamW([*net.parameters(), *balancer.parameters()], lr=1e-3)

    history: list[float] = []
    while len(history) < num_steps:
        loader.batch_sampler.set_epoch(len(history) // len(loader), 0)  # type: ignore[union-attr]
        for batch in loader:
            batch = batch.to(device)
            totals = step_totals([batch.counts])  # how many labelled items each loss is divided by
            parts, shared, leaves = loss_net(batch.image, batch.targets, batch.labelled, totals, batch.color)
            losses = {task: sum(of_task.values()) for task, of_task in parts.items()}
            labelled = {task: images.any() for task, images in batch.labelled.items()}

            optimizer.zero_grad()
            weights = balancer.backward(Step(losses, shared, leaves, labelled=labelled))  # fills every .grad
            optimizer.step()

            history.append(sum(float(loss.detach()) for loss in losses.values()))
            text = "  ".join(
                f"{task} {float(loss.detach()):.3f} x{float(weights[task]):.2f}" for task, loss in losses.items()
            )
            print(f"step {len(history):4}  {text}")
            if len(history) == num_steps:
                break
    return history


if __name__ == "__main__":
    main(*sys.argv[1:])
