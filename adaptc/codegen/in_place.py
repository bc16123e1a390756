"""Accumulate into a product where it is, on the graphs that Inductor is about to lower.

before:  %y = mm(%x, %W);  %out = addmm(%y, %h, %B);  f(%out)        the library copies y, then adds to the copy
after:   %y = mm(%x, %W);  add_product_(%y, %h, %B);  f(%y)

the same for ``lora_input_grads(%dx, ...)``,

before:  %a = mm(%g, %W);  %b = mm(%h, %V);  %dx = add(%a, %b)       two results, and a pass over both
after:   %a = mm(%g, %W);  add_product_(%a, %h, %V)

as the gradients of one input by q, k and v are, and

before:  %g = mul(...);  %dy, %dm = dora_rescale_grad(%g, %y, ...)
after:   %g = mul(...);  %dm = rescale_grad_(%g, %y, ...);  f(%g)

and the same for ``dora_output_grads``,

where %g is new memory, as that of a product or of what a loop writes. Where nothing else reads it, and it has the shape
of the result. On a GPU only the first, where a copy takes longer than Python does around the call, and where Inductor
does not write products itself, which add as they write. After partitioning, because what runs before that must be
functional.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from adaptc.codegen.ops.in_place import ADD_PRODUCT, ADD_PRODUCTS, OUTPUT_GRADS, RESCALE_GRAD
from adaptc.ir import dialect
from adaptc.torch_internals import OpOverload, demand_layouts, node_value, size_hint, tree_leaves, writes_products

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default, dialect.get("onednn_linear").overload)
_LOOPS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.clone.default)
#: Bytes on a GPU below which the copy may cost less than Python does around a call of an op.
_WORTH_A_CALL = 1 << 24
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def accumulate_in_place(graph: fx.Graph) -> int:
    """Rewrite ``graph``; returns how many results are made in place now."""
    in_place = {aten.addmm.default: ADD_PRODUCT, dialect.get("lora_input_grads").overload: ADD_PRODUCTS}
    count = _sum_products(graph)
    for node in graph.nodes:
        if node.target not in in_place or node.kwargs:
            continue
        views, *rest = cast(tuple[fx.Node, ...], node.args)
        product = _owned(views, _is_new)
        if product is None or not (_same_memory(product, node) and _same_shape(views, node)):
            continue
        if views in tree_leaves(rest):  # y + y W: one reader, which needs the product as it was
            continue
        with graph.inserting_before(node):
            _call(graph, in_place[node.target], (product, *rest), node, None)
            total = _viewed(graph, product, views)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        _erase_views(graph, views, product)
        count += 1
    return count + _scale_in_place(graph)


def _sum_products(graph: fx.Graph) -> int:
    order = {node: i for i, node in enumerate(graph.nodes)}
    count = 0
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
            continue
        pairs = [(views, product) for views in node.args if (product := _owned(views, _is_product)) is not None]
        if len(pairs) < 2 or pairs[0][1] is pairs[1][1]:
            continue
        (views, total), (folded_views, folded) = sorted(pairs, key=lambda pair: order[pair[1]])
        is_plain = folded.target is aten.mm.default and len(folded.users) == 1
        # A matrix that is broadcast to a batch of one has another shape than the sum.
        alike = _same_shape(views, node) and _same_memory(total, node) and _same_memory(folded, node)
        if not (is_plain and alike):
            continue
        value = node_value(node)
        if value.dtype.itemsize < 4 or value.device.type != "cpu":  # rounded once each, as without an adapter
            continue
        with graph.inserting_before(folded):
            _call(graph, ADD_PRODUCT, (total, *folded.args), folded, None)
        with graph.inserting_before(node):
            node.replace_all_uses_with(_viewed(graph, total, views))
        graph.erase_node(node)
        _erase_views(graph, views, total)
        _erase_views(graph, folded_views, folded)
        graph.erase_node(folded)
        count += 1
    return count


#: Op -> the same in place, and which of its results that one leaves in the memory of the gradient.
_SCALED = {
    dialect.get("dora_rescale_grad").overload: (RESCALE_GRAD, 0),
    dialect.get("dora_output_grads").overload: (OUTPUT_GRADS, 2),
}


def _scale_in_place(graph: fx.Graph) -> int:
    count = 0
    for node in [n for n in graph.nodes if n.target in _SCALED]:
        found = _owned_gradient(node)
        if found is None:
            continue
        memory, outputs = found
        op, scaled = _SCALED[node.target]
        values = node_value(node)
        others = [i for i in range(len(values)) if i != scaled]
        with graph.inserting_before(node):
            value = tuple(values[i] for i in others) if len(others) > 1 else values[others[0]]
            made = _call(graph, op, (memory, *node.args[1:]), node, value)
            results = {scaled: _scaled_gradient(graph, node, memory)}
            for place, index in enumerate(others):
                results[index] = graph.call_function(operator.getitem, (made, place)) if len(others) > 1 else made
                results[index].meta = {**made.meta, "val": values[index]}
        _replace(graph, node, outputs, results, memory)
        count += 1
    return count


def _owned_gradient(node: fx.Node) -> tuple[fx.Node, dict[int, fx.Node]] | None:
    """The node whose memory the gradient that ``node`` reads is, if that can be written to, and the results."""
    grad, *rest = cast(tuple[Any, ...], node.args)
    memory = _owned(grad, _is_new)
    if memory is None or grad in rest or not _is_dense(memory):
        return None
    return memory, {cast(int, user.args[1]): user for user in node.users if user.target is operator.getitem}


def _scaled_gradient(graph: fx.Graph, node: fx.Node, memory: fx.Node) -> fx.Node:
    grad = cast(fx.Node, node.args[0])
    if grad is memory:
        return memory
    view = graph.call_function(aten.view.default, (memory, *grad.args[1:]))
    view.meta = dict(grad.meta)
    return view


def _replace(
    graph: fx.Graph, node: fx.Node, outputs: dict[int, fx.Node], results: dict[int, fx.Node], memory: fx.Node
) -> None:
    grad = cast(fx.Node, node.args[0])
    for index, output in outputs.items():
        output.replace_all_uses_with(results[index])
        graph.erase_node(output)
    graph.erase_node(node)
    _erase_views(graph, grad, memory)


def _call(graph: fx.Graph, op: OpOverload, args: tuple[Any, ...], instead_of: fx.Node, value: Any) -> fx.Node:
    """A call of ``op`` that knows what ``instead_of`` does, with the layouts of its own arguments."""
    node = graph.call_function(op, args)
    node.meta = {**instead_of.meta, "val": value}
    demand_layouts(node)
    return node


def _erase_views(graph: fx.Graph, last: fx.Node, source: fx.Node) -> None:
    while last is not source and not last.users:
        last, dead = cast(fx.Node, last.args[0]), last
        graph.erase_node(dead)


def _owned(node: fx.Node, makes: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The node whose result ``node`` is the memory of, if it ``makes`` one that nothing else reads, directly or through
    views."""
    while node.target in _VIEWS and len(node.users) == 1:
        node = cast(fx.Node, node.args[0])
    readers = [user for user in node.users if not _only_adds_to(user, node)]
    return node if makes(node) and len(readers) == 1 else None


