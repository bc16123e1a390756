"""LoRA by rows in the memory of the frozen layer's output, and of the gradient of its input."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from adaptc.codegen.ops.in_place import LORA_ROWS, LORA_ROWS_GRADS
from adaptc.ir import dialect
from adaptc.ir.edit import Edit
from adaptc.ir.products import VIEWS, views_down_to
from adaptc.ir.sites import items_of
from adaptc.passes.accumulate.memory import add, call, is_dense, is_new, owned, same_shape, view
from adaptc.passes.walk import Match, each
from adaptc.torch_internals import node_value, tree_leaves

_ROWS, _GRADS = dialect.get("lora_rows").overload, dialect.get("lora_rows_grads").overload


@each(lambda gm: gm.graph.find_nodes(op="call_function", target=_ROWS))
def add_rows(node: fx.Node) -> Match | None:
    x, y, *rest = cast(tuple[Any, ...], node.args)
    memory = owned(y, is_new)
    if memory is None or not is_dense(memory) or y in tree_leaves((x, rest)):
        return None
    outputs = items_of(node)

    def write(edit: Edit) -> list[fx.Node]:
        h = call(edit, LORA_ROWS, (memory, x, *rest), node, node_value(node)[1])
        results = {0: view(edit, memory, y), 1: h}
        return [results[cast(int, output.args[1])] for output in outputs]

    return Match(node, write, [*views_down_to(y, memory), node, *outputs], outputs)


@each(lambda gm: gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor))
def add_rows_grads(node: fx.Node) -> Match | None:
    """To what the sum adds the gradient of x to; the gradients of factors come with it, where nothing reads them
    before."""
    if node.kwargs or len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    first, second = cast(tuple[fx.Node, fx.Node], node.args)
    for views, other in ((first, second), (second, first)):
        dx = _item_below(views)
        memory = owned(other, is_new) if dx is not None else None
        if dx is None or memory is None or not (is_dense(memory) and is_dense(node)) or not same_shape(other, node):
            continue
        grads = cast(fx.Node, dx.args[0])
        factors = [item for item in items_of(grads) if item is not dx]
        late = all(node < user for item in factors for user in item.users)
        if same_shape(views, node) and node_value(memory).dtype == node_value(dx).dtype and late:
            return _match(node, views, other, memory, dx, factors)
    return None


def _item_below(views: fx.Node) -> fx.Node | None:
    """The gradient of x that ``views`` alone read."""
    while views.target in VIEWS and len(views.users) == 1:
        views = cast(fx.Node, views.args[0])
    is_item = views.target is operator.getitem and cast(fx.Node, views.args[0]).target is _GRADS
    if not is_item or views.args[1] != 0 or len(views.users) != 1:
        return None
    return views if cast(fx.Node, views.args[0]).args[-2] else None


def _match(
    node: fx.Node, views: fx.Node, other: fx.Node, memory: fx.Node, dx: fx.Node, factors: list[fx.Node]
) -> Match:
    grads = cast(fx.Node, dx.args[0])
    *given, _, need = grads.args

    def write(edit: Edit) -> list[fx.Node]:
        values = node_value(grads)[1:]
        made = call(edit, LORA_ROWS_GRADS, (memory, *given, need), grads, values)
        total = view(edit, memory, other)
        places = [cast(int, item.args[1]) - 1 for item in factors]
        items = [add(edit, operator.getitem, (made, i), {**made.meta, "val": values[i]}) for i in places]
        return [*items, total]

    below = [*views_down_to(views, dx), *views_down_to(other, memory)]
    return Match(node, write, sorted([grads, dx, *factors, *below, node]), [*factors, node])
