"""What a graph costs: floating-point operations, bytes moved, bytes kept for the backward pass.

A dialect op knows its own cost. For any other node: products (matrix products, convolutions, attention) by their
formula, one operation per element of a floating-point pointwise op, and for every node the bytes of its tensor
inputs and outputs. Views are free, and so is what is neither product nor pointwise but for its bytes. These are
the costs of running op by op: a compiler that fuses moves fewer bytes. Symbolic sizes count as they were at
capture; asking adds no guard.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from adaptc import torch_internals
from adaptc.codegen.ops import registry
from adaptc.ir import dialect
from adaptc.ir.dialect import Cost
from adaptc.ir.edit import copy_graph_module, nested
from adaptc.ir.effects import may_write
from adaptc.ir.names import op_name
from adaptc.ir.sites import is_anchor, is_inserted
from adaptc.torch_internals import HigherOrderOperator, OpOverload, is_backward, node_value, size_hint, tree_leaves

log = logging.getLogger(__name__)

#: Products whose contracted size is the last dimension of the first, or of the second, argument; bitsandbytes' too.
_BY_FIRST = frozenset({"linear", "matmul", "mm", "bmm", "mv", "dot", "gemm_4bit", "int8_scaled_mm"})
_BY_SECOND = frozenset({"addmm", "baddbmm", "addmv"})
#: Torch functions that contain products and have no one formula: the ATen calls that they make are counted.
_TRACED = frozenset({"einsum", "multi_head_attention_forward", "bilinear", "tensordot", "inner", "addbmm"})
#: Python's names of pointwise operators where ATen's differ.
_ATEN_NAMES = {"truediv": "div", "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div"}


def graph_cost(gm: fx.GraphModule, which: Callable[[fx.Node], bool] | None = None) -> Cost:
    """The cost of running ``gm`` once, bodies of higher-order ops included; of the nodes that ``which`` picks.

    Of several bodies of one op (the branches of a condition) the dearest counts.
    """
    bodies: dict[fx.Node, list[fx.GraphModule]] = {}
    for call, body, _ in nested(gm):
        bodies.setdefault(call, []).append(body)
    total = Cost()
    for node in gm.graph.nodes:
        if node in bodies:
            total += max((graph_cost(body, which) for body in bodies[node]), key=lambda cost: cost.flops)
        elif which is None or which(node):
            total += _estimate(node)
    return total


def level_cost(gm: fx.GraphModule, level: str) -> Cost:
    """``graph_cost`` with the bytes saved for the backward as far as the level shows them: what crosses in a
    joint graph were nothing recomputed, and nothing in a captured graph, whose backward does not exist yet."""
    saved = crossing_bytes(gm) if level == "joint" else 0
    return dataclasses.replace(graph_cost(gm), saved=saved)


def _estimate(node: fx.Node) -> Cost:
    """``node_cost``, or nothing where it fails: a model must compile whatever can be said of its costs."""
    try:
        return node_cost(node)
    except Exception:
        log.warning("no cost estimate of %s", node.format_node(), exc_info=log.isEnabledFor(logging.DEBUG))
        return Cost()


def node_cost(node: fx.Node) -> Cost:
    """The cost of one node of a captured or joint graph; nothing when the values of its inputs are not known."""
    value = node_value(node)
    if node.op not in ("call_function", "call_method") or value is None:
        return Cost()
    args, kwargs = fx.map_arg((node.args, node.kwargs), node_value)
    if node.target is operator.getitem and not isinstance(args[0], torch.Tensor):
        return Cost()
    op = dialect.of_target(node.target)
    if op is not None:
        device = next(t.device for t in _tensors((args, kwargs)))
        cost = registry.cost_of(op.name, device, *args)
        if cost is not None:
            return cost(*_stand_ins(args), **_stand_ins(kwargs))
        return _traced_cost(op.body, args, kwargs)
    if is_anchor(node) or op_name(node) in _TRACED:
        return _traced_cost(node.target, args, kwargs)
    if isinstance(node.target, HigherOrderOperator) or (_is_view(args, kwargs, value) and not may_write(node)):
        return Cost()
    flops = _aten_flops if isinstance(node.target, OpOverload) else _torch_flops
    return _moved((args, kwargs), value, flops(node.target, args, kwargs, value))


def is_adapter(node: fx.Node) -> bool:
    """Whether a node is there because of an adapter: an anchor, what a pass made of it, its part of the backward.

    A sum of gradients counts when it adds an adapter's.
    """
    if is_anchor(node) or is_inserted(node):
        return True
    return bool(node.meta.get("is_gradient_acc")) and any(is_adapter(n) for n in node.all_input_nodes)


@dataclasses.dataclass(frozen=True)
class Share:
    """A cost, split into the frozen base's part and what the adapters add."""

    base: Cost = dataclasses.field(default_factory=Cost)
    adapters: Cost = dataclasses.field(default_factory=Cost)


