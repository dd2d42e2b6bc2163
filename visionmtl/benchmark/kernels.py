"""The kernels that a compiler would make of a graph: what each computes, reads and writes, without a device."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from visionmtl.benchmark.measure import backward_flops

CONVOLUTION, DEPTHWISE, PRODUCT = "convolutions", "depthwise convolutions", "matrix products"
POINTWISE, REDUCTION, SCATTER, OTHER = "pointwise", "reductions", "scatters", "sorting and own kernels"

INLINED_READS, INLINED_READS_IF_SHARED = 8, 4
"""A pointwise result is kept once it reads more than so many buffers, and where several kernels read it more than so
many; else each of them computes it again. Those are the thresholds of torch's compiler (realize_acc_reads_threshold,
realize_reads_threshold)."""

_aten, _prims = torch.ops.aten, torch.ops.prims
_VIEWS = {
    "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand", "permute", "transpose", "t", "alias", "slice",
    "select", "as_strided", "split_with_sizes", "split", "unbind", "detach", "broadcast_in_dim", "lift_fresh_copy",
    "getitem",
}  # fmt: skip
_CONSTANTS = {"full", "iota", "scalar_tensor", "empty", "full_like", "zeros", "ones", "arange", "empty_permuted"}
_REDUCTIONS = {
    "sum", "mean", "var_mean", "amax", "amin", "any", "all", "max", "min", "argmax", "argmin", "prod", "logsumexp",
}  # fmt: skip
_SCATTERS = {"scatter", "scatter_add", "scatter_reduce", "index_put", "_unsafe_index_put"}
_SORTS = {"topk", "sort", "cumsum", "nonzero", "unique"}


@dataclass
class Kernel:
    """One launch."""

    kind: str
    part: str  # of the network
    flops: float  # of matrix products and convolutions
    reads: dict[Any, float] = field(default_factory=dict)  # bytes by buffer
    writes: dict[fx.Node, float] = field(default_factory=dict)
    elements: int = 0  # over which it iterates

    def bytes_moved(self) -> float:
        """Read from memory and written to it, each buffer once."""
        outside = sum(size for buffer, size in self.reads.items() if buffer not in self.writes)
        return outside + sum(self.writes.values())


def kernels_of(graph: fx.Graph, parts: Mapping[str, str]) -> list[Kernel]:
    """The kernels of a functional graph of aten and prims operators whose nodes know their shapes.

    parts: by the beginning of a module's path the part it belongs to; the longest that fits counts

    Products, sorts and opaque operators are kernels of their own. Pointwise operators are computed where they are
    read, or kept as `INLINED_READS` says, a reduction is kept; then kernels over equally many elements that share a
    buffer are fused, the largest share first, where no other kernel lies between. Views and constants cost nothing.
    """
    scheduler = _Scheduler(graph, parts)
    return _fused(scheduler.kernels, scheduler.outputs)


class _Scheduler:
    """Which nodes are written to memory, and by which kernel."""

    def __init__(self, graph: fx.Graph, parts: Mapping[str, str]) -> None:
        self.kernels: list[Kernel] = []
        self._parts = parts
        self._reads: dict[fx.Node, dict[fx.Node, float]] = {}
        """By node the buffers that computing it where it is read would read, with their bytes."""
        output = next(node for node in graph.nodes if node.op == "output")
        self.outputs = {_base(node) for node in output.all_input_nodes}
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._reads[node] = {node: _bytes(node)}
            elif node.op == "call_function":
                self._add(node)

    def _add(self, node: fx.Node) -> None:
        name = _name(node)
        if _is_view(node):
            read = self._reads[node.all_input_nodes[0]]
            # a part of a buffer that lies in memory is read, and a repetition of it once
            self._reads[node] = {buffer: min(size, _bytes(node)) for buffer, size in read.items()}
            return
        if name in _CONSTANTS:
            self._reads[node] = {}
            return
        reads: dict[fx.Node, float] = {}
        for argument in node.all_input_nodes:
            for buffer, size in self._reads[argument].items():
                reads[buffer] = max(size, reads.get(buffer, 0))
        kind = _kind(node)
        if kind == POINTWISE and not self._is_kept(node, reads):
            self._reads[node] = reads
            return
        if kind in (CONVOLUTION, DEPTHWISE, PRODUCT):
            self.kernels += _products(node, kind, self._part(node), self._reads)
        else:
            iterated = [node] if kind == POINTWISE else [node, *node.all_input_nodes]
            elements = max(map(_elements, iterated))
            self.kernels.append(Kernel(kind, self._part(node), 0.0, reads, {node: _bytes(node)}, elements))
        self._reads[node] = {node: _bytes(node)}

    def _is_kept(self, node: fx.Node, reads: Mapping[fx.Node, float]) -> bool:
        readers = _readers(node)
        if node in self.outputs or len(reads) > INLINED_READS:
            return True
        if any(_kind(reader) not in (POINTWISE, REDUCTION) for reader in readers):
            return True
        return len(readers) > 1 and len(reads) > INLINED_READS_IF_SHARED

    def _part(self, node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
        path = next((path for path, _ in reversed(stack.values())), "") if stack else ""
        path = path.replace("L['self'].", "").replace("['", ".").replace("']", "")
        fitting = [prefix for prefix in self._parts if path.startswith(prefix)]
        return self._parts[max(fitting, key=len)] if fitting else "losses"


def _fused(kernels: Sequence[Kernel], outputs: set[fx.Node]) -> list[Kernel]:
    """Kernels over equally many elements that share a buffer as one, then without the writes that nobody reads."""
    groups: dict[int, Kernel] = {}
    above: dict[int, int] = {}  # bit mask of the groups that must run before one
    writer: dict[fx.Node, int] = {}
    touching: dict[fx.Node, set[int]] = {}
    for number, kernel in enumerate(kernels):
        before = 0
        for buffer in kernel.reads:
            if (other := writer.get(buffer)) is not None:
                before |= 1 << other | above[other]
        place = number
        if kernel.kind in (POINTWISE, REDUCTION):
            place = _best(kernel, groups, above, before, touching, writer, number)
        if place == number:
            groups[number], above[number] = kernel, before
        else:
            group = groups[place]
            group.kind = REDUCTION if REDUCTION in (group.kind, kernel.kind) else POINTWISE
            group.reads = {b: max(group.reads.get(b, 0), kernel.reads.get(b, 0)) for b in group.reads | kernel.reads}
            group.writes |= kernel.writes
            before &= ~(1 << place)
            above[place] |= before
            for other, mask in above.items():
                if mask >> place & 1:
                    above[other] |= before
        for buffer in (*kernel.reads, *kernel.writes):
            touching.setdefault(buffer, set()).add(place)
        writer.update(dict.fromkeys(kernel.writes, place))

    read_elsewhere = {
        buffer for place, group in groups.items() for buffer in group.reads if writer.get(buffer, place) != place
    }
    for group in groups.values():
        kept = {b: size for b, size in group.writes.items() if b in read_elsewhere or b in outputs}
        group.reads = {b: size for b, size in group.reads.items() if b not in group.writes}
        group.writes = kept
    return list(groups.values())


def _best(
    kernel: Kernel, groups: Mapping[int, Kernel], above: Mapping[int, int], before: int,
    touching: Mapping[fx.Node, set[int]], writer: Mapping[fx.Node, int], number: int,
) -> int:  # fmt: skip
    """The group that shares most bytes with a kernel and may run as one with it, else `number`."""
    shared: dict[int, float] = {}
    for buffer, size in kernel.reads.items():
        for place in touching.get(buffer, ()):
            group = groups[place]
            if group.kind in (POINTWISE, REDUCTION) and group.elements == kernel.elements:
                shared[place] = shared.get(place, 0) + size
    for place in sorted(shared, key=lambda place: (-shared[place], -place)):
        direct = {writer[b] for b in kernel.reads if b in writer} - {place}
        between = any(above[other] >> place & 1 for other in direct)
        reduced = any(b in groups[place].writes and _kind(b) == REDUCTION for b in kernel.reads)
        if not between and not reduced:  # what reads a whole reduction comes after it
            return place
    return number


def _products(
    node: fx.Node, kind: str, part: str, of_node: Mapping[fx.Node, Mapping[fx.Node, float]]
) -> Iterator[Kernel]:
    """One kernel; two for the backward of a convolution: the gradients of its input and of its weights."""

    def shapes(value: Any) -> Any:
        return pytree.tree_map_only(fx.Node, lambda node: list(_tensor(node).shape), value)

    def read(*nodes: Any) -> dict[fx.Node, float]:
        return {buffer: size for one in nodes if isinstance(one, fx.Node) for buffer, size in of_node[one].items()}

    if node.target != _aten.convolution_backward.default:
        formula = flop_registry[getattr(node.target, "overloadpacket", node.target)]
        flops = float(formula(*shapes(node.args), **shapes(node.kwargs), out_val=_tensor(node)))
        yield Kernel(kind, part, flops, read(*node.all_input_nodes), {node: _bytes(node)}, _elements(node))
        return
    arguments: Any = node.args
    gradient, x, weight, *_, mask = arguments
    flops = backward_flops(*shapes((*arguments, None))) / max(1, sum(mask[:2]))
    written = node.meta["val"]
    for is_computed, reads, result in zip(mask[:2], ((gradient, weight), (gradient, x)), written[:2], strict=True):
        if is_computed:
            size = float(result.numel() * result.element_size())
            yield Kernel(kind, part, flops, read(*reads), {node: size}, result.numel())


def _kind(node: fx.Node) -> str:
    name = _name(node)
    if name in ("convolution", "convolution_backward"):
        weight, groups = (
            (node.args[2], node.args[9]) if name == "convolution_backward" else (node.args[1], node.args[8])
        )
        return DEPTHWISE if groups != 1 and _tensor(weight).shape[1] == 1 else CONVOLUTION
    if getattr(node.target, "overloadpacket", None) in flop_registry:
        return PRODUCT
    if name in _REDUCTIONS:
        return REDUCTION
    if name in _SCATTERS:
        return SCATTER
    if name in _SORTS or getattr(node.target, "namespace", "aten") not in ("aten", "prims"):
        return OTHER
    return POINTWISE


def _readers(node: fx.Node) -> list[fx.Node]:
    """What computes with a node, through views."""
    readers: list[fx.Node] = []
    for user in node.users:
        if user.op == "call_function":
            readers += _readers(user) if _is_view(user) else [user]
    return readers


def _base(node: fx.Node) -> fx.Node:
    """The node whose memory a view looks at."""
    while node.op == "call_function" and _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _is_view(node: fx.Node) -> bool:
    return _name(node) in _VIEWS


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def _tensors(node: fx.Node) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]


def _tensor(node: Any) -> Tensor:
    return _tensors(node)[0]


def _elements(node: fx.Node) -> int:
    return max((tensor.numel() for tensor in _tensors(node)), default=0)


def _bytes(node: fx.Node) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in _tensors(node)))