def _only_adds_to(user: fx.Node, total: fx.Node) -> bool:
    """Whether ``user`` is a sum in the memory of ``total``, which it does not read as a factor too."""
    is_sum = user.target in (ADD_PRODUCT, ADD_PRODUCTS) and user.args[0] is total
    return is_sum and total not in tree_leaves(user.args[1:])


def _is_product(node: fx.Node) -> bool:
    return node.target in _PRODUCTS


def _is_new(node: fx.Node) -> bool:
    """Whether a node's memory is no other's: a product's, or what a loop over elements writes. A cast to the dtype that
    a value has is the value itself."""
    if node.target is not torch.ops.prims.convert_element_type.default:
        return node.target in (*_PRODUCTS, *_LOOPS)
    return bool(node_value(node).dtype != node_value(cast(fx.Node, node.args[0])).dtype)


def _is_dense(node: fx.Node) -> bool:
    value = node_value(node)
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.is_contiguous()


def _same_memory(product: fx.Node, total: fx.Node) -> bool:
    """Whether both are contiguous where sums in place are worth it, of one dtype, and of one shape or the first of that
    of the second as rows."""
    first, second = node_value(product), node_value(total)
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)) or second.dim() == 0:
        return False
    if not (_is_worth_it(first) and first.is_contiguous() and second.is_contiguous()):
        return False
    rows = torch.Size((math.prod(second.shape[:-1]), second.shape[-1]))
    return first.dtype == second.dtype and any(_equal(first.shape, shape) for shape in (second.shape, rows))


def _is_worth_it(total: torch.Tensor) -> bool:
    """Whether adding to ``total`` where it is saves time."""
    if total.device.type == "cpu":
        return True
    size = math.prod(size_hint(s) for s in total.shape) * total.dtype.itemsize
    return total.device.type == "cuda" and size >= _WORTH_A_CALL and not writes_products()


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    return _equal(node_value(one).shape, node_value(other).shape)


def _equal(first: torch.Size, second: torch.Size) -> bool:
    return len(first) == len(second) and all(
        statically_known_true(a == b) for a, b in zip(first, second, strict=True)
    )


def _viewed(graph: fx.Graph, product: fx.Node, views: fx.Node) -> fx.Node:
    """``product`` in the shape of ``views``, behind the sum: who reads it reads what the sum left there."""
    if views is product or node_value(views).dim() == 2:
        return product
    view = graph.call_function(aten.view.default, (product, *views.args[1:]))
    view.meta = dict(views.meta)
    return view