def shares(gm: fx.GraphModule) -> dict[str, Share]:
    """``forward`` and, for a joint graph, ``backward``: what the base costs and what the adapters add."""
    phases = {"forward": lambda n: not is_backward(n), "backward": is_backward}
    has_backward = any(is_backward(node) for node in gm.graph.nodes)
    return {
        phase: Share(
            graph_cost(gm, lambda n, inside=inside: inside(n) and not is_adapter(n)),  # type: ignore[misc]
            graph_cost(gm, lambda n, inside=inside: inside(n) and is_adapter(n)),  # type: ignore[misc]
        )
        for phase, inside in phases.items()
        if phase == "forward" or has_backward
    }


def saved_bytes(forward: fx.GraphModule, backward: fx.GraphModule) -> tuple[int, int]:
    """Bytes that cross from forward to backward besides the inputs: (for the base, for the adapters).

    A value is the adapters' when one of their nodes made it, or when only their nodes read it.
    """
    made = {node.name: node for node in forward.graph.nodes}
    inputs = {node.name for node in forward.graph.nodes if node.op == "placeholder"}
    counted = _Counted(made[name] for name in inputs)
    base = adapters = 0
    for node in backward.graph.nodes:
        # What the backward alone receives are the gradients of the outputs.
        if node.op != "placeholder" or node.name in inputs or node.name not in made:
            continue
        for tensor in _tensors(node_value(node)):
            size = counted.bytes_of(tensor)
            readers = [user for user in node.users if user.op != "output"]
            if is_adapter(made[node.name]) or (readers and all(is_adapter(user) for user in readers)):
                adapters += size
            else:
                base += size
    return base, adapters


def crossing_bytes(joint: fx.GraphModule) -> int:
    """Bytes that the backward part of a joint graph reads from the forward part, were nothing recomputed."""
    counted = _Counted(node for node in joint.graph.nodes if node.op == "placeholder")
    total = 0
    for node in joint.graph.nodes:
        if node.op == "placeholder" or is_backward(node) or not any(is_backward(user) for user in node.users):
            continue
        for tensor in _tensors(node_value(node)):
            total += counted.bytes_of(tensor)
    return total


class _Counted:
    """What was counted of memory: nothing that is an input's."""

    def __init__(self, inputs: Iterable[fx.Node]) -> None:
        self._known = {torch_internals.storage_key(t) for n in inputs for t in _tensors(node_value(n))}

    def bytes_of(self, tensor: torch.Tensor) -> int:
        """Those that keeping a tensor keeps alive, and nothing that was counted does: all of what it is a part of."""
        memory = torch_internals.storage_key(tensor)
        if memory in self._known:
            return 0
        self._known.add(memory)
        return torch_internals.storage_bytes(tensor)


