"""What the compiled losses keep for their backward: cut by `train.activation_memory`, and no map that nobody reads."""

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from toy_run import losses_of, small_batch, small_net, small_tasks

from visionmtl.engine.compile import compile_losses
from visionmtl.network import LossNet
from visionmtl.run import Train


def graphs(share: float) -> tuple[fx.Graph, fx.Graph]:
    """Forward and backward of a small net as Inductor would get them."""
    found: list[fx.Graph] = []

    def keep(module: fx.GraphModule, inputs: object) -> object:
        found.append(module.graph)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    tasks = {"classes": small_tasks()["classes"]}
    net, batch = LossNet(small_net(tasks).eval(), cut=False), small_batch(tasks)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    compile_losses(net, Train(compile=True, activation_memory=share), torch.device("cpu"), backend)
    losses = losses_of(net, batch)
    torch.stack([part for parts in losses.values() for part in parts.values()]).sum().backward()
    forward, backward = found
    return forward, backward


def kept_bytes(forward: fx.Graph) -> int:
    results = {node for node in forward.output_node().args[0] if isinstance(node, fx.Node)}  # type: ignore[union-attr]
    values = [node.meta["val"] for node in results if node.op != "placeholder"]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


@pytest.mark.slow
def test_a_smaller_share_keeps_less_for_the_backward():
    everything, (forward, backward) = graphs(1.0)[0], graphs(0.95)
    assert kept_bytes(forward) < 0.8 * kept_bytes(everything)
    tangents = [node.meta["val"] for node in backward.nodes if node.op == "placeholder" and "tangent" in node.name]
    assert tangents and all(value.ndim == 0 for value in tangents), "losses alone have gradients, no map of zeros"


def test_a_share_of_what_eager_steps_keep_is_refused():
    with pytest.raises(ValueError, match=r"activation_memory is 0.5, but compile is false, so .* set compile: true"):
        Train(activation_memory=0.5)
    assert not Train(activation_memory=0.95).compile, "runs saved while that was the default hold it"
