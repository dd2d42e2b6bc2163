"""What a training step should cost on a GPU that is not there: a roofline of each kernel of the compiled graphs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.lowering  # which the compiler's decompositions look for
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from visionmtl.benchmark.figures import Cell, Figure, Note, Row, Table
from visionmtl.benchmark.kernels import DEPTHWISE, Kernel, kernels_of
from visionmtl.benchmark.workload import Workload, mean_of_maps
from visionmtl.engine.compile import compile_losses
from visionmtl.network import LossNet, MultiTaskNet

OPTIMIZER = "optimiser, average and clipping"


@dataclass(frozen=True)
class Roof:
    """What a device can do at best."""

    tflops: float = 750.0  # of matrix products in bf16; in float32 (as TF32) half of it
    tbytes_s: float = 4.2  # read from and written to memory
    launch_us: float = 2.0  # the least time of a kernel in a CUDA graph
    vector_tflops: float = 60.0  # without matrix units, which depthwise convolutions cannot use
    half: bool = True  # bf16

    def compute_ms(self, kernel: Kernel) -> float:
        """At the peak."""
        tflops = self.vector_tflops if kernel.kind == DEPTHWISE else self.tflops / (1 if self.half else 2)
        return kernel.flops / (tflops * 1e9)

    def memory_ms(self, kernel: Kernel) -> float:
        """At full bandwidth."""
        return kernel.bytes_moved() / (self.tbytes_s * 1e9)

    def ms(self, kernel: Kernel) -> float:
        """The longest of computing, moving and launching."""
        return max(self.compute_ms(kernel), self.memory_ms(kernel), self.launch_us / 1e3)


def measure_roofline(workload: Workload, roof: Roof) -> Iterator[Figure]:
    """Tables by kind of kernel and by part of the network, and the sums; computes nothing and needs no GPU."""
    yield Note(
        f"Prediction for one compiled training step of {workload.encoder}, {workload.size[0]}x{workload.size[1]}, "
        f"batch {workload.batch}, {'bfloat16' if roof.half else 'float32'}. A kernel takes the longest of its "
        f"arithmetic at {roof.tflops:g} TFLOP/s (float32: half of it, depthwise: {roof.vector_tflops:g}), its bytes at "
        f"{roof.tbytes_s:g} TB/s, and {roof.launch_us:g} us. No real kernel is that fast; caches and the host are left "
        "out, and sorting and scattering count as mere reading and writing."
    )
    net = workload.net()
    kernels = [*_loss_kernels(workload, net), *_update_kernels(workload, net)]
    yield _table("By kind of kernel", kernels, roof, lambda kernel: kernel.kind)
    yield _table("By part of the network, forward and backward", kernels, roof, lambda kernel: kernel.part)
    encoder_ms = sum(map(roof.ms, _encoder_kernels(workload)))
    joint_ms = sum(map(roof.ms, kernels))
    yield Row("matrix products and convolutions", sum(kernel.flops for kernel in kernels) / 1e9, "GFLOP")
    yield Row("read and written", sum(kernel.bytes_moved() for kernel in kernels) / 1e9, "GB")
    yield Row("joint step, at least", joint_ms, "ms")
    yield Row("encoder alone, at least", encoder_ms, "ms")
    yield Row("joint / encoder alone", joint_ms / encoder_ms, "")
    yield Row("images a second, at most", workload.batch * 1e3 / joint_ms, "")


def _loss_kernels(workload: Workload, net: MultiTaskNet) -> list[Kernel]:
    """Forward and backward of all losses."""
    batch = workload.batch_of(workload.samples())
    train = workload.run(mode="compiled").train
    graphs = _Graphs()
    with graphs.fake:
        loss_net = LossNet(graphs.faked(net), cut=False)
        compile_losses(loss_net, train, torch.device("cpu"), backend=graphs.backend)
        image, targets, labelled, counts, color = graphs.faked_tensors(
            (batch.image.contiguous(memory_format=torch.channels_last), batch.targets, batch.labelled, batch.counts,
             batch.color)
        )  # fmt: skip
        with torch.autocast("cpu", workload.dtype, enabled=workload.dtype != torch.float32):
            parts, _, _ = loss_net(image, targets, labelled, counts, color, {})
        torch.stack([loss for of_task in parts.values() for loss in of_task.values()]).sum().backward()
    of_module = {"net.trunk.": "pyramid and sharing", "net.trunk.encoder": "encoder"}
    of_module |= {f"net.{kind}.{name}": name for kind in ("decoders", "auxiliary") for name in net.decoders}
    return graphs.kernels(of_module)


def _encoder_kernels(workload: Workload) -> list[Kernel]:
    """The step of `workload.encoder_step`."""
    encoder = workload.run().model.encoder.build(workload.size, coarsest=5)
    image = torch.empty(workload.batch, 3, *workload.size).contiguous(memory_format=torch.channels_last)
    graphs = _Graphs()
    with graphs.fake:
        encoder = graphs.faked(encoder.to(memory_format=torch.channels_last).train())

        def loss(image: Tensor) -> Tensor:
            return mean_of_maps(encoder(image))

        compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend=graphs.backend)
        with torch.autocast("cpu", workload.dtype, enabled=workload.dtype != torch.float32):
            value = compiled(graphs.faked_tensors(image))
        value.backward()
    return [*graphs.kernels({}), *_update_kernels(workload, encoder, average=False)]


def _update_kernels(workload: Workload, net: nn.Module, average: bool = True) -> Iterator[Kernel]:
    """AdamW reads weights, gradients and two moments and writes all but the gradients; the average follows."""
    learnt = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    passes = {"AdamW": 7.0}
    if average:
        every = workload.run().optim.ema_every_steps or 1
        passes |= {"clipping": 3.0, "moving average": 3.0 / every}  # norm and scaling; weights, average
    for name, count in passes.items():
        yield Kernel(OPTIMIZER, OPTIMIZER, 0.0, {name: count * learnt}, {}, 0)


class _Graphs:
    """Catches forward and backward graphs, on tensors that have shapes alone.

    They are traced as of a CPU, for whose tensors a machine without a GPU can trace a backward; what we compile is the
    same on both.
    """

    def __init__(self) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._modules: list[GraphModule] = []

        def keep(module: GraphModule, _inputs: Any) -> Any:
            self._modules.append(module)
            return make_boxed_func(module.forward)

        self.backend = aot_autograd(
            fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        )  # fmt: skip

    def kernels(self, parts: dict[str, str]) -> list[Kernel]:
        """Of all graphs so far; parts: as for `kernels_of`."""
        return [kernel for module in self._modules for kernel in kernels_of(module.graph, parts)]

    def faked_tensors(self, tree: Any) -> Any:
        """The same with tensors that hold no values."""
        return pytree.tree_map_only(Tensor, self.fake.from_tensor, tree)

    def faked(self, module: Any) -> Any:
        """The module itself, its parameters and buffers without values."""
        known: dict[int, nn.Parameter] = {}
        for child in module.modules():
            for name, parameter in child.named_parameters(recurse=False):
                if id(parameter) not in known:
                    data = self.fake.from_tensor(parameter.detach())
                    known[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
                child._parameters[name] = known[id(parameter)]
            for name, buffer in child.named_buffers(recurse=False):
                child._buffers[name] = self.fake.from_tensor(buffer)
        return module


def _table(title: str, kernels: Sequence[Kernel], roof: Roof, key: Callable[[Kernel], str]) -> Table:
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(key(kernel), []).append(kernel)
    rows: list[Sequence[Cell]] = []
    for name, group in sorted(groups.items(), key=lambda item: -sum(map(roof.ms, item[1]))):
        moved = sum(kernel.bytes_moved() for kernel in group) / 1e9
        rows.append((
            name, str(len(group)), sum(kernel.flops for kernel in group) / 1e9, moved,
            sum(map(roof.compute_ms, group)), sum(map(roof.memory_ms, group)), sum(map(roof.ms, group)),
        ))  # fmt: skip
    heads = ("", "kernels", "GFLOP", "GB", "ms of arithmetic", "ms of memory", "ms")
    return Table(title, heads, rows)