def partition(joint: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a copy of a joint graph as AOTAutograd's min-cut partitioner would."""
    return torch_internals.cut(copy_graph_module(joint))


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a tensor's elements take in memory; repeated (expanded) elements count once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    strides_known = (size_hint(size) for size, stride in sizes if not _is_zero(stride))
    return math.prod(strides_known) * tensor.dtype.itemsize


def _is_zero(stride: Any) -> bool:
    return isinstance(stride, int) and stride == 0


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _moved(inputs: Any, output: Any, flops: int) -> Cost:
    read = {id(t): t for t in _tensors(inputs)}.values()
    written = _tensors(output)
    return Cost(flops, sum(map(tensor_bytes, read)), sum(map(tensor_bytes, written)))


def _is_view(args: Any, kwargs: Any, value: Any) -> bool:
    """Whether an op's results are all in the memory of its inputs."""
    memory = {torch_internals.storage_key(t) for t in _tensors((args, kwargs))}
    results = list(_tensors(value))
    return all(torch_internals.storage_key(t) in memory for t in results)


def _stand_ins(tree: Any, on_meta: bool = True) -> Any:
    """``tree`` with tensors of plain sizes and no data: asking a fake tensor for its numbers would add guards."""
    if isinstance(tree, torch.Tensor):
        sizes, strides = map(size_hint, tree.shape), map(size_hint, tree.stride())
        device = "meta" if on_meta else tree.device
        return torch.empty_strided(tuple(sizes), tuple(strides), dtype=tree.dtype, device=device)
    if isinstance(tree, torch.SymInt):
        return size_hint(tree)
    if isinstance(tree, list | tuple):
        items = [_stand_ins(item, on_meta) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    if isinstance(tree, dict):
        return {key: _stand_ins(item, on_meta) for key, item in tree.items()}
    return tree


def _traced_cost(function: Any, args: Any, kwargs: Any) -> Cost:
    """The sum over the ATen calls that ``function`` makes."""
    return sum(call_costs(function, args, kwargs), Cost())


def call_costs(function: Callable[..., object], args: Any, kwargs: Any) -> list[Cost]:
    """The cost of each ATen call that ``function`` makes, views aside, on fake tensors like those given."""
    found: list[Cost] = []

    def add(op: Any, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(op, OpOverload) and not (_is_view(args, kwargs, output) and not op._schema.is_mutable):
            found.append(_moved((args, kwargs), output, _aten_flops(op, args, kwargs, output)))

    # Fake tensors rather than meta ones: anchors ask for the device, to switch its autocast off.
    with torch.no_grad(), torch_internals.fake_mode_of(()):
        args, kwargs = _stand_ins((args, kwargs), on_meta=False)
        with torch_internals.watch_calls(add):
            function(*args, **kwargs)
    return found


def _aten_flops(op: Any, args: Any, kwargs: Any, output: Any) -> int:
    name = op._schema.name.partition("::")[2]
    if name in _BY_FIRST or name in _BY_SECOND:
        return _product_flops(name, args, output)
    if name.startswith("_scaled_dot_product"):
        shapes = [tuple(map(size_hint, t.shape)) for t in args if isinstance(t, torch.Tensor)]
        if name.endswith("_backward"):
            return int(sdpa_backward_flop_count(*shapes[:4]))  # type: ignore[no-untyped-call]
        return int(sdpa_flop_count(*shapes[:3]))  # type: ignore[no-untyped-call]
    formula = flop_registry.get(op.overloadpacket)
    if formula is not None:
        flops = formula(*_stand_ins(args), **_stand_ins(kwargs), out_val=_stand_ins(output))
        biased = name == "convolution" and args[2] is not None
        return int(flops) + (_elements(output) if biased else 0)
    return _elements(output) if torch.Tag.pointwise in op.tags and _computes(name, args, output) else 0


def _torch_flops(function: Any, args: Any, kwargs: Any, output: Any) -> int:
    name = str(function if isinstance(function, str) else getattr(function, "__name__", "")).strip("_")
    arguments = [*args, *kwargs.values()]
    tensors = list(_tensors(arguments))
    if name in _BY_FIRST or name in _BY_SECOND:
        biased = name == "linear" and len(tensors) == 3
        return _product_flops(name, tensors, output) + (_elements(output) if biased else 0)
    if name.startswith("conv") and name[-1:] == "d":
        source = tensors[0] if "transpose" in name else output
        kernel = [size_hint(size) for size in tensors[1].shape[1:]]
        return 2 * _elements(source) * math.prod(kernel) + (_elements(output) if len(tensors) == 3 else 0)
    if name == "scaled_dot_product_attention":
        query, key, value = ([size_hint(size) for size in t.shape] for t in tensors[:3])
        return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    name = _ATEN_NAMES.get(name, name)
    return _elements(output) if _is_pointwise(name) and _computes(name, args, output) else 0


def _product_flops(name: str, args: Any, output: Any) -> int:
    contracted = args[name in _BY_SECOND]
    depth = size_hint(contracted.shape[-1])
    return _elements(output) * (2 * depth + (name in _BY_SECOND))


def _computes(name: str, args: Any, output: Any) -> bool:
    """Whether a pointwise op computes with floating-point numbers: copies and casts only move them."""
    copies = name in ("clone", "convert_element_type", "where", "to", "copy", "masked_fill")
    return not copies and all(t.is_floating_point() for t in _tensors(output))


@functools.cache
def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    overloads: Iterable[str] = packet.overloads() if packet is not None else ()
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads)


def _elements(tree: Any) -> int:
    return sum(math.prod(map(size_hint, t.shape)) for t in _tensors(tree))
