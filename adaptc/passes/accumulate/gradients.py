"""Gradients of what DoRA rescales, in the memory of the gradient that is rescaled."""

from __future__ import annotations

import operator
from typing import Any, cast

from torch import fx

from adaptc.codegen.ops.in_place import OUTPUT_GRADS, RESCALE_GRAD
from adaptc.ir import dialect
from adaptc.ir.edit import Edit
from adaptc.ir.products import views_down_to
from adaptc.ir.sites import items_of
from adaptc.passes.accumulate.memory import add, call, is_dense, is_new, owned, view
from adaptc.passes.walk import Match, each
from adaptc.torch_internals import OpOverload, node_value

#: Op -> the same in place, and which of its results that one leaves in the memory of the gradient.
_SCALED = {
    dialect.get("dora_rescale_grad").overload: (RESCALE_GRAD, 0),
    dialect.get("dora_output_grads").overload: (OUTPUT_GRADS, 2),
}


@each(lambda gm: [node for node in gm.graph.nodes if node.target in _SCALED])
def scale_gradients(node: fx.Node) -> Match | None:
    grad, *rest = cast(tuple[Any, ...], node.args)
    memory = owned(grad, is_new)
    if memory is None or grad in rest or not is_dense(memory):
        return None
    outputs = items_of(node)

    def write(edit: Edit) -> list[fx.Node]:
        values = node_value(node)
        op, scaled = _SCALED[cast(OpOverload, node.target)]
        others = [i for i in range(len(values)) if i != scaled]
        value = tuple(values[i] for i in others) if len(others) > 1 else values[others[0]]
        made = call(edit, op, (memory, *node.args[1:]), node, value)
        results = {scaled: view(edit, memory, grad)}
        for place, index in enumerate(others):
            meta = {**made.meta, "val": values[index]}
            results[index] = add(edit, operator.getitem, (made, place), meta) if len(others) > 1 else made
        return [results[cast(int, output.args[1])] for output in outputs]

    return Match(node, write, [*views_down_to(grad, memory), node, *outputs], outputs)
